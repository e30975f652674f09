"""Products of many rows with a weight that lies as sparse kernels want it.

Bound by arithmetic: a block makes 64 x 64 sums, each thread 8 x 4 of them in registers, from rows and weights in shared
memory, where weights are floats already. While one step of K is multiplied, the next is on its way.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._launch import resident

FEWEST_ROWS = {"float32": 16, "int8": 48, "int4": 64}
"""Rows from which on all of the weight is multiplied, by its type: where reading half of it for each row, from a cache
in part, takes as long as multiplying all of it. Reckoned, not measured."""

EIGHT = 8
"""Columns of a row of the weight that a thread brings to shared memory in a step."""

_TILE = 64
_THREADS = 128
_BLOCKS = 4
"""Blocks that a multiprocessor has registers for."""

_STEP = 16
_HIGH, _WIDE = 8, 4
_STRIDE = _TILE + 4
"""Of rows in shared memory: what a thread writes by column is not all in one bank."""


def many_rows(k: int, n: int, bring: Any, store: Any) -> Any:
    """A macro `(values, places, counts, w, scale, zero, y, rows)` for rows that are given as lists.

    Args:
        k: Inputs.
        n: Outputs.
        bring: Macro `(read, w, scale, zero, row of the weight, first column)` that makes floats of eight columns; the
            row is one of the weight, and columns beyond the last may be asked for.
        store: Macro `(y, row, column, sum, scale)`.
    """
    steps = -(-k // _STEP)
    padded, columns = steps * _STEP, -(-n // _TILE)

    @T.inline
    def scatter(values, places, counts, x, m):
        for row in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(2 * _THREADS, thread="threadIdx.x"):
                if row < m:
                    for i in T.serial((padded + 2 * _THREADS - 1) // (2 * _THREADS)):
                        if i * (2 * _THREADS) + thread < padded:
                            x[row, i * (2 * _THREADS) + thread] = T.float32(0)
                    T.tvm_storage_sync("shared")  # it orders what the block's threads write to global memory too
                    for i in T.serial((counts[row] + 2 * _THREADS - 1) // (2 * _THREADS)):
                        if i * (2 * _THREADS) + thread < counts[row]:
                            x[row, places[row, i * (2 * _THREADS) + thread]] = values[row, i * (2 * _THREADS) + thread]

    @T.inline
    def fetch(x, w, scale, zero, of_x, of_w, high, column, step, thread, m):
        for i in T.unroll(2):
            row: T.let = high + (i * _THREADS + thread) // 4
            for j in T.unroll(4):
                of_x[i * 4 + j] = T.float32(0)
            if row < m and step < steps:
                of_x[T.ramp(i * 4, 1, 4)] = x[row, T.ramp(step * _STEP + thread % 4 * 4, 1, 4)]
        for j in T.unroll(EIGHT):
            of_w[j] = T.float32(0)
        if step * _STEP + thread // EIGHT < k:
            bring(of_w, w, scale, zero, step * _STEP + thread // EIGHT, column + thread % EIGHT * EIGHT)

    @T.inline
    def put(xs, ws, of_x, of_w, thread):
        for i in T.unroll(2):
            for j in T.unroll(4):
                xs[(thread % 4 * 4 + j) * _STRIDE + (i * _THREADS + thread) // 4] = of_x[i * 4 + j]
        for j in T.unroll(2):
            at: T.let = thread // EIGHT * _TILE + thread % EIGHT * EIGHT + j * 4
            ws[T.ramp(at, 1, 4)] = of_w[T.ramp(j * 4, 1, 4)]

    @T.inline
    def multiply(xs, ws, sums, thread):
        a = T.alloc_buffer((_HIGH,), "float32", scope="local")
        b = T.alloc_buffer((_WIDE,), "float32", scope="local")
        for j in T.unroll(_STEP):
            for i in T.unroll(_HIGH // 4):
                at: T.let = j * _STRIDE + thread // (_TILE // _WIDE) * _HIGH + i * 4
                a[T.ramp(i * 4, 1, 4)] = xs[T.ramp(at, 1, 4)]
            b[T.ramp(0, 1, 4)] = ws[T.ramp(j * _TILE + thread % (_TILE // _WIDE) * _WIDE, 1, 4)]
            for i in T.unroll(_HIGH):
                for c in T.unroll(_WIDE):
                    sums[i * _WIDE + c] = sums[i * _WIDE + c] + a[i] * b[c]

    @T.inline
    def body(values, places, counts, w, scale, zero, y, m):
        x = T.alloc_buffer((T.max(m, 1), padded), "float32")
        scatter(values, places, counts, x, m)
        for tile in T.thread_binding(columns, thread="blockIdx.x"):
            for band in T.thread_binding(T.max((m + _TILE - 1) // _TILE, 1), thread="blockIdx.y"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with resident(_BLOCKS):
                        # Two each: TVM's own barriers would stand between a half and the other of one.
                        xs = T.alloc_buffer((_STEP * _STRIDE,), "float32", scope="shared")
                        ws = T.alloc_buffer((_STEP * _TILE,), "float32", scope="shared")
                        xs_ = T.alloc_buffer((_STEP * _STRIDE,), "float32", scope="shared")
                        ws_ = T.alloc_buffer((_STEP * _TILE,), "float32", scope="shared")
                        of_x = T.alloc_buffer((8,), "float32", scope="local")
                        of_w = T.alloc_buffer((EIGHT,), "float32", scope="local")
                        sums = T.alloc_buffer((_HIGH * _WIDE,), "float32", scope="local")
                        for i in T.unroll(_HIGH * _WIDE):
                            sums[i] = T.float32(0)
                        fetch(x, w, scale, zero, of_x, of_w, band * _TILE, tile * _TILE, 0, thread, m)
                        put(xs, ws, of_x, of_w, thread)
                        T.tvm_storage_sync("shared")
                        for i in T.serial(steps // 2):
                            fetch(x, w, scale, zero, of_x, of_w, band * _TILE, tile * _TILE, i * 2 + 1, thread, m)
                            multiply(xs, ws, sums, thread)
                            put(xs_, ws_, of_x, of_w, thread)
                            T.tvm_storage_sync("shared")
                            fetch(x, w, scale, zero, of_x, of_w, band * _TILE, tile * _TILE, i * 2 + 2, thread, m)
                            multiply(xs_, ws_, sums, thread)
                            put(xs, ws, of_x, of_w, thread)
                            T.tvm_storage_sync("shared")
                        if steps % 2 == 1:
                            multiply(xs, ws, sums, thread)
                        for i in T.unroll(_HIGH):
                            for c in T.unroll(_WIDE):
                                row: T.let = band * _TILE + thread // (_TILE // _WIDE) * _HIGH + i
                                column: T.let = tile * _TILE + thread % (_TILE // _WIDE) * _WIDE + c
                                if row < m and column < n:
                                    store(y, row, column, sums[i * _WIDE + c], scale)

    return body
