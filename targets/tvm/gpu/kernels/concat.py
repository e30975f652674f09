"""Concatenation of two tensors, as a cache grows by what is new: bound by memory, 4 values a thread."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.machine import Gpu

_THREADS = 256

_EACH = 4
"""Values of a thread, so far apart that threads beside each other read values beside each other."""

_HIGHEST = 65535
"""Blocks along the second axis of a grid, at most."""


@cache
def concat(machine: Gpu, *, rows: int | None, first: int | None, second: int | None) -> Any:
    """Kernel `(a (rows, first), b (rows, second), y (rows, first + second))`, float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        first: Columns of a; None for any.
        second: Columns of b; None for any.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    left = tirx.Var("first", "int64") if first is None else first
    right = tirx.Var("second", "int64") if second is None else second
    stretch = _THREADS * _EACH

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (m, left), "float32")
        b = T.match_buffer(b_, (m, right), "float32")
        y = T.match_buffer(y_, (m, left + right), "float32")
        if T.And(m > 0, left + right > 0):
            for block in T.thread_binding((left + right + stretch - 1) // stretch, thread="blockIdx.x"):
                for band in T.thread_binding(T.min(m, _HIGHEST), thread="blockIdx.y"):
                    for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        for turn in T.serial((m - band + _HIGHEST - 1) // _HIGHEST):
                            row: T.let = turn * _HIGHEST + band
                            for i in T.unroll(_EACH):
                                column: T.let = block * stretch + i * _THREADS + thread
                                if column < left:
                                    y[row, column] = a[row, column]
                                elif column < left + right:
                                    y[row, column] = b[row, column - left]

    return kernel
