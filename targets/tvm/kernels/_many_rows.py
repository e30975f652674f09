"""Products of many rows with a weight that lies as sparse kernels want it: a panel of columns at a time made floats."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._panels import ON_STACK
from onnxcomp.targets.tvm.machine import Machine

VECTORS = 2
"""Vectors of a panel."""

DEPTH = 128
"""Inputs whose part of a panel is made floats at once, so that it stays in the first-level cache."""

AHEAD = 32
"""Rows of the weight until the one that is asked for."""

_APART = 16
"""Values between rows of activations: rows a power of two apart would share places in the first-level cache."""

FEWEST_ROWS = {"float32": 8, "int8": 32, "int4": 28}
"""Rows from which on all of the weight is multiplied, by its type: so many rows together leave out little. As measured
with half of the inputs dropped."""


def panel_product(machine: Machine, n: int) -> Any:
    """A macro `(x, panel (DEPTH, columns), y (rows, N), rows, index of the panel, first input, inputs)`.

    It adds to the panel's columns of y, or fills them if the first input is 0; x is as by `scatter`.
    """
    lanes, wide = machine.lanes, VECTORS * machine.lanes
    high = 12 if machine.registers >= 32 else 6

    @T.inline
    def block(x, panel, y, row, first, filled, start, count, height):
        sums = T.alloc_buffer((height * wide,), "float32", annotations=ON_STACK)
        for i in T.unroll(height * VECTORS):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for j in T.serial(count):
            for i in T.unroll(height):
                for v in T.unroll(VECTORS):
                    c = T.meta_var(T.ramp(i * wide + v * lanes, 1, lanes))
                    factor = T.meta_var(T.broadcast(x[row + i, start + j], lanes))
                    sums[c] = sums[c] + factor * panel[j, T.ramp(v * lanes, 1, lanes)]
        if filled == wide:
            for i in T.unroll(height):
                for v in T.unroll(VECTORS):
                    c = T.meta_var(T.ramp(i * wide + v * lanes, 1, lanes))
                    to = T.meta_var(T.ramp(first + v * lanes, 1, lanes))
                    if start > 0:
                        sums[c] = sums[c] + y[row + i, to]
                    y[row + i, to] = sums[c]
        else:
            line = T.alloc_buffer((wide,), "float32", annotations=ON_STACK)
            for i in T.unroll(height):
                for v in T.unroll(VECTORS):
                    line[T.ramp(v * lanes, 1, lanes)] = sums[T.ramp(i * wide + v * lanes, 1, lanes)]
                for c in T.serial(filled):
                    y[row + i, first + c] = line[c] + T.if_then_else(start > 0, y[row + i, first + c], T.float32(0))

    @T.inline
    def product(x, panel, y, m, p, start, count):
        first: T.let = p * wide
        filled: T.let = T.min(wide, n - first)
        for i in T.serial(m // high):
            block(x, panel, y, i * high, first, filled, start, count, high)
        for i in T.serial(m % high // 4):
            block(x, panel, y, m // high * high + i * 4, first, filled, start, count, 4)
        for i in T.serial(m % high % 4):
            block(x, panel, y, m - m % high % 4 + i, first, filled, start, count, 1)

    return product


def across(k: int) -> int:
    """Values of a row of activations, with what keeps rows apart."""
    return k + _APART


def scatter() -> Any:
    """A macro `(values, places, counts, x (rows, across(K)), rows, K)` that fills x with what lists hold, and zeros."""

    @T.inline
    def fill(values, places, counts, x, m, k):
        for row in T.serial(m):
            for i in T.serial(k):
                x[row, i] = T.float32(0)
            for i in T.serial(counts[row]):
                x[row, places[row, i]] = values[row, i]

    return fill
