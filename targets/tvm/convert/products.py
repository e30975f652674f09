"""Float32 products with a constant matrix."""

from __future__ import annotations

import math

from onnxcomp.targets.tvm.convert._call import Call, Expr
from onnxcomp.targets.tvm.convert._epilogue import epilogue
from onnxcomp.targets.tvm.kernels import gemm as kernels


def gemm(call: Call) -> Expr:
    """`Gemm(x (..., K), weight, bias[, residual (..., N)])`, attribute `n` and those of an epilogue."""
    x, weight, bias = call.inputs[:3]
    *leading, k = call.shape(0)
    n = int(call.attributes["n"])
    rows = math.prod(leading)
    end = epilogue(call, residual=len(call.inputs) > 3)
    function = kernels.gemm(call.machine, rows=rows if isinstance(rows, int) else None, k=k, n=n, epilogue=end)
    flat = [call.reshaped(x, (rows, k)), weight, bias]
    if end.residual:
        flat.append(call.reshaped(call.inputs[3], (rows, n)))
    return call.reshaped(call.tir(function, flat, shape=(rows, n), dtype="float32"), (*leading, n))
