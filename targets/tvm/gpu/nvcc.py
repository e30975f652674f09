"""Compiles CUDA source for one architecture, on any machine: no GPU is needed for that."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.linking import call

_FLAGS = ("-O3", "-std=c++17", "-w", "--fatbin")
"""No fast math: requantized codes have to be those of other targets, and an infinity or NaN has to stay one."""


def nvcc() -> Path:
    """The compiler: that of `$CUDA_HOME`, on the path, in /usr/local/cuda, or from the package `nvidia-cuda-nvcc`.

    Raises:
        CompileError: If there is none.
    """
    homes = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    on_path = [Path(found)] if (found := shutil.which("nvcc")) else []
    for path in (*homes[:-1], *on_path, homes[-1], *_packaged()):
        if path.is_file():
            return path
    raise CompileError(
        "no CUDA compiler: nvcc is neither in $CUDA_HOME, on the path, nor installed as a package; do "
        "'pip install onnxcomp[tvm-cuda]', or install the CUDA toolkit; it needs g++ as well"
    )


def _packaged() -> list[Path]:
    """Where packages of NVIDIA put it; they share a namespace package."""
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return [path for folder in folders for path in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)]


def compile_fatbin(source: str, arch: str) -> bytes:
    """Machine code for `arch` together with PTX, from which later GPUs compile their own.

    Args:
        source: CUDA C.
        arch: Architecture, as `sm_87`.

    Raises:
        CompileError: If there is no compiler, or it fails.
    """
    compiler = nvcc()
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        given, made = Path(folder) / "kernels.cu", Path(folder) / "kernels.fatbin"
        given.write_text(source, encoding="utf-8")
        call([str(compiler), *_FLAGS, f"-arch={arch}", "-o", str(made), str(given)])
        return made.read_bytes()
