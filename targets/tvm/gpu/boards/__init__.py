"""Boards with a GPU, each a file of data beside this one or of the user's."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from onnxcomp.errors import RecipeError
from onnxcomp.registry import unknown
from onnxcomp.targets.tvm.boards import cpu_machine, read
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu


class GpuBoard(BaseModel):
    """Content of a board's file.

    Attributes:
        summary: What it is.
        arch: Architecture of the GPU, as nvcc names it.
        host: Board of its CPU; `host` for this machine's.
        multiprocessors: Of the GPU.
        memory_mib: Memory of a common board of that kind.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    summary: str
    arch: str = Field(pattern=r"^sm_[0-9]{2,3}a?$")
    host: str
    multiprocessors: int = Field(ge=1)
    memory_mib: int = Field(ge=1)

    def gpu(self, name: str, flags: frozenset[str]) -> Gpu:
        """What kernels have to know of it.

        Args:
            name: Of the board.
            flags: Instruction sets of this machine, for `host`.
        """
        cpu = cpu_machine(self.host, flags)
        return Gpu(
            name=name,
            triple=cpu.triple,
            cpu=cpu.cpu,
            features=cpu.features,
            lanes=WARP,
            registers=64,
            dot="dp4a",
            arch=self.arch,
            multiprocessors=self.multiprocessors,
        )


def gpu_boards() -> dict[str, GpuBoard]:
    """Those that come with onnxcomp, by name."""
    return {path.stem: read(path, GpuBoard) for path in sorted(Path(__file__).parent.glob("*.toml"))}


def gpu(name: str, flags: frozenset[str]) -> Gpu:
    """The GPU that a board's name or file stands for.

    Args:
        name: A name that comes with onnxcomp, or the path of a `.toml` file.
        flags: Instruction sets of this machine, for boards whose CPU is that of this machine.

    Raises:
        RecipeError: If there is no such board.
        TargetError: If the file is not valid.
    """
    if name.endswith(".toml"):
        return read(Path(name), GpuBoard).gpu(Path(name).stem, flags)
    known = gpu_boards()
    if name not in known:
        raise RecipeError(unknown("board", name, sorted(known)))
    return known[name].gpu(name, flags)
