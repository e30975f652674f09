"""What kernels have to know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from onnxcomp.targets.tvm.machine import Machine

WARP = 32
"""Threads that run in step; what is packed for a vector is packed for them."""

THREADS = 1024
"""Most threads of a block."""

SHARED = 48 * 1024
"""Bytes of shared memory that any block may have."""


@dataclass(frozen=True, kw_only=True)
class Gpu(Machine):
    """A kind of GPU, and the CPU of the machine that it is in.

    The fields of a `Machine` are those of the CPU, but for lanes, registers and dot products.

    Attributes:
        arch: Its architecture, as nvcc names it: `sm_87`.
        multiprocessors: How many blocks run at the same time at least.
    """

    kernels: ClassVar[str] = "onnxcomp.targets.tvm.gpu.kernels"
    arch: str
    multiprocessors: int

    @property
    @override
    def instruction_sets(self) -> tuple[str, ...]:
        return (self.arch, self.cpu, *self.features)

    @override
    def target(self) -> Any:
        import tvm

        entries: dict[str, Any] = {
            "kind": "cuda",
            "arch": self.arch,
            "max_threads_per_block": THREADS,
            "max_shared_memory_per_block": SHARED,
            "thread_warp_size": WARP,
        }
        return tvm.target.Target(entries, host=super().target())


def capability(arch: str) -> tuple[int, int]:
    """Compute capability of an architecture: (8, 7) of `sm_87`."""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1])
