"""Activations of whole tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.convert._epilogue import epilogue


def activate(call: Call) -> Expr:
    """`Activate(x)`, with the attributes of an epilogue."""
    shape = call.shape(0)
    size = math.prod(shape)
    fixed = size if isinstance(size, int) else None
    function = call.kernels("elementwise").activation(call.machine, size=fixed, epilogue=epilogue(call, residual=False))
    flat = call.reshaped(call.inputs[0], (size,))
    return call.reshaped(call.tir(function, [flat], shape=(size,), dtype="float32"), shape)


CONVERTERS: Mapping[str, Converter] = {"Activate": activate}
"""Op types that are converted here."""
