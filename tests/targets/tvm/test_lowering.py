"""Whole models of the kinds that there are kernels for, through all passes: what they become, and what they compute."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

pytest.importorskip("tvm")

from onnxcomp.targets.tvm.nodes import DOMAIN
from onnxcomp.verbs.resolve import compiled, lowered, make_target


def nodes(model: ir.Model) -> Counter[str]:
    done, _ = lowered(model, make_target("tvm-cpu"))
    return Counter(f"{'our ' if n.domain == DOMAIN else ''}{n.op_type}" for n in done.graph)


def outputs(model: ir.Model, feed, folder, name: str) -> list[np.ndarray]:
    target = make_target(name)
    return list(target.load(compiled(model, target, folder / name)).run(feed).values())


def block(b: Builder, x: str) -> str:
    """A convolution with a residual, a channel attention, and an activation behind the sum."""
    y = b.op("Conv", x, b.floats(8, 8, 3, 3), b.floats(8), pads=[1, 1, 1, 1])
    scale = b.op("Sigmoid", b.op("Conv", b.op("GlobalAveragePool", y), b.floats(8, 8, 1, 1)))
    return b.op("Relu", b.op("Add", b.op("Mul", y, scale), x))


def cnn() -> tuple[ir.Model, dict[str, np.ndarray]]:
    b = Builder()
    x = b.op("Relu", b.op("Conv", b.input("x", [1, 3, 17, 15]), b.floats(8, 3, 3, 3), b.floats(8), strides=[2, 2]))
    x = block(b, block(b, x))
    y = b.op("Gemm", b.op("Flatten", b.op("GlobalAveragePool", x)), b.floats(8, 5), b.floats(5))
    return b.output(y).model(), {"x": np.random.default_rng(0).normal(size=(1, 3, 17, 15)).astype(np.float32)}


def perceptron() -> tuple[ir.Model, dict[str, np.ndarray]]:
    b = Builder()
    x = b.input("x", [7, 16])
    y = b.op("Add", b.op("MatMul", x, b.floats(16, 16)), b.floats(16))
    y = b.op("Add", b.op("MatMul", b.op("Mul", y, b.op("Sigmoid", y)), b.floats(16, 16)), x)
    return b.output(y).model(), {"x": np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)}


def quantized() -> tuple[ir.Model, dict[str, np.ndarray]]:
    b = Builder()
    x = b.image()
    y = b.qdq(b.op("Relu", b.conv(x)), zero=0)
    y = b.qdq(b.op("Add", y, x))
    return b.output(y).model(), {"x": np.random.default_rng(0).normal(size=(1, 8, 16, 16)).astype(np.float32)}


@pytest.mark.parametrize("make", [cnn, perceptron, quantized])
def test_outputs_are_those_of_onnxruntime(make, tmp_path):
    model, feed = make()
    for found, wanted in zip(
        outputs(model, feed, tmp_path, "tvm-cpu"), outputs(model, feed, tmp_path, "ort-cpu"), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_activations_and_residuals_are_in_the_kernels_and_images_stay_as_they_are():
    found = nodes(cnn()[0])
    assert found["our Conv"] == 5
    assert not found["Relu"] + found["Sigmoid"]
    assert found["our Activate"] == 2  # behind sums of products, which no kernel adds
    assert found["Transpose"] <= 1


def test_a_perceptron_is_two_kernels():
    assert nodes(perceptron()[0]) == Counter({"our Gemm": 2})


def test_codes_stay_codes_between_integer_kernels():
    found = nodes(quantized()[0])
    assert found["our QConv"] == found["our QAdd"] == 1
    assert not found["QuantizeLinear"] + found["DequantizeLinear"]


def test_a_lowered_model_is_lowered_once():
    target = make_target("tvm-cpu")
    once, _ = lowered(cnn()[0], target)
    assert lowered(once, target)[1][1].edits == ()
