"""Normalisation of rows: LayerNormalization and RMSNormalization over the last axis.

Bound by the memory that a row comes from: it is read once, into registers, and what is summed twice is there. Rows that
registers cannot hold are read again, from a cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._rows import held_in_registers, team
from onnxcomp.targets.tvm.gpu.kernels._warp import add_team
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu


@cache
def norm(machine: Gpu, *, rows: int | None, n: int, epsilon: float, centred: bool, bias: bool) -> Any:
    """Kernel `(x (rows, n), scale (n)[, bias (n)], y (rows, n))`, all float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        n: Length of a row.
        epsilon: Added to the variance, or to the mean square.
        centred: LayerNormalization; else RMSNormalization, which leaves the mean in.
        bias: Whether there is one.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    threads, teams = team(n)
    count = -(-n // threads)
    held = held_in_registers(n)

    def value(x: Any, kept: Any, row: Any, i: Any, thread: Any) -> Any:
        return kept[i] if held else x[row, i * threads + thread]

    @T.inline
    def average(x, kept, one, shared, row, thread, at, squares):
        """Mean over a row of its values or of their squares around `one[0]`, to `one[at]`."""
        one[at] = T.float32(0)
        for i in T.unroll(count) if held else T.serial(count):
            if i * threads + thread < n:
                if squares:
                    away: T.let = value(x, kept, row, i, thread) - one[0]
                    one[at] = one[at] + away * away
                else:
                    one[at] = one[at] + value(x, kept, row, i, thread)
        add_team(one, at, thread, shared, threads)
        one[at] = one[at] * T.float32(1 / n)

    @T.inline
    def one_row(x, s, b, y, shared, row, thread):
        kept = T.alloc_buffer((count if held else 1,), "float32", scope="local")
        one = T.alloc_buffer((2,), "float32", scope="local")
        if held:
            for i in T.unroll(count):
                if i * threads + thread < n:
                    kept[i] = x[row, i * threads + thread]
        one[0] = T.float32(0)
        if centred:
            average(x, kept, one, shared, row, thread, 0, False)
        average(x, kept, one, shared, row, thread, 1, True)
        one[1] = T.float32(1) / T.sqrt(one[1] + T.float32(epsilon))
        for i in T.unroll(count) if held else T.serial(count):
            at: T.let = i * threads + thread
            if at < n:
                if bias:
                    y[row, at] = (value(x, kept, row, i, thread) - one[0]) * one[1] * s[at] + b[at]
                else:
                    y[row, at] = (value(x, kept, row, i, thread) - one[0]) * one[1] * s[at]

    @T.inline
    def body(x, s, b, y):
        for block in T.thread_binding(T.max((m + teams - 1) // teams, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(threads * teams, thread="threadIdx.x"):
                shared = T.alloc_buffer((threads // WARP,), "float32", scope="shared")
                row: T.let = block * teams + thread // threads
                if row < m:
                    one_row(x, s, b, y, shared, row, thread % threads)

    if bias:

        @T.prim_func
        def kernel(x_: T.handle, s_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, n), "float32")
            s = T.match_buffer(s_, (n,), "float32")
            b = T.match_buffer(b_, (n,), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            body(x, s, b, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, s_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, n), "float32")
            s = T.match_buffer(s_, (n,), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            body(x, s, s, y)

    return kernel
