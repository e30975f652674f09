"""Float32 products of few rows: bound by memory, of which they read all of a weight."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dense import Product, finish, launched
from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.kernels._warp import exchanged
from onnxcomp.targets.tvm.gpu.machine import WARP

_WARPS = 8
"""Warps of a block that share out the inner dimension."""


def few(p: Product, height: int, most: int | None = None) -> Any:
    """Macro `(x, w, bias, residual, y)`: launches for blocks of few rows, one group.

    Threads beside each other read 16 bytes each of a row of the weight, so that a warp reads runs of 64 bytes or more;
    a thread has 4 rows of the weight on their way, or more. Warps of a block share out the inner dimension, and add
    up their sums by shared memory. Blocks of the same columns run at the same time, so that memory is read once. Narrow
    blocks make enough of them for all multiprocessors; if these are still too few and have much to read, the inner
    dimension is split among blocks.

    Args:
        p: The product.
        height: Rows of a block.
        most: Rows that there are at most where it is launched; see `launched`.
    """
    wanted = 2 * p.machine.multiprocessors
    columns = next((c for c in (64, 32) if -(-p.n // c) >= wanted), 16)
    across = -(-p.n // columns)
    splits = max(1, min(wanted // across, p.k * columns // (16 * 1024)))
    side, down = columns // 4, WARP // (columns // 4)
    stride = _WARPS * down * 4
    steps = p.k // 4 * 4 // (splits * stride)
    rest = splits * steps * stride
    ahead = 2 if height <= 2 else 1
    blocks = 4 if height <= 2 else 3 if height <= 4 else 2

    one = finish(p, 1)

    def row_of(row: Any, i: Any) -> Any:
        whole = isinstance(p.rows, int) and p.rows % height == 0
        return row + i if whole else T.min(row + i, p.rows - 1)

    @T.inline
    def load(x, w, x_next, w_next, row, k, column, count):
        for j in T.unroll(count * 4):
            w_next[beside(j * 4, 4)] = p.w_at(w, 0, k + j // 4 * stride + j % 4, column, 4)
        for j in T.unroll(count):
            for i in T.unroll(height):
                for e in T.unroll(4 // p.x_lanes):
                    place = T.meta_var(p.x_at(0, row_of(row, i), k + j * stride + e * p.x_lanes))
                    x_next[beside((j * height + i) * 4 + e * p.x_lanes, p.x_lanes)] = x[
                        place[0], beside(place[1], p.x_lanes)
                    ]

    @T.inline
    def add(sums, x_next, w_next, count):
        for j in T.unroll(count * 4):
            for i in T.unroll(height):
                for c in T.unroll(4):
                    x_value = T.meta_var(x_next[(j // 4 * height + i) * 4 + j % 4])
                    sums[i * 4 + c] = sums[i * 4 + c] + x_value * w_next[j * 4 + c]

    @T.inline
    def walk(x, w, sums, row, k, column):
        x_next = T.alloc_buffer((ahead * height * 4,), "float32", scope="local")
        w_next = T.alloc_buffer((ahead * 16,), "float32", scope="local")
        for step in T.serial(steps // ahead):
            load(x, w, x_next, w_next, row, k + step * ahead * stride, column, ahead)
            add(sums, x_next, w_next, ahead)
        for step in T.serial(steps % ahead):
            load(x, w, x_next, w_next, row, k + (steps // ahead * ahead + step) * stride, column, 1)
            add(sums, x_next, w_next, 1)

    @T.inline
    def end(x, w, sums, row, k, column):
        w_next = T.alloc_buffer((4,), "float32", scope="local")
        for j in T.unroll(4):
            if k + j < p.k:
                w_next[beside(0, 4)] = p.w_at(w, 0, k + j, column, 4)
                for i in T.unroll(height):
                    place = T.meta_var(p.x_at(0, row_of(row, i), k + j))
                    for c in T.unroll(4):
                        sums[i * 4 + c] = sums[i * 4 + c] + x[place[0], place[1]] * w_next[c]

    @T.inline
    def across_warp(sums):
        for i in T.unroll(height * 4):
            for step in T.unroll(down.bit_length() - 1):
                sums[i] = sums[i] + exchanged(sums[i], side << step)

    @T.inline
    def store(shared, b, r, y, parts, split, row, column, i):
        if T.And(row < p.rows, column < p.n):
            value = T.alloc_buffer((1,), "float32", scope="local")
            value[0] = T.float32(0)
            for warp in T.unroll(_WARPS):
                value[0] = value[0] + shared[warp * height * columns + i]
            if splits > 1:
                parts[split, row, column] = value[0]
            else:
                one(value, 0, b, r, y, 0, row, column)

    @T.inline
    def dot(x, w, b, r, y, parts):
        for band in T.thread_binding((p.rows + height - 1) // height, thread="blockIdx.x"):
            for block in T.thread_binding(across * splits, thread="blockIdx.y"):
                for thread in T.thread_binding(_WARPS * WARP, thread="threadIdx.x"):
                    with resident(blocks):
                        shared = T.alloc_buffer((_WARPS * height * columns,), "float32", scope="shared")
                        sums = T.alloc_buffer((height * 4,), "float32", scope="local")
                        row: T.let = band * height
                        split: T.let = block // across
                        first: T.let = block % across * columns
                        column: T.let = T.min(first + thread % side * 4, p.w_columns - 4)
                        k: T.let = thread // side * 4
                        for i in T.unroll(height * 4):
                            sums[i] = T.float32(0)
                        walk(x, w, sums, row, split * (steps * stride) + k, column)
                        for turn in T.serial(-(-(p.k - rest) // (splits * stride))):
                            end(x, w, sums, row, rest + (turn * splits + split) * stride + k, column)
                        across_warp(sums)
                        if thread % WARP < side:
                            for i in T.unroll(height):
                                place = T.meta_var((thread // WARP * height + i) * columns + thread % side * 4)
                                shared[beside(place, 4)] = sums[beside(i * 4, 4)]
                        T.tvm_storage_sync("shared")
                        for turn in T.serial(-(-height * columns // (_WARPS * WARP))):
                            i: T.let = turn * (_WARPS * WARP) + thread
                            if i < height * columns:
                                store(shared, b, r, y, parts, split, row + i // columns, first + i % columns, i)

    return launched(p, splits, dot, most)
