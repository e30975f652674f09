"""Products of many rows with a weight that lies as sparse kernels want it: a panel of columns at a time made floats."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.machine import Machine

VECTORS = 2
"""Vectors of a panel."""

_HEIGHT = 6
"""Rows whose sums stay in registers."""

FEWEST_ROWS = {"float32": 8, "int8": 40, "int4": 40}
"""Rows from which on all of the weight is multiplied, by its type: so many rows together leave out little. As measured
with half of the inputs dropped."""


def panel_product(machine: Machine, k: int, n: int) -> Any:
    """A macro `(x (rows, K), panel (K, columns), y (rows, N), rows, index of the panel)` that fills columns of y."""
    lanes, wide = machine.lanes, VECTORS * machine.lanes

    @T.inline
    def block(x, panel, y, row, first, filled, height):
        sums = T.alloc_buffer((height * wide,), "float32")
        for i in T.unroll(height * VECTORS):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for j in T.serial(k):
            for i in T.unroll(height):
                for v in T.unroll(VECTORS):
                    c = T.meta_var(T.ramp(i * wide + v * lanes, 1, lanes))
                    sums[c] = sums[c] + T.broadcast(x[row + i, j], lanes) * panel[j, T.ramp(v * lanes, 1, lanes)]
        if filled == wide:
            for i in T.unroll(height):
                for v in T.unroll(VECTORS):
                    c = T.meta_var(T.ramp(i * wide + v * lanes, 1, lanes))
                    y[row + i, T.ramp(first + v * lanes, 1, lanes)] = sums[c]
        else:
            for i in T.serial(height):
                for c in T.serial(filled):
                    y[row + i, first + c] = sums[i * wide + c]

    @T.inline
    def product(x, panel, y, m, p):
        first: T.let = p * wide
        filled: T.let = T.min(wide, n - first)
        for i in T.serial(m // _HEIGHT):
            block(x, panel, y, i * _HEIGHT, first, filled, _HEIGHT)
        for i in T.serial(m % _HEIGHT):
            block(x, panel, y, m // _HEIGHT * _HEIGHT + i, first, filled, 1)

    return product


def scatter() -> Any:
    """A macro `(values, places, counts, x (rows, K), rows, K)` that fills x with what lists hold, and zeros."""

    @T.inline
    def fill(values, places, counts, x, m, k):
        for row in T.serial(m):
            for i in T.serial(k):
                x[row, i] = T.float32(0)
            for i in T.serial(counts[row]):
                x[row, places[row, i]] = values[row, i]

    return fill
