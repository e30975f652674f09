"""Biases that make up for what a mask takes from the outputs on average."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.edit import constant
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.targets.ort import reference_runner

FORMS = ["matmul", "gemm", "gemm scaled", "gemm transB", "conv", "conv grouped", "conv padded"]


def build(b, form: str, dtype=np.float32) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    kind, onnx_type = form.split()[0], TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    channels, outputs = 16, 10
    bias = b.const(b.rng.normal(size=outputs).astype(dtype), "b")
    if kind == "conv":
        group = 2 if "grouped" in form else 1
        size = 1 if form == "conv" else 3
        shape = [1, channels, 12, 12]
        weight = b.const(b.rng.normal(size=(outputs, channels // group, size, size)).astype(dtype), "w")
        pads = [1] * 4 if "padded" in form else [0] * 4
        y = b.op("Conv", b.input("x", shape, onnx_type), weight, bias, name="layer", group=group, pads=pads)
    else:
        shape = [40, channels]
        turned = "transB" in form
        weight = b.const(b.rng.normal(size=(outputs, channels) if turned else (channels, outputs)).astype(dtype), "w")
        x = b.input("x", shape, onnx_type)
        if kind == "gemm":
            scaled = {"alpha": 0.5, "beta": 3.0} if "scaled" in form else {}
            y = b.op("Gemm", x, weight, bias, name="layer", **scaled, **({"transB": 1} if turned else {}))
        else:
            y = b.op("Add", b.op("MatMul", x, weight, name="layer"), bias)
    rng = np.random.default_rng(1)
    level = rng.uniform(1, 3, channels).astype(np.float32)
    level = level[:, None, None] if kind == "conv" else level
    feeds = [{"x": (level + rng.normal(size=shape)).astype(dtype)} for _ in range(8)]
    return b.output(y, onnx_type).model(), feeds


def outputs(model: ir.Model, feeds: list[dict[str, np.ndarray]]) -> np.ndarray:
    (name,) = (v.name for v in model.graph.outputs)
    run = reference_runner(model, [name])
    return np.stack([run(feed)[name] for feed in feeds]).astype(np.float64)


def shift(model: ir.Model, before: np.ndarray, feeds: list[dict[str, np.ndarray]]) -> float:
    """Largest change of an output channel's mean, in standard deviations of the outputs."""
    change = outputs(model, feeds) - before
    channel = 2 if change.ndim == 5 else change.ndim - 1
    others = tuple(axis for axis in range(change.ndim) if axis != channel)
    return float(np.abs(change.mean(axis=others)).max() / before.std())


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("form", FORMS)
def test_means_of_the_outputs_stay(form, method, b, run_passes):
    model, feeds = build(b, form)
    plain = model.clone()
    before = outputs(model, feeds)
    run_passes(model, NmMask(method=method, include_ends=True), data=feeds)
    run_passes(plain, NmMask(method=method, include_ends=True, bias_correction=False), data=feeds)
    assert (constant(model.graph.initializers["w"]) == 0).mean() == 0.5
    # sparsegpt takes means from three samples in four, and padding is part of the patches.
    assert shift(model, before, feeds) < (0.06 if method == "sparsegpt" else 1e-3)
    if method != "sparsegpt":
        assert shift(plain, before, feeds) > 0.3
    errors = [((outputs(m, feeds) - before) ** 2).mean() for m in (model, plain)]
    assert errors[0] < errors[1]


def test_half_precision_stays_half_precision(b, run_passes):
    model, feeds = build(b, "gemm", np.float16)
    before = outputs(model, feeds)
    run_passes(model, NmMask(method="wanda", include_ends=True), data=feeds)
    assert {v.dtype for v in model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert shift(model, before, feeds) < 0.01


def test_a_weight_of_two_products_has_no_bias_of_its_own(b, run_passes):
    x = b.input("x", [4, 16])
    weight, bias = b.floats(16, 16), b.floats(16)
    hidden = b.op("Add", b.op("MatMul", x, weight), bias)
    model = b.output(b.op("Add", b.op("MatMul", hidden, weight), bias)).model()
    feeds = [{"x": np.random.default_rng(i).normal(1, 1, (4, 16)).astype(np.float32)} for i in range(4)]
    adds = [n for n in model.graph if n.op_type == "Add"]
    before = constant(bias_value := adds[0].inputs[1]).copy()
    run_passes(model, NmMask(method="wanda", include_ends=True), data=feeds)
    assert all(n.inputs[1] is bias_value for n in adds)
    np.testing.assert_array_equal(constant(bias_value), before)


def test_without_data_biases_stay(b, run_passes):
    model, _ = build(b, "gemm")
    before = constant(model.graph.initializers["b"]).copy()
    run_passes(model, NmMask(method="magnitude", include_ends=True))
    np.testing.assert_array_equal(constant(model.graph.initializers["b"]), before)


@pytest.mark.parametrize("form", ["gemm", "matmul", "conv"])
def test_old_biases_do_not_stay_behind(form, b, run_passes):
    model, feeds = build(b, form)
    run_passes(model, NmMask(method="wanda", include_ends=True), data=feeds)
    assert sorted(model.graph.initializers) == ["b_shifted", "w"]


def test_old_constants_do_not_stay_behind(b, run_passes):
    """Neither the integers of a bias nor a weight that a node holds."""
    model, feeds = build(b, "gemm")
    node = model.graph[0]
    scale = ir.Value(name="scale", const_value=ir.tensor(np.full(10, 0.001, np.float32), name="scale"))
    integers = ir.Value(name="integers", const_value=ir.tensor(np.arange(10, dtype=np.int32), name="integers"))
    for value in (scale, integers):
        model.graph.register_initializer(value)
    held = ir.node("Constant", [], {"value": model.graph.initializers.pop("w").const_value}, name="held")
    bias = ir.node("DequantizeLinear", [integers, scale], {"axis": 0}, name="bias")
    model.graph.insert_before(node, (held, bias))
    node.replace_input_with(1, held.outputs[0])
    node.replace_input_with(2, bias.outputs[0])
    model.graph.initializers.pop("b")
    run_passes(model, NmMask(method="wanda", include_ends=True), data=feeds)
    assert [n.op_type for n in model.graph] == ["DequantizeLinear", "Gemm"]
    assert all(value.uses() for value in model.graph.initializers.values())
    assert len(model.graph.initializers) == 3
