"""Products of two activations.

Few rows are bound by the memory that the second operand comes from: lanes beside one another read values beside one
another, along its rows or, turned, along its columns. More rows go by tiles. Where blocks are too few, they share the
inner dimension too, and a second launch adds up their sums.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._tile import Tile, choose, sums_of
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside, zeros
from onnxcomp.targets.tvm.gpu.kernels._warp import add_lanes, exchanged
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels._rows import spread

_FEW = 8
"""Rows up to which a product is bound by memory."""

_THREADS = 256
_UNDER_WAY = 4
"""Values or vectors of the second operand that a thread loads before it uses the first."""

_PART = 512
"""Rows of the second operand that a block takes where their number is not known."""

_ANY = Tile(rows=64, columns=64, high=8, wide=4, depth=8)
"""Tile of products of sizes that are not known."""

_PARTS = 64
"""Parts of the inner dimension at most."""


@cache
def matmul(
    machine: Gpu,
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
    sizes = [tirx.Var(f"size{i}", "int64") if s is None else s for i, s in enumerate(outer)]
    m = tirx.Var("rows", "int64") if rows is None else rows
    depth = tirx.Var("k", "int64") if k is None else k
    width = tirx.Var("n", "int64") if n is None else n
    batch = math.prod(sizes)
    x_sizes = [s if has else 1 for s, has in zip(sizes, x_has, strict=True)]
    w_sizes = [s if has else 1 for s, has in zip(sizes, w_has, strict=True)]
    likely_batch = math.prod(s or 1 for s in outer)
    k_lanes = 4 if k is not None and k % 4 == 0 else 1
    n_lanes = 4 if n is not None and n % 4 == 0 else 1
    w_row = depth if turned else width

    @T.inline
    def add_up(parts, y, count):
        """The launch that adds up `count` parts of each value of the output."""
        for block in T.thread_binding((batch * m * width + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < batch * m * width:
                    one = T.alloc_buffer((1,), "float32", scope="local")
                    one[0] = T.float32(0)
                    for part in T.serial(count):
                        one[0] = one[0] + parts[part * (batch * m * width) + i]
                    y[i] = one[0] * T.float32(alpha)

    @T.inline
    def starts(places, b, part):
        """First rows of the operands of a product of the batch, and of a part of its sums.

        They are read from registers, so that TVM does not try to find out what part of the sums is used.
        """
        places[0] = spread(b, sizes, x_has) * m
        places[1] = spread(b, sizes, w_has) * (width if turned else depth)
        places[2] = (part * batch + b) * m

    def along_columns(height: int) -> Any:
        """Macro `(x, w, y)`: a thread goes down columns of w beside one another; threads below it take other rows."""
        side = 16 if n_lanes == 4 else WARP
        columns = side * n_lanes
        down, warps = _THREADS // side, _THREADS // WARP
        across = (width + columns - 1) // columns
        if k is not None and n is not None:
            tasks = likely_batch * max(across, 1)
            wanted = max(1, min(2 * machine.multiprocessors // tasks, k // (2 * _UNDER_WAY * down), _PARTS))
            length = max(-(-k // (wanted * down)), 1) * down
        else:
            length = _PART if k is None else max(k, 1)
        parts = T.max((depth + length - 1) // length, 1) if k is None else max(-(-k // length), 1)
        single = k is not None and parts == 1
        turns = -(-length // (down * _UNDER_WAY))

        @T.inline
        def sum_rows(x, w, sums, places, column, first, slot):
            held = T.alloc_buffer((_UNDER_WAY * n_lanes,), "float32", scope="local")
            for turn in T.serial(turns):
                for u in T.unroll(_UNDER_WAY):
                    j: T.let = first + (turn * _UNDER_WAY + u) * down + slot
                    if (turn * _UNDER_WAY + u) * down + slot < length and j < depth and column < width:
                        held[beside(u * n_lanes, n_lanes)] = w[places[1] + j, beside(column, n_lanes)]
                    else:
                        held[beside(u * n_lanes, n_lanes)] = zeros(n_lanes)
                for u in T.unroll(_UNDER_WAY):
                    j_: T.let = first + (turn * _UNDER_WAY + u) * down + slot
                    if (turn * _UNDER_WAY + u) * down + slot < length and j_ < depth:
                        for i in T.unroll(height):
                            left: T.let = x[places[0] + T.min(i, m - 1), j_]
                            for e in T.unroll(n_lanes):
                                sums[i * n_lanes + e] = sums[i * n_lanes + e] + left * held[u * n_lanes + e]
            for i in T.unroll(height * n_lanes):
                for level in T.unroll((WARP // side).bit_length() - 1):
                    sums[i] = sums[i] + exchanged(sums[i], WARP // 2 >> level)

        @T.inline
        def one_block(x, w, y, b, panel, part, thread, to):
            shared = T.alloc_buffer((warps * height * columns,), "float32", scope="shared")
            sums = T.alloc_buffer((height * n_lanes,), "float32", scope="local")
            places = T.alloc_buffer((3,), "int64", scope="local")
            starts(places, b, part)
            for i in T.unroll(height * n_lanes):
                sums[i] = T.float32(0)
            sum_rows(x, w, sums, places, panel * columns + thread % side * n_lanes, part * length, thread // side)
            if thread % WARP < side:
                for i in T.unroll(height):
                    for e in T.unroll(n_lanes):
                        shared[(thread // WARP * height + i) * columns + thread % side * n_lanes + e] = sums[
                            i * n_lanes + e
                        ]
            T.tvm_storage_sync("shared")
            for turn in T.unroll(-(-height * columns // _THREADS)):
                at: T.let = turn * _THREADS + thread
                column: T.let = panel * columns + at % columns
                row: T.let = T.cast(at // columns, "int64")
                if at < height * columns and row < m and column < width:
                    one = T.alloc_buffer((1,), "float32", scope="local")
                    one[0] = T.float32(0)
                    for warp in T.unroll(warps):
                        one[0] = one[0] + shared[warp * (height * columns) + at]
                    if single:
                        y[(places[2] + row) * width + column] = one[0] * T.float32(alpha)
                    else:
                        to[(places[2] + row) * width + column] = one[0]

        @T.inline
        def launch(x, w, y, to):
            for block in T.thread_binding(parts * batch * across, thread="blockIdx.x"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    b: T.let = T.truncmod(T.truncdiv(block, across), batch)
                    part: T.let = T.truncdiv(block, across * batch)
                    one_block(x, w, y, b, T.truncmod(block, across), part, thread, to)

        @T.inline
        def run(x, w, y):
            if single:
                launch(x, w, y, y)
            else:
                # Of no more rows than this may have: TVM makes it before it looks how many there are.
                to = T.alloc_buffer((parts * (batch * T.min(m, height) * width),), "float32")
                launch(x, w, y, to)
                add_up(to, y, parts)

        return run

    def along_rows(height: int) -> Any:
        """Macro `(x, w, y)`: lanes take values of one row of w, a column of the output."""
        team = WARP if k is None else min(WARP, 1 << (max(-(-k // k_lanes), 1) - 1).bit_length())
        teams = _THREADS // team
        step = team * k_lanes

        @T.inline
        def sum_columns(x, w, sums, places, column, lane):
            held = T.alloc_buffer((_UNDER_WAY * k_lanes,), "float32", scope="local")
            left = T.alloc_buffer((k_lanes,), "float32", scope="local")
            for turn in T.serial((depth + step * _UNDER_WAY - 1) // (step * _UNDER_WAY)):
                for u in T.unroll(_UNDER_WAY):
                    j: T.let = (turn * _UNDER_WAY + u) * step + lane * k_lanes
                    if j < depth and column < width:
                        held[beside(u * k_lanes, k_lanes)] = w[places[1] + column, beside(j, k_lanes)]
                    else:
                        held[beside(u * k_lanes, k_lanes)] = zeros(k_lanes)
                for u in T.unroll(_UNDER_WAY):
                    j_: T.let = (turn * _UNDER_WAY + u) * step + lane * k_lanes
                    if j_ < depth:
                        for i in T.unroll(height):
                            left[beside(0, k_lanes)] = x[places[0] + T.min(i, m - 1), beside(j_, k_lanes)]
                            for e in T.unroll(k_lanes):
                                sums[i] = sums[i] + left[e] * held[u * k_lanes + e]

        @T.inline
        def run(x, w, y):
            blocks = T.meta_var((width + teams - 1) // teams)
            for block in T.thread_binding(batch * blocks, thread="blockIdx.x"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    sums = T.alloc_buffer((height,), "float32", scope="local")
                    places = T.alloc_buffer((3,), "int64", scope="local")
                    b: T.let = T.truncdiv(block, blocks)
                    column: T.let = T.truncmod(block, blocks) * teams + thread // team
                    starts(places, b, 0)
                    for i in T.unroll(height):
                        sums[i] = T.float32(0)
                    sum_columns(x, w, sums, places, column, thread % team)
                    for i in T.unroll(height):
                        add_lanes(sums, i, team)
                        if thread % team == 0 and T.cast(i, "int64") < m and column < width:
                            y[(places[2] + i) * width + column] = sums[i] * T.float32(alpha)

        return run

    def tiles() -> Any:
        """Macro `(x, w, y)`."""
        if rows is None or n is None or k is None:
            tile, parts, length = _ANY, 1, 0
            pairs = (depth + 2 * tile.depth - 1) // (2 * tile.depth)
        else:
            tile, length = choose(machine, rows, max(k, 1), max(n, 1), likely_batch, _PARTS)
            parts, pairs = max(-(-k // length), 1), length // (2 * tile.depth)
        down, across = (m + tile.rows - 1) // tile.rows, (width + tile.columns - 1) // tile.columns

        def w_at(w: Any, places: Any, j: Any, column: Any, lanes: int) -> Any:
            return w[places[1] + column, j] if turned else w[places[1] + j, beside(column, lanes)]

        def end_of(begin: Any) -> Any:
            return depth if parts == 1 else T.min(begin + length, depth)

        add = sums_of(
            tile,
            x_lanes=k_lanes,
            w_lanes=1 if turned else n_lanes,
            x_at=lambda places, row, j: (places[0] + row, j),
            x_inside=lambda places, row, j: row < m,
            w_at=w_at,
            w_inside=lambda column: column < width,
        )

        @T.inline
        def one_block(x, w, y, b, row, column, part, thread, to):
            sums = T.alloc_buffer((tile.high * tile.wide,), "float32", scope="local")
            places = T.alloc_buffer((3,), "int64", scope="local")
            begin: T.let = part * length
            starts(places, b, part)
            add(x, w, sums, thread, places, row, column, begin, end_of(begin), pairs)
            for i in T.unroll(tile.high):
                for j in T.unroll(tile.wide):
                    line: T.let = row + tile.row(thread, i)
                    place: T.let = column + tile.column(thread, j)
                    if line < m and place < width:
                        if parts > 1:
                            to[(places[2] + line) * width + place] = sums[i * tile.wide + j]
                        else:
                            y[(places[2] + line) * width + place] = sums[i * tile.wide + j] * T.float32(alpha)

        @T.inline
        def launch(x, w, y, to):
            for block in T.thread_binding(parts * batch * down * across, thread="blockIdx.x"):
                for thread in T.thread_binding(tile.threads, thread="threadIdx.x"):
                    column: T.let = T.truncmod(block, across) * tile.columns
                    row: T.let = T.truncmod(T.truncdiv(block, across), down) * tile.rows
                    b: T.let = T.truncmod(T.truncdiv(block, across * down), batch)
                    one_block(x, w, y, b, row, column, T.truncdiv(block, across * down * batch), thread, to)

        @T.inline
        def run(x, w, y):
            if parts > 1:
                to = T.alloc_buffer((parts * (batch * m * width),), "float32")
                launch(x, w, y, to)
                add_up(to, y, parts)
            else:
                launch(x, w, y, y)

        return run

    few = along_rows if turned else along_columns
    if rows is None:
        one, some, many = few(1), few(_FEW), tiles()
    else:
        one = some = many = few(rows) if rows <= _FEW else tiles()

    @T.inline
    def body(x, w, y):
        if rows is None:
            if m == 1:
                one(x, w, y)
            elif m <= _FEW:
                some(x, w, y)
            else:
                many(x, w, y)
        else:
            many(x, w, y)

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_given = T.match_buffer(x_, (*x_sizes, m, depth), "float32")
        w_given = T.match_buffer(w_, (*w_sizes, width, depth) if turned else (*w_sizes, depth, width), "float32")
        y_given = T.match_buffer(y_, (*sizes, m, width), "float32")
        x = T.decl_buffer((math.prod(x_sizes) * m, depth), "float32", data=x_given.data)
        w = T.decl_buffer((math.prod(w_sizes) * (width if turned else depth), w_row), "float32", data=w_given.data)
        y = T.decl_buffer((batch * m * width,), "float32", data=y_given.data)
        if batch * m * width > 0:
            body(x, w, y)

    return kernel
