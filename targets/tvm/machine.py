"""What kernels have to know of a CPU: how wide its vectors are, how many there are, and how it multiplies integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Dot = Literal["vnni512", "vnni256", "avx2", "sdot", "dp4a", "none"]
"""How four products of 8-bit integers are summed: VPDPBUSD on 512 or 256 bits, VPMADDWD after widening, SDOT, DP4A of a
GPU, or not at all."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of CPU.

    Attributes:
        name: Of the board.
        triple: LLVM's target triple.
        cpu: LLVM's name of the CPU.
        features: LLVM's names of what it has beyond that, each with `+` or `-` before it.
        lanes: Float32 values in a vector.
        registers: Vectors that fit in registers.
        dot: How integers are multiplied.
    """

    kernels: ClassVar[str] = "onnxcomp.targets.tvm.kernels"
    """Package with a module a kind of kernel."""

    name: str
    triple: str
    cpu: str
    features: tuple[str, ...] = ()
    lanes: int
    registers: int
    dot: Dot

    @property
    def instruction_sets(self) -> tuple[str, ...]:
        """What is said of it in reports."""
        return (self.cpu, *self.features)

    def target(self) -> Any:
        """The `tvm.target.Target`."""
        import tvm  # takes seconds, and boards are looked at without it

        entries: dict[str, Any] = {"kind": "llvm", "mtriple": self.triple, "mcpu": self.cpu}
        if self.features:
            entries["mattr"] = list(self.features)
        return tvm.target.Target(entries)
