"""Normalisation of rows: LayerNormalization and RMSNormalization over the last axis."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._panels import ON_STACK
from onnxcomp.targets.tvm.kernels._rows import over_rows
from onnxcomp.targets.tvm.machine import Machine

_SUMS = 4
"""Vectors that sums are spread over, so that an addition need not wait for the one before."""


@cache
def norm(machine: Machine, *, rows: int | None, n: int, epsilon: float, centred: bool, bias: bool) -> Any:
    """Kernel `(x (rows, n), scale (n)[, bias (n)], y (rows, n))`, all float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        n: Length of a row.
        epsilon: Added to the variance, or to the mean square.
        centred: LayerNormalization; else RMSNormalization, which leaves the mean in.
        bias: Whether there is one.
    """
    lanes = machine.lanes
    width = lanes if n >= lanes else 1
    full, rest = n // width, n % width
    sums = min(_SUMS, full)
    m = tirx.Var("rows", "int64") if rows is None else rows
    over = over_rows(m, n)

    def part(at: Any) -> Any:
        return T.ramp(at, 1, width) if width > 1 else at

    def wide(value: Any) -> Any:
        return T.broadcast(value, width) if width > 1 else value

    def centre(value: Any, mean: Any) -> Any:
        return value - wide(mean) if centred else value

    def square(value: Any, mean: Any) -> Any:
        value = centre(value, mean)
        return value * value

    def same(value: Any, _: Any) -> Any:
        return value

    @T.inline
    def average(x, row, one, at, of):
        """Mean over a row of `of(value, mean)` to `one[at]`."""
        kept = T.alloc_buffer((sums * width,), "float32", annotations=ON_STACK)
        for u in T.unroll(sums):
            kept[part(u * width)] = wide(T.float32(0))
        for j in T.serial(full // sums):
            for u in T.unroll(sums):
                kept[part(u * width)] = kept[part(u * width)] + of(x[row, part((j * sums + u) * width)], one[0])
        for u in T.unroll(full % sums):
            kept[part(u * width)] = kept[part(u * width)] + of(x[row, part((full // sums * sums + u) * width)], one[0])
        if rest > 0:
            kept[part(0)] = kept[part(0)] + vm.last(of(x[row, part(n - width)], one[0]), rest)
        for u in T.unroll(sums - 1):
            kept[part(0)] = kept[part(0)] + kept[part((u + 1) * width)]
        one[at] = vm.total(kept[part(0)]) * T.float32(1 / n)

    @T.inline
    def store(x, s, b, y, row, one, at):
        if bias:
            y[row, part(at)] = centre(x[row, part(at)], one[0]) * wide(one[1]) * s[part(at)] + b[part(at)]
        else:
            y[row, part(at)] = centre(x[row, part(at)], one[0]) * wide(one[1]) * s[part(at)]

    @T.inline
    def body(x, s, b, y):
        for row in over(m):
            one = T.alloc_buffer((2,), "float32", annotations=ON_STACK)
            one[0] = T.float32(0)
            if centred:
                average(x, row, one, 0, same)
            average(x, row, one, 1, square)
            one[1] = vm.rsqrt(one[1] + T.float32(epsilon))
            for j in T.serial(full):
                store(x, s, b, y, row, one, j * width)
            if rest > 0:
                store(x, s, b, y, row, one, n - width)

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
