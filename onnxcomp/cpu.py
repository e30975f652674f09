"""What the CPU of this machine can do."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction set extensions of the CPU, named as Linux names them; empty where they cannot be found out."""
    try:
        if platform.system() == "Linux":
            return parse_cpuinfo(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
        if platform.system() == "Darwin":
            return _sysctl_flags()
    except OSError:
        pass
    return frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """Flags of the first core in the text of `/proc/cpuinfo`."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def _sysctl_flags() -> frozenset[str]:
    keys = (
        "machdep.cpu.features",
        "machdep.cpu.leaf7_features",
        "hw.optional.arm.FEAT_DotProd",
        "hw.optional.arm.FEAT_I8MM",
    )
    flags: set[str] = set()
    for key in keys:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False, timeout=10)
        words = done.stdout.lower().split()
        if key.startswith("machdep"):
            flags.update(w.replace("avx512vnni", "avx512_vnni") for w in words)
        elif words == ["1"]:
            flags.add("asimddp" if key.endswith("DotProd") else "i8mm")
    return frozenset(flags)
