"""Activations and weights have the types that the target takes."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import PassError
from onnxcomp.metrics import sqnr
from onnxcomp.opset import opset
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_activation
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import reference_runner

INT8, UINT8, INT16, UINT16 = ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16


def quantized(b, capabilities, activations, weights=(INT8,), **options):
    hidden = b.op("Relu", b.op("Gemm", b.input("x", [16, 12]), b.floats(12, 20), b.floats(20)))
    model = b.output(b.op("Gemm", hidden, b.floats(20, 4), b.floats(4), name="last")).model()
    before = model.clone()
    target = dataclasses.replace(capabilities, activation_dtypes=activations, weight_dtypes=weights)
    feed = {"x": np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)}
    Pipeline(passes=[Quantize(**options)], capabilities=target, runner=reference_runner).run(model, [feed])
    names = [model.graph.outputs[0].name]
    (one,), (two,) = (list(reference_runner(m, names)(feed).values()) for m in (before, model))
    last = next(n for n in model.graph if n.name == "last")
    return model, last, sqnr(one, two)


@pytest.mark.parametrize(
    ("given", "bits", "symmetric", "dtype", "least"),
    [
        ((UINT8,), 8, False, UINT8, 30),
        ((INT8,), 8, False, INT8, 30),
        ((INT8,), 8, True, INT8, 30),
        ((INT8,), 4, False, INT8, 12),
        ((INT8, UINT8), 8, False, INT8, 30),
        ((UINT16, UINT8), 8, False, UINT8, 30),
        ((UINT8, UINT16), 16, False, UINT16, 35),
        ((INT16,), 16, True, INT16, 35),
        ((INT16,), 8, False, INT16, 35),
    ],
)
def test_activations(b, capabilities, given, bits, symmetric, dtype, least):
    model, last, found = quantized(b, capabilities, given, activation_bits=bits, symmetric=symmetric)
    tensor = read_activation(last.inputs[0])
    assert ir.DataType.from_numpy(tensor.grid.dtype) == dtype
    assert (opset(model) >= 21) == (dtype.bitwidth == 16)
    assert found > least


def test_unsigned_weights(b, capabilities):
    _, last, found = quantized(b, capabilities, (UINT8,), (UINT8,))
    integers, _, zero_point = (ir.convenience.get_const_tensor(v) for v in last.inputs[1].producer().inputs)
    assert integers.dtype == UINT8
    assert set(zero_point.numpy()) == {128}
    assert found > 30


@pytest.mark.parametrize(
    ("given", "weights", "bits", "message"),
    [
        ((UINT8,), (INT8,), 16, "no integer kernel for activations of 16 bits; it takes UINT8"),
        ((UINT8, INT16), (INT8,), 12, "can be 2 to 8, or 16"),
        ((ir.DataType.FLOAT16,), (INT8,), 8, "it takes none"),
        ((UINT8,), (ir.DataType.INT4,), 8, "takes no weights of INT8 or UINT8"),
    ],
)
def test_refused(b, capabilities, given, weights, bits, message):
    with pytest.raises(PassError, match=message):
        quantized(b, capabilities, given, weights, activation_bits=bits)
