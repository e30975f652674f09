"""The manifest of a TVM artifact, which the runner on a device reads as well."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from onnxcomp.errors import TargetError
from onnxcomp.manifest import MANIFEST, BaseManifest, DType, Strict, check_file

CODE = "model.so"
WEIGHTS = "weights.bin"
TUNING = ("tuning_workloads.json", "tuning_records.json")
"""Schedules of functions of TVM's own, if some were tuned; nothing but people and TVM's tools reads them."""

FILES = (CODE, WEIGHTS, *TUNING)
_NEEDED = {CODE, WEIGHTS}
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


class TunedEntry(Strict):
    """What tuning did to a function of TVM's own.

    Attributes:
        function: Its name in the code; several names with a space between are functions of the same content.
        calls: How often the model calls it.
        trials: Schedules that were measured for it, for this model or an earlier one.
        before_us: Microseconds of TVM's plain loop on one thread; null if it was not measured.
        after_us: Microseconds of the schedule in use, measured in turns with the plain loop; null if there is none.
        used: It runs by that schedule.
        note: Why not, else empty.
    """

    function: str
    calls: int = Field(ge=1)
    trials: int = Field(ge=0)
    before_us: float | None = None
    after_us: float | None = None
    used: bool
    note: str = ""


class Manifest(BaseManifest):
    """Content of `manifest.json`.

    Attributes:
        board: Kind of CPU that it was compiled for.
        triple: LLVM's target triple.
        cpu: LLVM's name of the CPU.
        gpu: Architecture of the GPU, as nvcc names it; empty if kernels run on the CPU.
        parameters: Inputs of the graph, state included, in the order in which the function `main` takes them; behind
            them it takes the weights.
        returns: Outputs of the graph, state included, in the order in which `main` returns them.
        weights: What is in the weights' file, in order.
        tuning: What became of functions that were tuned, or could not be; empty if nothing was to be.
    """

    board: str
    triple: str
    cpu: str
    gpu: str = ""
    parameters: list[str]
    returns: list[str]
    weights: list[WeightEntry]
    tuning: list[TunedEntry] = Field(default_factory=list)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compares the files with the manifest.

    Raises:
        TargetError: If one is missing, superfluous, or was changed.
    """
    names = set(manifest.files)
    if names not in (_NEEDED, set(FILES)):
        raise TargetError(f"{folder / MANIFEST} is not valid: files are {sorted(names)}")
    size = manifest.files[WEIGHTS].bytes
    if any(w.offset + w.bytes > size for w in manifest.weights):
        raise TargetError(f"{folder / MANIFEST} is not valid: a weight lies beyond the end of {WEIGHTS}")
    for name in sorted(names):
        check_file(folder / name, manifest.files[name])
