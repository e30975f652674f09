"""A Debian arm64 root for `qemu-aarch64 -L`: libraries, Python, and the wheels whose results are compared with x86's.

Packages come from the sources that apt is set up with here, which therefore have to be Debian's.

It needs apt-get, dpkg-deb, qemu-user and pip, but no rights: packages are downloaded with a package database of its own
and unpacked, and none of their scripts runs. It is made once, in the folder that ONNXCOMP_DEVICE_ROOT names or else in
the user's cache. Emulation shows whether results are right, and nothing about speed.

    python tests/device/root.py    prints where it is, and makes it if it is not there
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import platformdirs

QEMU = "qemu-aarch64"
SITE = "opt/site"
"""Folder of the wheels inside the root."""

_PACKAGES = ["python3", "libstdc++6", "libgomp1"]
_WHEELS = [
    "apache-tvm==0.27.0.post1",
    "apache-tvm-ffi==0.1.14.post1",
    "onnxruntime==1.32.0",
    "numpy==2.4.6",
    "cloudpickle",
    "flatbuffers",
    "ml_dtypes",
    "packaging",
    "protobuf",
    "psutil",
    "tornado",
    "typing_extensions",
]
_PLATFORMS = ["manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"]
# ONNX Runtime asks which CPU this is, and fails on the answer of an x86 host. These are a Cortex-A76's identifiers.
_CPUINFO = "".join(
    f"processor\t: {core}\nBogoMIPS\t: 108.00\n"
    "Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: 0xd0b\nCPU revision\t: 1\n\n"
    for core in range(2)
)
_RECIPE = "\n".join([*_PACKAGES, *_WHEELS, *_PLATFORMS, _CPUINFO])


def folder() -> Path:
    """Where the root is, or will be."""
    return Path(os.environ.get("ONNXCOMP_DEVICE_ROOT") or platformdirs.user_cache_path("onnxcomp") / "aarch64-root")


def missing() -> str:
    """What this machine lacks to make or use a root; empty if nothing."""
    absent = [tool for tool in (QEMU, "apt-get", "dpkg-deb") if not shutil.which(tool)]
    return ", ".join(absent)


def made() -> Path:
    """The root, made if it is not there or was made by another recipe.

    Raises:
        RuntimeError: If something that this needs is missing, or a download fails.
    """
    root = folder()
    done = root / ".recipe"
    if done.is_file() and done.read_text() == _RECIPE:
        return root
    if absent := missing():
        raise RuntimeError(f"an emulated root needs {absent}; on Debian: apt-get install qemu-user apt dpkg")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as work:
        new = Path(work, "root")
        _unpack_packages(new, Path(work, "apt"))
        _unpack_wheels(new / SITE, _version(new))
        (new / "proc").mkdir(exist_ok=True)
        (new / "proc/cpuinfo").write_text(_CPUINFO)
        (new / ".recipe").write_text(_RECIPE)
        if root.exists():
            root.rename(Path(work, "old"))
        try:
            new.rename(root)
        except OSError:
            if not done.is_file():  # else another process was faster
                raise
    return root


def _unpack_packages(root: Path, apt: Path) -> None:
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",  # whose own rights are those of whoever calls
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Debug::NoLocking": "true",
    }
    options = [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]
    _run(["apt-get", *options, "-q", "update"])
    _run(["apt-get", *options, "-q", "-y", "--no-install-recommends", "--download-only", "install", *_PACKAGES])
    root.mkdir()
    for package in sorted((apt / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])


def _version(root: Path) -> str:
    """Version of the root's Python, as `3.11`."""
    return os.readlink(root / "usr/bin/python3").removeprefix("python")


def _unpack_wheels(site: Path, version: str) -> None:
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    _run([*pip, f"--target={site}", f"--python-version={version}", "--only-binary=:all:", *platforms, *_WHEELS])


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed: {(result.stderr or result.stdout).strip()[-2000:]}")


def command(program: str | Path, *arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """A command line that runs an aarch64 program in the root, as the most capable CPU that qemu knows."""
    settings = [part for key, value in (environment or {}).items() for part in ("-E", f"{key}={value}")]
    return [QEMU, "-cpu", "max", "-L", str(made()), *settings, str(program), *arguments]


def python(*arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Likewise for the root's Python, with the wheels on its path."""
    root = made()
    paths = {"PYTHONPATH": str(root / SITE), "PYTHONDONTWRITEBYTECODE": "1"}
    return command(root / f"usr/bin/python{_version(root)}", *arguments, environment={**paths, **(environment or {})})


if __name__ == "__main__":
    print(made())
