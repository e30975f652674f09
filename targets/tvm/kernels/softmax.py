"""Softmax over the last axis, with scale and additive mask."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._panels import ON_STACK
from onnxcomp.targets.tvm.kernels._rows import over_rows, spread
from onnxcomp.targets.tvm.machine import Machine


@cache
def softmax(
    machine: Machine,
    *,
    outer: tuple[int | None, ...],
    n: int | None,
    mask: tuple[bool, ...] | None = None,
    scale: float = 1.0,
) -> Any:
    """Softmax of `x * scale + mask`.

    The kernel is `(x (*outer, n)[, mask (*some of outer, n)], y (*outer, n))`, all float32.

    Args:
        machine: What it is for.
        outer: Sizes before the last axis, at least one; None for any.
        n: Length of a row; None for any.
        mask: Of which axes of `outer` the mask has the size, where it has 1 of the others; None if there is none.
        scale: Factor, above zero.
    """
    lanes = machine.lanes
    sizes = [tirx.Var(f"size{i}", "int64") if s is None else s for i, s in enumerate(outer)]
    rows = math.prod(sizes)
    length = tirx.Var("n", "int64") if n is None else n
    masked = mask is not None
    mask_rows = math.prod(s for s, has in zip(sizes, mask or (), strict=False) if has)
    rest = length % lanes
    over = over_rows(rows, length)

    def score(x: Any, m: Any, row: Any, mask_row: Any, at: Any) -> Any:
        return x[row, at] * vm.like(x[row, at], scale) + m[mask_row, at] if masked else x[row, at]

    def power(value: Any, top: Any) -> Any:
        """Of a score; what is not masked is not scaled yet."""
        away = value - (T.broadcast(top, lanes) if value.ty.dtype.lanes > 1 else top)
        return vm.exp(away if masked or scale == 1 else away * vm.like(value, scale))

    def wide_at(vector: Any) -> Any:
        return T.ramp(vector * lanes, 1, lanes)

    @T.inline
    def by_vectors(x, m, y, row, mask_row):
        kept = T.alloc_buffer((3 * lanes,), "float32", annotations=ON_STACK)
        one = T.alloc_buffer((2,), "float32", annotations=ON_STACK)
        kept[wide_at(0)] = T.broadcast(T.float32(-math.inf), lanes)
        for j in T.serial(length // lanes):
            kept[wide_at(1)] = score(x, m, row, mask_row, T.ramp(j * lanes, 1, lanes))
            kept[wide_at(0)] = T.max(kept[wide_at(0)], kept[wide_at(1)])
            if masked:
                y[row, T.ramp(j * lanes, 1, lanes)] = kept[wide_at(1)]
        if rest != 0:
            # The last vector overlaps the one before it.
            kept[wide_at(1)] = score(x, m, row, mask_row, T.ramp(length - lanes, 1, lanes))
            kept[wide_at(0)] = T.max(kept[wide_at(0)], kept[wide_at(1)])
            if masked:
                y[row, T.ramp(length - lanes, 1, lanes)] = kept[wide_at(1)]
        one[0] = vm.largest(kept[wide_at(0)])
        if masked:
            kept[wide_at(1)] = y[row, T.ramp(length - lanes, 1, lanes)]
        else:
            kept[wide_at(1)] = x[row, T.ramp(length - lanes, 1, lanes)]
        kept[wide_at(0)] = T.broadcast(T.float32(0), lanes)
        for j in T.serial(length // lanes):
            if masked:
                kept[wide_at(2)] = power(y[row, T.ramp(j * lanes, 1, lanes)], one[0])
            else:
                kept[wide_at(2)] = power(x[row, T.ramp(j * lanes, 1, lanes)], one[0])
            kept[wide_at(0)] = kept[wide_at(0)] + kept[wide_at(2)]
            y[row, T.ramp(j * lanes, 1, lanes)] = kept[wide_at(2)]
        if rest != 0:
            kept[wide_at(1)] = power(kept[wide_at(1)], one[0])
            y[row, T.ramp(length - lanes, 1, lanes)] = kept[wide_at(1)]
            kept[wide_at(0)] = kept[wide_at(0)] + vm.last(kept[wide_at(1)], rest)
        one[1] = T.float32(1) / vm.total(kept[wide_at(0)])
        kept[wide_at(1)] = y[row, T.ramp(length - lanes, 1, lanes)] * T.broadcast(one[1], lanes)
        for j in T.serial(length // lanes):
            y[row, T.ramp(j * lanes, 1, lanes)] = y[row, T.ramp(j * lanes, 1, lanes)] * T.broadcast(one[1], lanes)
        if rest != 0:
            y[row, T.ramp(length - lanes, 1, lanes)] = kept[wide_at(1)]

    @T.inline
    def by_values(x, m, y, row, mask_row):
        one = T.alloc_buffer((2,), "float32", annotations=ON_STACK)
        one[0] = T.float32(-math.inf)
        one[1] = T.float32(0)
        for j in T.serial(length):
            y[row, j] = score(x, m, row, mask_row, j)
            one[0] = T.max(one[0], y[row, j])
        for j in T.serial(length):
            y[row, j] = power(y[row, j], one[0])
            one[1] = one[1] + y[row, j]
        for j in T.serial(length):
            y[row, j] = y[row, j] / one[1]

    @T.inline
    def one_row(x, m, y, row, mask_row):
        if n is None:
            if length >= lanes:
                by_vectors(x, m, y, row, mask_row)
            else:
                by_values(x, m, y, row, mask_row)
        elif n >= lanes:
            by_vectors(x, m, y, row, mask_row)
        else:
            by_values(x, m, y, row, mask_row)

    if masked:
        mask_shape = [s if has else 1 for s, has in zip(sizes, mask or (), strict=True)]

        @T.prim_func
        def kernel(x_: T.handle, m_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x_given = T.match_buffer(x_, (*sizes, length), "float32")
            m_given = T.match_buffer(m_, (*mask_shape, length), "float32")
            y_given = T.match_buffer(y_, (*sizes, length), "float32")
            x = T.decl_buffer((rows, length), "float32", data=x_given.data)
            m = T.decl_buffer((mask_rows, length), "float32", data=m_given.data)
            y = T.decl_buffer((rows, length), "float32", data=y_given.data)
            for row in over(rows):
                one_row(x, m, y, row, spread(row, sizes, mask or ()))

    else:

        @T.prim_func
        def kernel(x_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x_given = T.match_buffer(x_, (*sizes, length), "float32")
            y_given = T.match_buffer(y_, (*sizes, length), "float32")
            x = T.decl_buffer((rows, length), "float32", data=x_given.data)
            y = T.decl_buffer((rows, length), "float32", data=y_given.data)
            for row in over(rows):
                one_row(x, x, y, row, row)

    return kernel
