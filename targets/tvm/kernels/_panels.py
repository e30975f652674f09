"""Blocks of products whose sums stay in registers, and packing of what they go through, on flat buffers.

A matrix is given by a flat buffer, the place of its first value, and the distance of its rows.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.machine import Machine

ON_STACK = {"disable_lower_builtin": True}
"""Annotation of a buffer that LLVM is to keep on the stack, and so in registers, whatever its size."""

HEIGHTS = (4, 1)
"""Rows of the blocks that are used where a whole one does not fit."""


def by_lane(machine: Machine) -> bool:
    """Whether a product takes one lane of a vector, as on NEON, where to spread a value costs as much as a product."""
    return machine.lanes == 4 and machine.registers >= 32


def multiply(machine: Machine) -> Any:
    """A macro that adds `x @ w` to sums, vector `v` of row `i` at `i * vectors + v`.

    Its arguments are the sums (local, height * vectors), x with first value and row distance, w likewise, the number of
    columns of x, and the height and the number of vectors of the block.
    """
    lanes, several = machine.lanes, by_lane(machine)

    def wide_at(vector: Any) -> Any:
        return T.ramp(vector * lanes, 1, lanes)

    @T.inline
    def step(sums, w, w_at, values, each, first, height, vectors):
        for i in T.unroll(height):
            for v in T.unroll(vectors):
                c = T.meta_var(wide_at(i * vectors + v))
                factor = T.meta_var(T.broadcast(values[first + i * each], lanes))
                sums[c] = sums[c] + factor * w[T.ramp(w_at + v * lanes, 1, lanes)]

    @T.inline
    def run(sums, x, x_at, x_row, w, w_at, w_row, k, height, vectors):
        if several:
            some = T.alloc_buffer((height * lanes,), "float32", annotations=ON_STACK)
            for j in T.serial(k // lanes):
                for i in T.unroll(height):
                    some[wide_at(i)] = x[T.ramp(x_at + i * x_row + j * lanes, 1, lanes)]
                for c in T.unroll(lanes):
                    step(sums, w, w_at + (j * lanes + c) * w_row, some, lanes, c, height, vectors)
            for j in T.serial(k % lanes):
                at = T.meta_var(k // lanes * lanes + j)
                step(sums, w, w_at + at * w_row, x, x_row, x_at + at, height, vectors)
        else:
            for j in T.serial(k):
                step(sums, w, w_at + j * w_row, x, x_row, x_at + j, height, vectors)

    return run


def pack_columns(machine: Machine, columns: int) -> Any:
    """A macro that copies a matrix `w` (k, n) into panels of `columns` columns, the last one filled up with zeros.

    Its arguments are the panels with the place of their first value, w with first value and row distance, k, and n.
    """
    lanes = machine.lanes
    vectors = columns // lanes

    @T.inline
    def run(panels, at, w, w_at, w_row, k, n):
        for panel in T.serial(n // columns):
            for j in T.serial(k):
                for v in T.unroll(vectors):
                    panels[T.ramp(at + (panel * k + j) * columns + v * lanes, 1, lanes)] = w[
                        T.ramp(w_at + j * w_row + panel * columns + v * lanes, 1, lanes)
                    ]
        if n % columns != 0:
            for j in T.serial(k):
                for v in T.unroll(vectors):
                    panels[T.ramp(at + (n // columns * k + j) * columns + v * lanes, 1, lanes)] = T.broadcast(
                        T.float32(0), lanes
                    )
                for c in T.serial(n % columns):
                    panels[at + (n // columns * k + j) * columns + c] = w[w_at + j * w_row + n // columns * columns + c]

    return run


def pack_rows(columns: int) -> Any:
    """A macro that packs the transpose of a matrix `w` (n, k), as `pack_columns` would pack the transpose itself."""

    @T.inline
    def run(panels, at, w, w_at, w_row, k, n):
        for panel in T.serial(n // columns):
            for c in T.serial(columns):
                for j in T.serial(k):
                    panels[at + (panel * k + j) * columns + c] = w[w_at + (panel * columns + c) * w_row + j]
        if n % columns != 0:
            for j in T.serial(k):
                for c in T.serial(columns):
                    panels[at + (n // columns * k + j) * columns + c] = T.float32(0)
            for c in T.serial(n % columns):
                for j in T.serial(k):
                    panels[at + (n // columns * k + j) * columns + c] = w[
                        w_at + (n // columns * columns + c) * w_row + j
                    ]

    return run
