"""Sums of rows of a matrix for several rows of activations: what any of them keeps is read and made floats once."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._prefetch import LINE, fetch
from onnxcomp.targets.tvm.machine import Machine

_TOGETHER = 4
"""Rows of the matrix a pass."""

_BLOCK = 1024
"""Columns whose sums, those of four rows of activations, are held at most; also the part that one thread does."""


def joint_rows(machine: Machine, *, k: int, n: int, dtype: str, alone: Any) -> Any:
    """A macro `(values, places, counts, x, w (K, N), scale (N,), y (rows, N), rows)`.

    It fills all rows of y but a last odd one. x, (rows, K or more), float32, is what the lists hold, with zeros.

    Args:
        machine: What it is for.
        k: Inputs.
        n: Outputs.
        dtype: Of the matrix, float32 or int8.
        alone: A macro that fills a row, for rows that keep too few inputs in common.
    """
    lanes, floats = machine.lanes, f"float32x{machine.lanes}"
    step = max(lanes, LINE if dtype == "int8" else LINE // 4)
    steps = n // step
    blocks = max(1, -(-steps * step // _BLOCK))
    size = -(-steps // blocks)
    columns, rest = size * step, n - steps * step
    across = columns + LINE // 4  # sums a page apart would be taken for each other, as they are stored and read again

    # Made floats once, a vector of integers costs as much as three products; a vector of floats is fetched once.
    part_of_all = (5, 3) if dtype == "int8" else (5, 4)

    def bits(x: Any, row: Any, i: Any, height: int) -> Any:
        return reduce(T.bitwise_or, [T.reinterpret("int32", x[row + r, i]) for r in range(height)])

    def kept_by_all(counts: Any, row: Any, height: int) -> Any:
        return reduce(add, [counts[row + r] for r in range(height)])

    @T.inline
    def passes(x, w, part, kept, row, begin, length, count, height):
        for i in T.serial(height * length * (step // lanes)):
            at = T.meta_var(i // (length * (step // lanes)) * across + i % (length * (step // lanes)) * lanes)
            part[T.ramp(at, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for i in T.serial((count + _TOGETHER - 1) // _TOGETHER):
            factor = T.alloc_buffer((height * _TOGETHER,), "float32")
            at = T.alloc_buffer((_TOGETHER,), "int64")
            ahead = T.alloc_buffer((_TOGETHER,), "int64")
            for u in T.unroll(_TOGETHER):
                # A row that is not there is the last one times zero.
                at[u] = T.Cast("int64", kept[T.min(i * _TOGETHER + u, count - 1)])
                ahead[u] = T.Cast("int64", kept[T.min(i * _TOGETHER + _TOGETHER + u, count - 1)])
                for r in T.unroll(height):
                    factor[r * _TOGETHER + u] = T.Select(i * _TOGETHER + u < count, x[row + r, at[u]], T.float32(0))
            for j in T.serial(length):
                for u in T.unroll(_TOGETHER):
                    fetch(w[ahead[u], begin + j * step])
                for v in T.unroll(step // lanes):
                    c = T.meta_var(T.ramp(begin + j * step + v * lanes, 1, lanes))
                    w0: T.let = T.Cast(floats, w[at[0], c])
                    w1: T.let = T.Cast(floats, w[at[1], c])
                    w2: T.let = T.Cast(floats, w[at[2], c])
                    w3: T.let = T.Cast(floats, w[at[3], c])
                    for r in T.unroll(height):
                        to = T.meta_var(T.ramp(r * across + j * step + v * lanes, 1, lanes))
                        part[to] = (
                            part[to]
                            + T.broadcast(factor[r * _TOGETHER], lanes) * w0
                            + T.broadcast(factor[r * _TOGETHER + 1], lanes) * w1
                            + T.broadcast(factor[r * _TOGETHER + 2], lanes) * w2
                            + T.broadcast(factor[r * _TOGETHER + 3], lanes) * w3
                        )

    @T.inline
    def together(x, w, scale, y, kept, count, row, height):
        if steps > 0:
            for b in T.parallel(blocks):
                part = T.alloc_buffer((height * across,), "float32")
                begin: T.let = b * columns
                length: T.let = T.min(size, steps - b * size)
                passes(x, w, part, kept, row, begin, length, count, height)
                for r in T.unroll(height):
                    for j in T.serial(length * (step // lanes)):
                        c = T.meta_var(T.ramp(begin + j * lanes, 1, lanes))
                        y[row + r, c] = part[T.ramp(r * across + j * lanes, 1, lanes)] * scale[c]
        for r in T.serial(height):
            for j in T.serial(rest):
                last = T.alloc_buffer((1,), "float32")
                c = T.meta_var(steps * step + j)
                last[0] = T.float32(0)
                for i in T.serial(count):
                    last[0] = last[0] + x[row + r, kept[i]] * T.Cast("float32", w[kept[i], c])
                y[row + r, c] = last[0] * scale[c]

    @T.inline
    def group(values, places, counts, x, w, scale, y, row, height):
        kept = T.alloc_buffer((k,), "int32")
        found = T.alloc_buffer((1,), "int32")
        found[0] = 0
        for i in T.serial(k):
            kept[found[0]] = T.Cast("int32", i)
            found[0] = found[0] + T.Select(bits(x, row, i, height) != 0, 1, 0)
        count: T.let = found[0]
        if count * part_of_all[0] < kept_by_all(counts, row, height) * part_of_all[1]:
            together(x, w, scale, y, kept, count, row, height)
        else:
            for r in T.serial(height):
                alone(values, places, counts, w, scale, counts, y, y, row + r)

    @T.inline
    def run(values, places, counts, x, w, scale, y, m):
        for i in T.serial(m // 4):
            group(values, places, counts, x, w, scale, y, i * 4, 4)
        for i in T.serial(m % 4 // 2):
            group(values, places, counts, x, w, scale, y, m // 4 * 4 + i * 2, 2)

    return run
