"""What the lanes of a warp tell each other of whom a condition holds for, and places in lists that follow from that.

A list is in order of index, and the same in every run: no thread waits for another's atomic to know its place.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._warp import ALL
from onnxcomp.targets.tvm.gpu.machine import THREADS, WARP

AHEAD = 4
"""Values that a thread reads before it looks at the first of them."""


def warps_of(k: int) -> int:
    """Warps of the block that lists a row of `k` values: a batch of reads each, if there are as many."""
    return min(THREADS // WARP, -(-k // (WARP * AHEAD)))


def run_of(k: int) -> int:
    """Values beside one another that a warp of them takes, a multiple of what it reads at a time."""
    return -(-k // (warps_of(k) * WARP * AHEAD)) * WARP * AHEAD


def votes(holds: Any) -> Any:
    """A bit for each lane, uint32, set where an int32 expression is not 0. All lanes have to take part."""
    return T.call_extern("uint32", "__ballot_sync", T.uint32(ALL), holds)


def how_many(bits: Any) -> Any:
    """Bits that are set of a uint32."""
    return T.call_pure_extern("int32", "__popc", bits)


def lower(bits: Any, lane: Any) -> Any:
    """How many lanes before one have their bit set."""
    return how_many(T.bitwise_and(bits, T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1)))


@T.inline
def add_before(shared, own, before, warp, lane, warps):
    """Sum of what warps before this one have in `own[0]`, to `before[0]`, and of all of them, to `before[1]`.

    Args:
        shared: int32 (32,) in shared memory.
        own: The same in all lanes of a warp.
        before: int32 (2,).
        warp: Which one this is.
        lane: Which of its lanes.
        warps: How many there are.
    """
    T.tvm_storage_sync("shared")
    if lane == 0:
        shared[warp] = own[0]
    T.tvm_storage_sync("shared")
    before[0] = 0
    before[1] = 0
    for i in T.unroll(warps):
        before[0] = before[0] + T.Select(i < warp, shared[i], 0)
        before[1] = before[1] + shared[i]


@T.inline
def add_lanes_before(values, at, lane):
    """Sum of `values[at]`, int32, over the lanes up to one, itself included, to this one."""
    other = T.alloc_buffer((1,), "int32", scope="local")
    for i in T.unroll(5):
        other[0] = T.call_extern("int32", "__shfl_up_sync", T.uint32(ALL), values[at], 1 << i)
        if lane >= 1 << i:
            values[at] = values[at] + other[0]
