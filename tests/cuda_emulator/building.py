"""Builds the emulated driver, and kernels for it, by g++; keeps what it built."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

_HERE = Path(__file__).parent
_DRIVER = ("engine.cpp", "faults.cpp", "memory.cpp", "driver.cpp")
_RUNTIME = ("runtime.cpp",)
_FLAGS = ("-std=gnu++17", "-O2", "-fPIC", "-w")
_KERNEL_FLAGS = (
    *_FLAGS,
    "-g1",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=bounds,alignment",
    "-fno-sanitize-recover=all",
)
# The runtime's symbols have a version, which TVM's library asks for.
_VERSIONS = "libcudart.so.13 { global: cuda*; local: *; };\n"

_INCLUDE = re.compile(r"#include\s*<(cuda(_fp16|_bf16)?|math_constants)\.h>")
_DYNAMIC = re.compile(r"extern\s+__shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*([\w ]+?)\s+(\w+)\[\];")
_FIXED = re.compile(r"__shared__\s+(?:__align__\(\d+\)|alignas\(\d+\))?\s*([\w ]+?)\s+(\w+)\[(\d+)\];")
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__\w+__\([^)]*\)\s*)*(\w+)\(')


@cache
def missing() -> str:
    """Why the emulator cannot run on this machine; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "it is for x86-64 Linux"
    if shutil.which("g++") is None:
        return "g++ is missing"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    return "CUDA's driver is here"


def build_libraries() -> tuple[Path, Path]:
    """Stand-ins for libcuda.so.1 and libcudart.so.13."""

    def driver(folder: Path) -> None:
        _gxx(folder, *_FLAGS, "-shared", *_sources(_DRIVER), "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1", "-ldl")
        (folder / "versions").write_text(_VERSIONS, encoding="utf-8")
        script = "-Wl,--version-script=versions"
        link = ("libcuda.so.1", "-Wl,-soname,libcudart.so.13", script, "-o", "libcudart.so.13")
        _gxx(folder, *_FLAGS, "-shared", *_sources(_RUNTIME), *link)

    folder = _kept(_texts("*.cpp") + _texts("*.h") + repr(_FLAGS), driver)
    return folder / "libcuda.so.1", folder / "libcudart.so.13"


def compile_kernels(source: str) -> bytes:
    """CUDA source by TVM as what the emulated driver loads: a head with the length, then a shared object."""
    text = _as_cpp(str(source))

    def build(folder: Path) -> None:
        (folder / "kernels.cpp").write_text(text, encoding="utf-8")
        shim = ("-include", str(_HERE / "shim.h"))
        _gxx(folder, *_KERNEL_FLAGS, *shim, "-c", "kernels.cpp", "-o", "kernels.o")
        # Without the flags of the sanitizer, or its library would be linked.
        _gxx(folder, "-shared", "kernels.o", "-o", "kernels.so", "-lm")

    binary = (_kept(text + _texts("*.h") + repr(_KERNEL_FLAGS), build) / "kernels.so").read_bytes()
    return b"ONNXCOMP-EMULATED %d\n" % len(binary) + binary


def _as_cpp(source: str) -> str:
    """CUDA source with what no macro can turn into C++ rewritten; its lines keep their numbers."""
    places = iter(range(1 << 30))

    def fixed(match: re.Match[str]) -> str:
        kind, name, size = match.groups()
        call = f'onnxcomp_engine->shared({next(places)}, sizeof({kind}[{size}]), "{name}")'
        return f"auto& {name} = *static_cast<{kind} (*)[{size}]>({call});"

    original, source = source, _INCLUDE.sub("", source)
    source = _DYNAMIC.sub(r"\1* const \2 = static_cast<\1*>(onnxcomp_engine->dynamic_shared);", source)
    source = _FIXED.sub(fixed, source)
    kernels = dict.fromkeys(_KERNEL.findall(source))
    ends = [f"ONNXCOMP_KERNEL({name})" for name in kernels]
    # For messages that quote a line.
    text = f'extern "C" const char onnxcomp_source[] = R"__source__({original})__source__";'
    return "\n".join(['#line 1 "kernels.cu"', source, *ends, text, ""])


@cache
def _texts(pattern: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(_HERE.glob(pattern)))


def _sources(names: Sequence[str]) -> list[str]:
    return [str(_HERE / name) for name in names]


def _gxx(folder: Path, *arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ cannot compile this for the emulated device:\n{done.stderr[:4000]}")


def _kept(text: str, build: Callable[[Path], None]) -> Path:
    """Folder with what `build` makes, made once for a text."""
    root = os.environ.get("ONNXCOMP_EMULATOR_CACHE") or f"{tempfile.gettempdir()}/onnxcomp-emulator-{os.getuid()}"
    folder = Path(root) / hashlib.sha256((text + platform.node()).encode()).hexdigest()[:24]
    if not folder.exists():
        Path(root).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            work = Path(scratch) / "work"
            work.mkdir()
            build(work)
            try:
                work.rename(folder)
            except OSError:  # another process was first
                if not folder.exists():
                    raise
    return folder
