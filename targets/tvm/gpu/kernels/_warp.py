"""Sums and maxima over threads, in an order that is always the same."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.machine import WARP

ALL = 0xFFFFFFFF
"""Mask of all lanes of a warp."""


def exchanged(value: Any, distance: Any) -> Any:
    """A float32 expression of the lane whose number differs in the bit `distance`; all lanes have to take part."""
    return T.call_extern("float32", "__shfl_xor_sync", T.uint32(ALL), value, distance)


@T.inline
def add_lanes(values, at, lanes):
    """Sum of `values[at]` over every `lanes` lanes beside one another, a power of two, to all of them."""
    for i in T.unroll((lanes - 1).bit_length()):
        values[at] = values[at] + exchanged(values[at], lanes // 2 >> i)


@T.inline
def top_lanes(values, at, lanes):
    """Greatest of `values[at]` over every `lanes` lanes; what is not a number counts only if all are."""
    for i in T.unroll((lanes - 1).bit_length()):
        values[at] = T.max(values[at], exchanged(values[at], lanes // 2 >> i))


@T.inline
def add_team(values, at, thread, shared, threads):
    """Sum of `values[at]` over a warp, or over a block of `threads` by way of `shared`, a value a warp, to all."""
    add_lanes(values, at, WARP)
    if threads > WARP:
        T.tvm_storage_sync("shared")
        if thread % WARP == 0:
            shared[thread // WARP] = values[at]
        T.tvm_storage_sync("shared")
        values[at] = T.float32(0)
        for i in T.unroll(threads // WARP):
            values[at] = values[at] + shared[i]


@T.inline
def top_team(values, at, thread, shared, threads):
    """Likewise the greatest."""
    top_lanes(values, at, WARP)
    if threads > WARP:
        T.tvm_storage_sync("shared")
        if thread % WARP == 0:
            shared[thread // WARP] = values[at]
        T.tvm_storage_sync("shared")
        for i in T.unroll(threads // WARP):
            values[at] = T.max(values[at], shared[i])
