"""Rows of a table that is the weight of a product as well, and lies in panels for it."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels.gemm import packed_shape
from onnxcomp.targets.tvm.machine import Machine


@cache
def table_rows(machine: Machine, *, rows: int | None, k: int, n: int, dtype: str) -> Any:
    """Kernel `(table, indices (rows,), y (rows, K))`.

    The table, float32 (N, K), lies as `gemm.pack` packs its transpose.

    Args:
        machine: What it is for.
        rows: Indices; None for any number.
        k: Length of a row of the table.
        n: Rows of the table.
        dtype: Of the indices, which count from the end if they are negative.
    """
    panels, _, columns = packed_shape(machine, k, n)
    m = tirx.Var("rows", "int64") if rows is None else rows

    @T.prim_func
    def kernel(t_: T.handle, i_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        table = T.match_buffer(t_, (panels, k, columns), "float32")
        indices = T.match_buffer(i_, (m,), dtype)
        y = T.match_buffer(y_, (m, k), "float32")
        for i in T.serial(m):
            index: T.let = T.Cast("int64", indices[i])
            place: T.let = T.min(T.max(T.Select(index < 0, index + n, index), 0), n - 1)
            for j in T.serial(k):
                y[i, j] = table[place // columns, j, place % columns]

    return kernel
