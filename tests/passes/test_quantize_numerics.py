"""What the quantized graph computes, against integer arithmetic in numpy; what stays in float, and why."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.errors import PassError
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_activation, read_weight
from onnxcomp.rewrite import Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def refusals(report) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == "refused"}


def integers(x: np.ndarray, tensor) -> np.ndarray:
    """Integers minus zero point, by ONNX's definition and not by the code under test."""
    grid = tensor.grid
    scale, zero = np.float32(grid.scale), int(grid.zero_point)
    return np.clip(np.rint(x / scale) + zero, grid.qmin, grid.qmax).astype(np.int64) - zero


@pytest.mark.parametrize("bits", [(8, 8), (6, 6), (4, 8), (2, 3)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("op", ["Gemm", "Gemm transposed", "MatMul"])
def test_linear_layer_in_integers(op, per_channel, symmetric, bits, b, run_passes, outputs):
    x, weight, bias = b.input("x", [64, 12]), b.rng.normal(size=(12, 5)).astype(np.float32), b.floats(5)
    if op == "MatMul":
        y = b.op("Add", b.op("MatMul", x, b.const(weight), name="linear"), bias, name="bias")
    elif op == "Gemm":
        y = b.op("Gemm", x, b.const(weight), bias, name="linear")
    else:
        y = b.op("Gemm", x, b.const(np.ascontiguousarray(weight.T)), bias, name="linear", transB=1)
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(0.3, 1, (64, 12)).astype(np.float32)}
    step = Quantize(activation_bits=bits[0], weight_bits=bits[1], per_channel=per_channel, symmetric=symmetric)
    run_passes(model, step, data=[feed])
    linear = node(model, "linear")
    tensor, stored = read_activation(linear.inputs[0]), read_weight(linear.inputs[1])
    added = read_weight(linear.inputs[2] if len(linear.inputs) > 2 else node(model, "bias").inputs[1])
    assert tensor is not None
    assert stored is not None
    assert added is not None
    q_weight, weight_scale, axis = stored
    q_bias, bias_scale, _ = added
    assert (axis is None) is not per_channel
    assert np.abs(q_weight.astype(int)).max() <= 2 ** (bits[1] - 1) - 1
    np.testing.assert_array_equal(bias_scale, tensor.grid.scale * weight_scale)
    matrix = q_weight.T if op == "Gemm transposed" else q_weight
    total = integers(feed["x"], tensor) @ matrix.astype(np.int64) + q_bias.astype(np.int64)
    expected = total * bias_scale.astype(np.float64)
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_conv_and_its_folded_relu6(b, run_passes, outputs):
    """The Clip is dropped: the output's grid lies within [0, 6] and saturates there."""
    y = b.op("Conv", b.input("x", [1, 3, 8, 8]), b.floats(4, 3, 1, 1), b.floats(4), name="conv")
    y = b.op("Clip", y, b.const(np.float32(0)), b.const(np.float32(6)), name="relu6")
    model = b.output(b.op("Conv", y, b.floats(2, 4, 1, 1), name="next")).model()
    feed = {"x": np.random.default_rng(0).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    assert "Clip" not in {n.op_type for n in model.graph}
    tensor = read_activation(node(model, "next").inputs[0])
    assert tensor is not None
    assert tensor.value is node(model, "conv").outputs[0]
    assert (float(tensor.grid.low), int(tensor.grid.zero_point)) == (0.0, 0)
    assert 5.5 < float(tensor.grid.high) <= 6.0 + 1e-5
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=0, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("op", "limits", "dropped"),
    [
        ("Relu", (), True),
        ("Clip", (0.0, 6.0), True),
        ("Clip", (-1.0, 1.0), True),
        ("Clip", (0.5, 6.0), False),  # zero is not among its values, but among those of every quantizer
        ("Clip", (-3.0, -1.0), False),
        ("Sigmoid", (), False),
    ],
)
def test_activations_that_a_quantizer_stands_for(op, limits, dropped, b, run_passes):
    y = b.op("Conv", b.input("x", [1, 3, 8, 8]), b.floats(4, 3, 1, 1), name="conv")
    y = b.op(op, y, *(b.const(np.float32(limit)) for limit in limits), name="activation")
    model = b.output(b.op("Conv", y, b.floats(2, 4, 1, 1), name="next")).model()
    feed = {"x": np.random.default_rng(0).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)}
    run_passes(model, Quantize(), data=[feed])
    assert ("activation" not in {n.name for n in model.graph}) is dropped


def test_relu_whose_input_is_read_elsewhere_stays(b, run_passes, outputs):
    y = b.op("Conv", b.input("x", [1, 3, 8, 8]), b.floats(4, 3, 1, 1), name="conv")
    z = b.op("Conv", b.op("Relu", y, name="relu"), b.floats(4, 4, 1, 1), name="next")
    model = b.output(z).output(b.op("Neg", y, name="negative")).model()
    feed = {"x": np.random.default_rng(0).normal(0, 3, (1, 3, 8, 8)).astype(np.float32)}
    expected = outputs(model, feed)
    run_passes(model, Quantize(), data=[feed])
    assert "relu" in {n.name for n in model.graph}
    for found, want in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=0.03 * np.abs(want).max())


def test_residual_add_needs_both_sides_on_integers(b, run_passes):
    x = b.input("x", [1, 4, 8, 8])
    one = b.op("Conv", x, b.floats(4, 4, 1, 1), name="one")
    both = b.op("Add", one, x, name="both")  # x is quantized for `one` anyway
    half = b.op("Add", both, b.input("extra", [1, 4, 8, 8]), name="half")  # nobody quantizes `extra`
    model = b.output(half).model()
    random = np.random.default_rng(0)
    feed = {n: random.normal(size=(1, 4, 8, 8)).astype(np.float32) for n in ("x", "extra")}
    report = run_passes(model, Quantize(), data=[feed])
    assert {e.node for e in report.edits if e.detail == "inputs and output quantized"} == {"both"}
    assert all(read_activation(v) for v in node(model, "both").inputs)
    assert read_activation(node(model, "half").inputs[0])
    assert not read_activation(node(model, "half").inputs[1])


def test_demanded_tensor_stays_exact_for_others(b, run_passes, outputs):
    x = b.input("x", [4, 6])
    model = b.output(b.op("Gemm", x, b.floats(6, 3), name="gemm")).output(b.op("Exp", x, name="exp")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    run_passes(model, Quantize(activation_bits=2), data=[feed])
    np.testing.assert_allclose(outputs(model, feed)[1], np.exp(feed["x"]), rtol=1e-6, atol=0)


def test_reasons_why_an_op_stays_in_float(b, run_passes):
    x = b.input("x", [4, 6])
    y = b.op("Gemm", x, b.floats(6, 6), name="scaled", alpha=0.5)
    y = b.op("Gemm", y, b.floats(6, 6), b.floats(4, 6), name="matrix_bias")
    y = b.op("MatMul", y, b.floats(2, 6, 6), name="batched")
    y = b.op("MatMul", y, b.op("Transpose", x, perm=[1, 0]), name="two_activations")
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    report = run_passes(model, Quantize(), data=[feed])
    assert refusals(report) == {
        "scaled": "Gemm with alpha, beta or transA has no integer kernel",
        "matrix_bias": "its bias is not a constant vector of one value a channel",
        "batched": "its weight has 3 dimensions; integer kernels take 2",
        "two_activations": "its second input is not a constant weight but another activation",
    }
    assert "QuantizeLinear" not in {n.op_type for n in model.graph}


def test_linear_in_a_function_is_refused(run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[3, 2] x) => (float[3, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = local.Layer(x, w) }
        <domain: "local", opset_import: ["" : 17]> Layer (p, q) => (r) { [inner] r = MatMul(p, q) }""")
    report = run_passes(model, Quantize(), data=[{"x": np.ones((3, 2), np.float32)}])
    assert "subgraph or function" in refusals(report)["inner"]


def test_a_target_without_integer_kernels(b, capabilities):
    model = b.output(b.op("Neg", b.input("x", [2]))).model()
    nothing = dataclasses.replace(capabilities, placements={})
    with pytest.raises(PassError, match="has no integer kernels"):
        Pipeline(passes=[Quantize()], capabilities=nothing, runner=reference_runner).run(model)


def test_saturating_cpus_get_weights_of_7_bits(b, capabilities):
    model = b.output(b.op("Gemm", b.input("x", [4, 6]), b.floats(6, 3), name="gemm")).model()
    reduced = dataclasses.replace(capabilities, reduce_range=True)
    feed = {"x": np.ones((4, 6), np.float32)}
    (report,) = Pipeline(passes=[Quantize()], capabilities=reduced, runner=reference_runner).run(model, [feed])
    assert "weight 7 bit" in report.edits[0].detail
    stored = read_weight(node(model, "gemm").inputs[1])
    assert stored is not None
    assert np.abs(stored[0].astype(int)).max() == 63


def test_shared_weight_is_quantized_for_each_selected_op(b, run_passes, outputs):
    weight = b.floats(6, 6)
    y = b.op("MatMul", b.op("MatMul", b.input("x", [4, 6]), weight, name="first"), weight, name="second")
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(where=Select(name=("first",))), data=[feed])
    assert read_weight(node(model, "first").inputs[1])
    assert node(model, "second").inputs[1].name == weight
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=0, atol=0.03 * np.abs(expected).max())


def test_output_aware_range_lowers_the_error_of_the_output(b, run_passes, outputs):
    """One channel with large values that the weight all but ignores."""
    weight = b.rng.normal(size=(8, 4)).astype(np.float32)
    weight[0] *= 1e-3
    model = b.output(b.op("MatMul", b.input("x", [256, 8]), b.const(weight), name="matmul")).model()
    x = np.random.default_rng(0).normal(size=(256, 8)).astype(np.float32)
    x[:, 0] *= 40
    expected = outputs(model, {"x": x})[0]
    errors = {}
    for aware in (False, True):
        quantized = model.clone()
        run_passes(quantized, Quantize(activation_bits=6, output_aware=aware), data=[{"x": x}])
        errors[aware] = float(((outputs(quantized, {"x": x})[0] - expected) ** 2).mean())
    assert errors[True] < 0.1 * errors[False]


# --- cleanup


def test_convs_keep_their_names_when_a_batch_norm_is_folded(b, run_passes):
    """Selectors of the passes behind it go by them."""
    x = b.input("x", [1, 4, 5, 5])
    for name in ("left", "right"):
        statistics = [b.const(b.rng.uniform(0.5, 2, 4).astype(np.float32)) for _ in range(4)]
        conv = b.op("Conv", x, b.floats(4, 4, 1, 1), name=name)
        b.output(b.op("Relu", b.op("BatchNormalization", conv, *statistics), name=f"{name}_relu"))
    model = b.model()
    run_passes(model, Cleanup())
    names = {n.outputs[0].uses()[0].node.name: n.name for n in model.graph if n.op_type == "Conv"}
    assert names == {"left_relu": "left", "right_relu": "right"}


def test_shared_weight_of_two_convs_is_not_scaled(b, run_passes, outputs):
    weight = b.floats(4, 4, 1, 1)
    one = b.op("Conv", b.op("Mul", b.input("x", [1, 4, 5, 5]), b.floats(1, 4, 1, 1)), weight, name="one")
    model = b.output(b.op("Conv", one, weight, name="two")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 5, 5)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Mul", "Conv", "Conv"]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 5, 5), (5,), (1, 4, 5, 5)])
def test_constants_that_vary_in_space_stay(shape, b, run_passes, outputs):
    y = b.op("Conv", b.input("x", [1, 4, 5, 5]), b.floats(4, 4, 1, 1), name="conv")
    model = b.output(b.op("Mul", y, b.floats(*shape), name="mask")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 5, 5)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Conv", "Mul"]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"strides": [2, 2]}, 8),
        ({"strides": [4, 4], "pads": [2, 2, 2, 2]}, 8),
        ({"strides": [4, 4]}, 10),  # a border is left over
        ({"strides": [4, 4], "group": 3}, 8),
    ],
)
def test_convs_that_are_no_patch_embedding(attributes, size, b, run_passes, outputs):
    group = attributes.get("group", 1)
    y = b.op("Conv", b.input("x", [1, 3, size, size]), b.floats(6, 3 // group, 4, 4), name="conv", **attributes)
    y = b.op("Transpose", b.op("Reshape", y, b.const(np.array([1, 6, -1]))), perm=[0, 2, 1])
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, size, size)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert "Conv" in {n.op_type for n in model.graph}
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", [["Add", "Mul"], ["Sub", "Div", "Add", "Mul"]])
@pytest.mark.parametrize("group", [1, 2])
def test_a_shift_in_front_of_a_scale_is_scaled(before, group, b, run_passes, outputs):
    y = b.input("x", [1, 4, 6, 6])
    for op in before:
        y = b.op(op, y, b.const(b.rng.uniform(2, 3, (1, 4, 1, 1)).astype(np.float32)))
    model = b.output(b.op("Conv", y, b.floats(4, 4 // group, 3, 3), name="conv", group=group)).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 6, 6)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Conv"]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_zero_bias_is_not_added(b, run_passes):
    model = b.output(b.op("Mul", b.op("Conv", b.input("x", [1, 4, 5, 5]), b.floats(4, 4, 1, 1)), b.floats(4, 1, 1)))
    cleaned = model.model()
    run_passes(cleaned, Cleanup())
    assert [len(n.inputs) for n in cleaned.graph] == [2]


def test_chains_that_open_up_one_by_one(run_passes):
    """Two transposes cancel, then the scale between them and the Conv goes, then the transposes around it."""
    b = Builder()
    y = b.input("x", [1, 4, 5, 5])
    for _ in range(3):
        y = b.op("Transpose", b.op("Transpose", y, perm=[0, 1, 3, 2]), perm=[0, 1, 3, 2])
        y = b.op("Mul", y, b.floats(1, 4, 1, 1))
    model = b.output(b.op("Conv", y, b.floats(4, 4, 1, 1))).model()
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Conv"]


def test_a_relu_output_of_the_graph_keeps_its_type(b, run_passes):
    """The ReLU is folded, and the Conv's output, of which no type is known, becomes the graph's."""
    model = b.output(b.op("Relu", b.op("Conv", b.input("x", [1, 3, 4, 4]), b.floats(2, 3, 1, 1)), name="last")).model()
    run_passes(model, Quantize(), data=[{"x": np.ones((1, 3, 4, 4), np.float32)}])
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("last_out", ir.DataType.FLOAT)
