"""Float32 products with a constant matrix, and rows of such a matrix."""

from __future__ import annotations

import math

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.convert._epilogue import epilogue


def gemm(call: Call) -> Expr:
    """`Gemm(x (..., K), weight, bias[, residual (..., N)])`, attribute `n` and those of an epilogue."""
    x, weight, bias = call.inputs[:3]
    *leading, k = call.shape(0)
    n = int(call.attributes["n"])
    rows = math.prod(leading)
    end = epilogue(call, residual=len(call.inputs) > 3)
    fixed = rows if isinstance(rows, int) else None
    function = call.kernels("gemm").gemm(call.machine, rows=fixed, k=k, n=n, epilogue=end)
    flat = [call.reshaped(x, (rows, k)), weight, bias]
    if end.residual:
        flat.append(call.reshaped(call.inputs[3], (rows, n)))
    return call.reshaped(call.tir(function, flat, shape=(rows, n), dtype="float32"), (*leading, n))


def table_rows(call: Call) -> Expr:
    """`TableRows(table, indices (...))`: the table is the weight of a `Gemm` with `n` outputs, indices are of these."""
    table, indices = call.inputs
    k, n = call.shape(0)[1], int(call.attributes["n"])
    leading = call.shape(1)
    rows = math.prod(leading)
    fixed = rows if isinstance(rows, int) else None
    function = call.kernels("table").table_rows(call.machine, rows=fixed, k=k, n=n, dtype=call.dtype(1))
    found = call.tir(function, [table, call.reshaped(indices, (rows,))], shape=(rows, k), dtype="float32")
    return call.reshaped(found, (*leading, k))


CONVERTERS: dict[str, Converter] = {"Gemm": gemm, "TableRows": table_rows}
"""Op type to its converter."""
