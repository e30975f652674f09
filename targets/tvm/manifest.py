"""The manifest of a TVM artifact, which the runner on a device reads as well."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from onnxcomp.errors import TargetError
from onnxcomp.manifest import MANIFEST, BaseManifest, DType, Strict, check_file

CODE = "model.so"
WEIGHTS = "weights.bin"
FILES = (CODE, WEIGHTS)
PACKAGES = ("onnxcomp", "apache-tvm", "apache-tvm-ffi", "onnx", "onnx-ir")

ALIGNMENT = 64
"""Of each weight in its file: a cache line, and what vector loads of kernels expect."""


class WeightEntry(Strict):
    """A weight: `bytes` of a dense little-endian array at `offset` of the weights' file."""

    name: str
    dtype: DType
    shape: list[int]
    offset: int = Field(ge=0, multiple_of=ALIGNMENT)
    bytes: int = Field(ge=0)


class Manifest(BaseManifest):
    """Content of `manifest.json`.

    Attributes:
        board: Kind of CPU that it was compiled for.
        triple: LLVM's target triple.
        cpu: LLVM's name of the CPU.
        parameters: Inputs of the graph, state included, in the order in which the function `main` takes them; behind
            them it takes the weights.
        returns: Outputs of the graph, state included, in the order in which `main` returns them.
        weights: What is in the weights' file, in order.
    """

    board: str
    triple: str
    cpu: str
    parameters: list[str]
    returns: list[str]
    weights: list[WeightEntry]


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the files with the manifest.

    Raises:
        TargetError: If one is missing, superfluous, or was changed.
    """
    if set(manifest.files) != set(FILES):
        raise TargetError(f"{folder / MANIFEST} is not valid: files are {sorted(manifest.files)}")
    size = manifest.files[WEIGHTS].bytes
    if any(w.offset + w.bytes > size for w in manifest.weights):
        raise TargetError(f"{folder / MANIFEST} is not valid: a weight lies beyond the end of {WEIGHTS}")
    for name in FILES:
        check_file(folder / name, manifest.files[name])
