"""Concatenation of two tensors, as a cache grows by what is new."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._rows import over_rows
from onnxcomp.targets.tvm.machine import Machine


@cache
def concat(machine: Machine, *, rows: int | None, first: int | None, second: int | None) -> Any:
    """Kernel `(a (rows, first), b (rows, second), y (rows, first + second))`, float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        first: Columns of a; None for any.
        second: Columns of b; None for any.
    """
    lanes = machine.lanes
    m = tirx.Var("rows", "int64") if rows is None else rows
    left = tirx.Var("first", "int64") if first is None else first
    right = tirx.Var("second", "int64") if second is None else second
    over = over_rows(m, left + right)

    @T.inline
    def copy(y, y_at, x, row, count):
        for j in T.serial(count // lanes):
            y[row, T.ramp(y_at + j * lanes, 1, lanes)] = x[row, T.ramp(j * lanes, 1, lanes)]
        for j in T.serial(count % lanes):
            y[row, y_at + count // lanes * lanes + j] = x[row, count // lanes * lanes + j]

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (m, left), "float32")
        b = T.match_buffer(b_, (m, right), "float32")
        y = T.match_buffer(y_, (m, left + right), "float32")
        for row in over(m):
            copy(y, 0, a, row, left)
            copy(y, left, b, row, right)

    return kernel
