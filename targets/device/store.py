"""The user's devices, kept as TOML in the configuration folder."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import ValidationError

from onnxcomp.device import NAME, Device, DeviceSpec
from onnxcomp.errors import DeviceError
from onnxcomp.registry import load_device, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VERSION = 1
LOCAL = DeviceSpec(name="local", kind="local")
"""The device that always exists."""
FOLDER_VARIABLE = "ONNXCOMP_CONFIG"
_FILE = "devices.toml"
_MAX_BYTES = 1 << 20


def path() -> Path:
    """The file; `ONNXCOMP_CONFIG` names another folder than the user's."""
    given = os.environ.get(FOLDER_VARIABLE)
    return (Path(given) if given else platformdirs.user_config_path("onnxcomp")) / _FILE


def read() -> dict[str, DeviceSpec]:
    """Devices by name, `local` first.

    Raises:
        DeviceError: If the file is not valid.
    """
    found = {LOCAL.name: LOCAL}
    for name, table in _tables().items():
        kind = table.pop("kind", None)
        if not re.fullmatch(NAME, name) or name in found or not isinstance(kind, str):
            raise _invalid(f"[devices.{name}] needs a name of letters, digits, - and _, and a kind")
        if not all(isinstance(v, str | int) and not isinstance(v, bool) for v in table.values()):
            raise _invalid(f"[devices.{name}] has settings that are no texts and no whole numbers")
        found[name] = DeviceSpec(name=name, kind=kind, settings=table)
    return found


def add(spec: DeviceSpec) -> None:
    """Keeps a device.

    Raises:
        DeviceError: If there is one of this name, its settings are not valid, or the file cannot be written.
    """
    if not re.fullmatch(NAME, spec.name):
        raise DeviceError(f"{spec.name!r} is no name for a device; take letters, digits, - and _")
    devices = read()
    if spec.name in devices:
        raise DeviceError(f"there is a device {spec.name!r}; remove it first with: onnxcomp devices remove {spec.name}")
    make(spec)
    _write({**devices, spec.name: spec})


def remove(name: str) -> None:
    """Forgets a device.

    Raises:
        DeviceError: If there is none of this name, it is `local`, or the file cannot be written.
    """
    devices = read()
    if name == LOCAL.name:
        raise DeviceError("the device 'local' is this machine and cannot be removed")
    if name not in devices:
        raise DeviceError(unknown("device", name, list(devices)))
    del devices[name]
    _write(devices)


def find(name: str) -> Device:
    """The device that is kept as `name`.

    Raises:
        DeviceError: If there is none, or its settings are not valid.
    """
    devices = read()
    if name not in devices:
        raise DeviceError(unknown("device", name, list(devices)) + "; add one with: onnxcomp devices add")
    return make(devices[name])


def make(spec: DeviceSpec) -> Device:
    """The device behind a spec.

    Raises:
        DeviceError: If its settings are not valid for its kind.
        RecipeError: If there is no such kind.
    """
    kind = load_device(spec.kind)
    try:
        return kind(spec.name, kind.settings_type.model_validate(dict(spec.settings)))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        setting = ".".join(map(str, first["loc"])).replace("_", "-")
        allowed = ", ".join(name.replace("_", "-") for name in kind.settings_type.model_fields)
        texts = {
            "missing": f"needs --{setting}",
            "extra_forbidden": f"has no setting {setting!r}; there are {allowed}",
        }
        text = texts.get(first["type"], f"cannot have --{setting} {first.get('input')!r}: {first['msg']}")
        raise DeviceError(f"device {spec.name!r} of kind {spec.kind!r} {text}") from error


def _tables() -> dict[str, dict[str, Any]]:
    file = path()
    try:
        if not file.exists():
            return {}
        if file.stat().st_size > _MAX_BYTES:
            raise _invalid("it is too large")
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(str(error)) from error
    devices = content.get("devices", {})
    if content.get("version") != VERSION or content.keys() - {"version", "devices"}:
        raise _invalid(f"it needs version = {VERSION} and tables [devices.NAME], and nothing else")
    if not isinstance(devices, dict) or not all(isinstance(t, dict) for t in devices.values()):
        raise _invalid("devices are tables [devices.NAME]")
    return devices


def _write(devices: Mapping[str, DeviceSpec]) -> None:
    """Replaces the file at once, so that an interrupt leaves the old or the new one."""
    lines = [f"version = {VERSION}"]
    for name, spec in devices.items():
        if name != LOCAL.name:
            lines += ["", f"[devices.{name}]", f"kind = {_value(spec.kind)}"]
            lines += [f"{key} = {_value(value)}" for key, value in spec.settings.items()]
    file = path()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".devices.", dir=file.parent) as folder:
            new = Path(folder, _FILE)
            new.write_text("\n".join(lines) + "\n", encoding="utf-8")
            os.replace(new, file)
    except OSError as error:
        raise DeviceError(f"cannot write {file}: {error.strerror or error}") from error


def _value(value: str | int) -> str:
    """A TOML value; a text without control characters is in TOML what it is in JSON."""
    return json.dumps(value, ensure_ascii=False)


def _invalid(reason: str) -> DeviceError:
    return DeviceError(f"{path()} is not valid: {reason}; mend it, or remove it and add the devices anew")
