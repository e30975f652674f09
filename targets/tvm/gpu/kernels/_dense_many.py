"""Float32 products of many rows: bound by arithmetic, cut into tiles."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dense import Product, finish, launched
from onnxcomp.targets.tvm.gpu.kernels._tile import choose, every, sums_of
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside

_SPLITS = 64
"""Parts that an inner dimension is cut into, at most."""


def many(p: Product, likely: int, most: int = _SPLITS, most_rows: int | None = None) -> Any:
    """Macro `(x, w, bias, residual, y)`: launches that compute a product by tiles.

    Args:
        p: The product.
        likely: Rows that the tile is chosen for.
        most: Parts that the inner dimension is cut into, at most.
        most_rows: Rows that there are at most where it is launched; see `launched`.
    """
    tile, length = choose(p.machine, likely, p.k, p.n, p.groups, most)
    splits = -(-p.k // length)
    across = -(-p.n // tile.columns)
    wide = tile.wide
    fixed = isinstance(p.rows, int) and p.rows % tile.rows == 0
    y_lanes = 4 if p.n % 4 == 0 else 1
    end = finish(p, y_lanes)

    def x_inside(group: Any, row: Any, k: Any) -> Any:
        return every(fixed or row < p.rows, p.x_inside is None or p.x_inside(group, row, k))

    def w_inside(column: Any) -> Any:
        return p.w_columns % tile.columns == 0 or column < p.w_columns

    sums_of_tile = sums_of(
        tile,
        x_lanes=p.x_lanes,
        w_lanes=4,
        x_at=p.x_at,
        x_inside=x_inside,
        w_at=p.w_at,
        w_inside=w_inside,
    )

    @T.inline
    def store(sums, b, r, y, parts, split, group, row, column, i, j):
        if splits > 1:
            parts[split, row, beside(group * p.n + column, y_lanes)] = sums[beside(i * wide + j, y_lanes)]
        else:
            end(sums, i * wide + j, b, r, y, group, row, column)

    @T.inline
    def tiles(x, w, b, r, y, parts):
        for block in T.thread_binding((p.rows + tile.rows - 1) // tile.rows * across, thread="blockIdx.x"):
            for part in T.thread_binding(p.groups * splits, thread="blockIdx.y"):
                for thread in T.thread_binding(tile.threads, thread="threadIdx.x"):
                    sums = T.alloc_buffer((tile.high * wide,), "float32", scope="local")
                    row: T.let = block // across * tile.rows
                    column: T.let = block % across * tile.columns
                    group: T.let = part // splits
                    split: T.let = part % splits
                    begin: T.let = split * length
                    end = T.meta_var(T.min(begin + length, p.k))
                    sums_of_tile(x, w, sums, thread, group, row, column, begin, end, length // (2 * tile.depth))
                    for i in T.unroll(tile.high):
                        for j in T.unroll(wide // y_lanes):
                            line = T.meta_var(row + tile.row(thread, i))
                            place = T.meta_var(column + tile.column(thread, j * y_lanes))
                            if T.And(line < p.rows, place < p.n):
                                store(sums, b, r, y, parts, split, group, line, place, i, j * y_lanes)

    return launched(p, splits, tiles, most_rows)
