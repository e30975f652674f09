"""Products of float32 activations and a constant matrix, with bias, residual and activation; see `_product`."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dense import Product
from onnxcomp.targets.tvm.gpu.kernels._product import product
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels.gemm import packed_shape, width

_LIKELY = 128
"""Rows of a product of any number of them up to which the inner dimension may be split."""


@cache
def gemm(machine: Gpu, *, rows: int | None, k: int, n: int, epilogue: Epilogue) -> Any:
    """Kernel `(x (rows, K), weight, bias[, residual (rows, N)], y (rows, N))`, all float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        n: Outputs.
        epilogue: What is done to the sums.
    """
    columns, panels = width(machine), packed_shape(machine, k, n)[0]
    m = tirx.Var("rows", "int64") if rows is None else rows
    launches = product(
        Product(
            machine=machine,
            rows=m,
            k=k,
            n=n,
            x_lanes=4 if k % 4 == 0 else 1,
            w_columns=panels * columns,
            x_at=lambda group, row, k: (row, k),
            w_at=lambda w, group, k, column, lanes: w[column // columns, k, beside(column % columns, lanes)],
            y_at=lambda group, row, column: (row, column),
            epilogue=epilogue,
        ),
        _LIKELY,
    )

    if epilogue.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), "float32")
            w = T.match_buffer(w_, (panels, k, columns), "float32")
            b = T.match_buffer(b_, (panels * columns,), "float32")
            r = T.match_buffer(r_, (m, n), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            if m > 0:
                launches(x, w, b, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), "float32")
            w = T.match_buffer(w_, (panels, k, columns), "float32")
            b = T.match_buffer(b_, (panels * columns,), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            if m > 0:
                launches(x, w, b, x, y)

    return kernel
