"""Which compiler links code for a machine, and how it is called."""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import CompileError
from onnxcomp.model import root_cause

GLIBC = "2.28"
"""What is linked by Zig runs from this version of glibc on, as TVM's own libraries do."""

_HOST = ("g++", "clang++", "c++")
_HOST_C = ("gcc", "clang", "cc")


def architecture(triple: str) -> str:
    """The architecture that a target triple names.

    Raises:
        CompileError: If the triple is not one of 64-bit Linux with glibc, for which alone TVM's runtime is published.
    """
    name, *rest = triple.split("-")
    if name not in ("x86_64", "aarch64") or "linux" not in rest or rest[-1] != "gnu":
        raise CompileError(f"{triple}: only x86_64-linux-gnu and aarch64-linux-gnu can be linked")
    return name


def is_host(triple: str) -> bool:
    """Whether code for a triple runs on this machine."""
    return sys.platform == "linux" and architecture(triple) == platform.machine()


def compiler(triple: str, *, cxx: bool = False) -> list[str]:
    """The command of a compiler that links for a triple.

    On this machine that is `$CXX`, or GCC or Clang; for another one its cross-compiler, as `aarch64-linux-gnu-g++`. Zig
    takes the place of either, from the package `ziglang` or as `zig` on the path.

    Args:
        triple: LLVM's target triple.
        cxx: It has to compile C++ too.

    Raises:
        CompileError: If there is none.
    """
    arch = architecture(triple)
    names = [*_HOST, *(() if cxx else _HOST_C)]
    if is_host(triple):
        given = shlex.split(os.environ.get("CXX", ""))
        if given and shutil.which(given[0]):
            return given
    else:
        names = [f"{arch}-linux-gnu-g++", *([] if cxx else [f"{arch}-linux-gnu-gcc"])]
    for name in names:
        if found := shutil.which(name):
            return [found]
    if zig := _zig():
        return [*zig, "c++", "-target", f"{arch}-linux-gnu.{GLIBC}"]
    package = "g++" if is_host(triple) else f"g++-{arch.replace('_', '-')}-linux-gnu"
    raise CompileError(
        f"no compiler links for {triple}: looked for {', '.join(names)} and Zig. Do 'pip install ziglang', or on "
        f"Debian and Ubuntu 'apt-get install {package}'"
    )


@functools.cache
def _zig() -> list[str]:
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang"]
    found = shutil.which("zig")
    return [found] if found else []


def export_library(executable: Any, path: Path, triple: str, pack: Callable[..., str] | None = None) -> None:
    """Links a compiled model into a shared object.

    Args:
        executable: `relax.Executable`.
        path: The file; it appears complete or not at all.
        triple: LLVM's target triple, that it was compiled for.
        pack: Writes imported modules, those of a GPU; see `onnxcomp.targets.tvm.gpu.packing`.

    Raises:
        CompileError: If no compiler is found, or it fails.
    """
    command = compiler(triple)

    def link(output: str, objects: Sequence[str], options: Sequence[str] = ()) -> None:
        # Behind the objects, or a linker that takes libraries as needed drops it.
        call([*command, "-shared", "-fPIC", "-s", *options, "-o", output, *objects, "-Wl,--as-needed", "-lm"])

    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        executable.export_library(str(temporary), fcompile=link, fpack_imports=pack)
        os.replace(temporary, path)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"TVM cannot export the code: {root_cause(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def call(command: Sequence[str]) -> str:
    """Runs a compiler and returns what it prints.

    Raises:
        CompileError: If it fails, with the last of what it says.
    """
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    if done.returncode:
        raise CompileError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-1500:]}")
    return done.stdout
