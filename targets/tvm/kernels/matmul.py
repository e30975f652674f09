"""Products of two activations."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import gemm
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._panels import ON_STACK, multiply, pack_columns, pack_rows
from onnxcomp.targets.tvm.kernels._rows import spread
from onnxcomp.targets.tvm.machine import Machine

_FEW = 6
"""Rows up to which the second operand is read where it is; for more, it is packed first."""
_CHUNK = 48
"""Rows that go through a panel one after the other: whole blocks of every machine."""


@cache
def matmul(
    machine: Machine,
    *,
    outer: tuple[int | None, ...],
    x_has: tuple[bool, ...],
    w_has: tuple[bool, ...],
    rows: int | None,
    k: int | None,
    n: int | None,
    turned: bool = False,
    alpha: float = 1.0,
) -> Any:
    """Kernel `(x (*some of outer, rows, k), w (*some of outer, k, n), y (*outer, rows, n))`, float32: y = alpha x @ w.

    Args:
        machine: What it is for.
        outer: Sizes of the batch, at least one; None for any.
        x_has: Of which axes of `outer` x has the size; it has 1 of the others.
        w_has: Likewise.
        rows: Rows of x; None for any.
        k: Columns of x; None for any.
        n: Columns of the output; None for any.
        turned: `w` is (*some of outer, n, k).
        alpha: Factor.
    """
    lanes, (high, vectors), columns = machine.lanes, gemm.tile(machine), gemm.width(machine)
    sizes = [tirx.Var(f"size{i}", "int64") if s is None else s for i, s in enumerate(outer)]
    m = tirx.Var("rows", "int64") if rows is None else rows
    depth = tirx.Var("k", "int64") if k is None else k
    width = tirx.Var("n", "int64") if n is None else n
    batch = math.prod(sizes)
    x_sizes = [s if has else 1 for s, has in zip(sizes, x_has, strict=True)]
    w_sizes = [s if has else 1 for s, has in zip(sizes, w_has, strict=True)]
    panels = (width + columns - 1) // columns
    packed = panels * depth * columns
    chunks = (m + _CHUNK - 1) // _CHUNK
    w_row = depth if turned else width
    add = multiply(machine)
    pack = pack_rows(columns) if turned else pack_columns(machine, columns)

    def wide(value: Any) -> Any:
        return T.broadcast(value, lanes)

    def wide_at(vector: Any) -> Any:
        return T.ramp(vector * lanes, 1, lanes)

    @T.inline
    def clear(sums, count):
        for i in T.unroll(count):
            sums[wide_at(i)] = wide(T.float32(0))

    @T.inline
    def block(x, x_at, wp, wp_at, y, y_at, panel, height, whole):
        sums = T.alloc_buffer((height * vectors * lanes,), "float32", annotations=ON_STACK)
        clear(sums, height * vectors)
        add(sums, x, x_at, depth, wp, wp_at + panel * (depth * columns), columns, depth, height, vectors)
        if whole:
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    y[T.ramp(y_at + i * width + panel * columns + v * lanes, 1, lanes)] = sums[
                        wide_at(i * vectors + v)
                    ] * wide(T.float32(alpha))
        else:
            line = T.alloc_buffer((columns,), "float32", annotations=ON_STACK)
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    line[T.ramp(v * lanes, 1, lanes)] = sums[wide_at(i * vectors + v)] * wide(T.float32(alpha))
                for c in T.serial(width % columns):
                    y[y_at + i * width + panel * columns + c] = line[c]

    @T.inline
    def one_panel(x, x_at, wp, wp_at, y, y_at, count, panel, whole):
        """All rows of a chunk, so that the panel is read from the nearest cache."""
        for i in T.serial(count // high):
            block(x, x_at + i * (high * depth), wp, wp_at, y, y_at + i * (high * width), panel, high, whole)
        for i in T.serial(count % high // 4):
            at = count // high * high + i * 4
            block(x, x_at + at * depth, wp, wp_at, y, y_at + at * width, panel, 4, whole)
        for i in T.serial(count % high % 4):
            at = count - count % high % 4 + i
            block(x, x_at + at * depth, wp, wp_at, y, y_at + at * width, panel, 1, whole)

    @T.inline
    def many(x, w, y):
        """Packs every second operand, then takes chunks of rows."""
        wp = T.alloc_buffer((math.prod(w_sizes) * packed,), "float32")
        for b in T.parallel(math.prod(w_sizes)):
            pack(wp, b * packed, w, b * (depth * width), w_row, depth, width)
        for task in T.parallel(batch * chunks):
            row = task % chunks * _CHUNK
            x_at = (spread(task // chunks, sizes, x_has) * m + row) * depth
            wp_at = spread(task // chunks, sizes, w_has) * packed
            y_at = (task // chunks * m + row) * width
            for panel in T.serial(width // columns):
                one_panel(x, x_at, wp, wp_at, y, y_at, T.min(m - row, _CHUNK), panel, True)
            if width % columns != 0:
                one_panel(x, x_at, wp, wp_at, y, y_at, T.min(m - row, _CHUNK), width // columns, False)

    @T.inline
    def one(sums, x, x_at, w, w_at, step):
        """A single value of the output."""
        sums[0] = T.float32(0)
        for j in T.serial(depth):
            sums[0] = sums[0] + x[x_at + j] * w[w_at + j * step]

    @T.inline
    def along_columns(x, x_at, w, w_at, y, y_at, height):
        for panel in T.serial(width // columns):
            sums = T.alloc_buffer((height * vectors * lanes,), "float32", annotations=ON_STACK)
            clear(sums, height * vectors)
            add(sums, x, x_at, depth, w, w_at + panel * columns, width, depth, height, vectors)
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    y[T.ramp(y_at + i * width + panel * columns + v * lanes, 1, lanes)] = sums[
                        wide_at(i * vectors + v)
                    ] * wide(T.float32(alpha))
        for panel in T.serial(width % columns // lanes):
            sums = T.alloc_buffer((height * lanes,), "float32", annotations=ON_STACK)
            at = width // columns * columns + panel * lanes
            clear(sums, height)
            add(sums, x, x_at, depth, w, w_at + at, width, depth, height, 1)
            for i in T.unroll(height):
                y[T.ramp(y_at + i * width + at, 1, lanes)] = sums[wide_at(i)] * wide(T.float32(alpha))
        for c in T.serial(width % lanes):
            single = T.alloc_buffer((1,), "float32", annotations=ON_STACK)
            column = width // lanes * lanes + c
            for i in T.unroll(height):
                one(single, x, x_at + i * depth, w, w_at + column, width)
                y[y_at + i * width + column] = single[0] * T.float32(alpha)

    @T.inline
    def along_rows(x, x_at, w, w_at, y, y_at, height):
        for c in T.serial(width):
            sums = T.alloc_buffer((height * lanes,), "float32", annotations=ON_STACK)
            rest = T.alloc_buffer((height,), "float32", annotations=ON_STACK)
            clear(sums, height)
            for j in T.serial(depth // lanes):
                for i in T.unroll(height):
                    sums[wide_at(i)] = (
                        sums[wide_at(i)]
                        + x[T.ramp(x_at + i * depth + j * lanes, 1, lanes)]
                        * w[T.ramp(w_at + c * depth + j * lanes, 1, lanes)]
                    )
            for i in T.unroll(height):
                rest[i] = vm.total(sums[wide_at(i)])
            for j in T.serial(depth % lanes):
                at = depth // lanes * lanes + j
                for i in T.unroll(height):
                    rest[i] = rest[i] + x[x_at + i * depth + at] * w[w_at + c * depth + at]
            for i in T.unroll(height):
                y[y_at + i * width + c] = rest[i] * T.float32(alpha)

    direct_rows = along_rows if turned else along_columns

    @T.inline
    def few(x, w, y):
        for b in T.parallel(batch):
            x_at = spread(b, sizes, x_has) * (m * depth)
            w_at = spread(b, sizes, w_has) * (depth * width)
            y_at = b * (m * width)
            for i in T.serial(m // 4):
                direct_rows(x, x_at + i * (4 * depth), w, w_at, y, y_at + i * (4 * width), 4)
            if rows is None:
                for i in T.serial(m % 4):
                    at = m // 4 * 4 + i
                    direct_rows(x, x_at + at * depth, w, w_at, y, y_at + at * width, 1)
            elif rows % 4 > 0:
                at = rows // 4 * 4
                direct_rows(x, x_at + at * depth, w, w_at, y, y_at + at * width, rows % 4)

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_given = T.match_buffer(x_, (*x_sizes, m, depth), "float32")
        w_given = T.match_buffer(w_, (*w_sizes, width, depth) if turned else (*w_sizes, depth, width), "float32")
        y_given = T.match_buffer(y_, (*sizes, m, width), "float32")
        x = T.decl_buffer((math.prod(x_sizes) * m * depth,), "float32", data=x_given.data)
        w = T.decl_buffer((math.prod(w_sizes) * depth * width,), "float32", data=w_given.data)
        y = T.decl_buffer((batch * m * width,), "float32", data=y_given.data)
        if rows is None:
            if m <= _FEW:
                few(x, w, y)
            else:
                many(x, w, y)
        elif rows <= _FEW:
            few(x, w, y)
        else:
            many(x, w, y)

    return kernel
