"""What a device printed of itself, read."""

from __future__ import annotations

from onnxcomp.device import DeviceFacts
from onnxcomp.errors import DeviceError
from onnxcomp.targets.device.artifacts import architecture
from onnxcomp.targets.device.scripts import FACT


def facts(name: str, kind: str, printed: str) -> DeviceFacts:
    """What the script `FACTS` printed; lines that are not of it are skipped.

    Raises:
        DeviceError: If there are none of it.
    """
    found: dict[str, str] = {}
    missing: list[str] = []
    for line in printed.splitlines():
        mark, _, rest = line.partition(" ")
        key, _, value = rest.partition(" ")
        if mark == FACT and key == "missing":
            missing.append(value)
        elif mark == FACT:
            found[key] = value.strip()[:200]
    if "arch" not in found:
        raise DeviceError(f"{name} told nothing of itself; look whether its login shell runs commands")

    def number(key: str, factor: int = 1) -> int | None:
        return int(found[key]) * factor if found.get(key, "").isdigit() else None

    degrees = number("temperature")
    warnings = [f"it has no {command}, which jobs need" for command in missing]
    if "writable" not in found:
        warnings.append(f"{found.get('folder', '')} is not there or cannot be written; set another with --folder")
    if found.get("governor") not in (None, "", "performance"):
        warnings.append(f"the governor {found['governor']} changes the clock: latencies will vary")
    return DeviceFacts(
        device=name,
        kind=kind,
        arch=architecture(found["arch"]),
        model=found.get("model", ""),
        cores=number("cores"),
        memory=number("memory", 1024),
        available=number("available", 1024),
        folder=found.get("folder", ""),
        free=number("free", 1024),
        python=found.get("python", ""),
        onnxruntime=found.get("onnxruntime", ""),
        governor=found.get("governor", ""),
        temperature=None if degrees is None else degrees / 1000,
        warnings=tuple(warnings),
    )
