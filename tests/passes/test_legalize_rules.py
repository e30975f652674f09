"""What each rule of `legalize` does to the smallest graph that it matches, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.edit import constant
from onnxcomp.passes.legalize import Legalize
from onnxcomp.qdq import read_activation, read_weight
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner

Image = dict[str, np.ndarray]
IMAGE: Image = {"x": np.random.default_rng(3).normal(size=(1, 8, 16, 16)).astype(np.float32)}
ROWS: Image = {"x": np.random.default_rng(4).normal(size=(6, 16)).astype(np.float32)}


def as_written(model: ir.Model, feed: Image) -> list[np.ndarray]:
    names = [v.name for v in model.graph.outputs]
    found = reference_runner(model, names, optimize=False)(feed)
    return [found[n] for n in names]


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def ops(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


@pytest.fixture
def legalized(run_passes):
    """Legalizes a model and returns its edits and the largest difference of any output."""

    def run(model: ir.Model, feed: Image | None = None, **config: object) -> tuple[list, float]:
        before = as_written(model, feed) if feed is not None else []
        report = run_passes(model, Legalize(**config))
        after = as_written(model, feed) if feed is not None else []
        assert [a.dtype for a in after] == [a.dtype for a in before]
        pairs = zip(before, after, strict=True)
        return list(report.edits), max((float(np.abs(a.astype(float) - b).max()) for a, b in pairs), default=0.0)

    return run


def refusals(edits: list) -> dict[str, str]:
    return {e.node: e.detail for e in edits if e.action == "refused"}


def test_int8_becomes_uint8_through_moving_ops(b, legalized):
    y = b.op(
        "QuantizeLinear", b.input("x", [1, 8, 16, 16]), scale := b.const(np.float32(0.02)), zero := b.const(np.int8(3))
    )
    y = b.op("Clip", y, b.const(np.int8(-90)), b.const(np.int8(70)))
    y = b.op("Concat", b.op("MaxPool", y, kernel_shape=[2, 2]), b.const(np.full((1, 8, 15, 15), -5, np.int8)), axis=1)
    model = b.output(b.op("DequantizeLinear", b.op("Transpose", y, perm=[0, 2, 3, 1]), scale, zero)).model()
    edits, error = legalized(model, IMAGE)
    assert error == 0.0
    assert len(edits) == 1
    kinds = {c.dtype for n in model.graph for v in n.inputs[1:] if (c := constant(v)) is not None}
    assert kinds == {np.dtype(np.uint8), np.dtype(np.float32)}


def test_int8_inputs_and_outputs_of_the_graph_keep_their_type(b, legalized, tmp_path):
    scale, zero = b.const(np.float32(0.05)), b.const(np.int8(-7))
    x = b.op("DequantizeLinear", b.input("x", [1, 8, 16, 16], TensorProto.INT8), scale, zero)
    y = b.op("Conv", x, b.weight((8, 8, 3, 3), 0), name="conv")
    model = b.output(b.op("QuantizeLinear", y, scale, zero), TensorProto.INT8).model()
    x = np.random.default_rng(0).integers(-128, 128, (1, 8, 16, 16)).astype(np.int8)
    _, error = legalized(model, {"x": x})
    assert error == 0.0
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QLinearConv"] == 1


def test_int8_read_by_an_unknown_op_stays(b, legalized):
    y = b.op("QuantizeLinear", b.input("x", [2, 2]), b.const(np.float32(0.1)), b.const(np.int8(0)), name="q")
    model = b.output(b.op("Cast", y, to=TensorProto.INT32), TensorProto.INT32).model()
    edits, _ = legalized(model)
    assert "Cast" in refusals(edits)["q"]


def test_int8_constant_beside_an_activation(b, legalized, tmp_path):
    parameters = b.const(np.float32(0.02)), b.const(np.int8(0))
    addend = b.op("DequantizeLinear", b.const(b.rng.integers(-99, 99, (8, 1, 1)).astype(np.int8)), *parameters)
    model = b.output(b.qdq(b.op("Add", b.image(), addend, name="add"), 0.07)).model()
    _, error = legalized(model, IMAGE)
    assert error == 0.0
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QLinearAdd"] == 1


@pytest.mark.parametrize(
    ("op", "zero", "scale"), [("Relu", 40, 0.02), ("Relu", 0, 0.02), ("Clip", 0, 0.05), ("Clip", 9, 0.05)]
)
def test_activation_in_front_of_a_quantizer(op, zero, scale, b, legalized, tmp_path):
    """`q(clip(x)) = clip(q(x))` to the last bit; fitted to the Clip, the grid is finer by half a step at most."""
    limits = [b.const(np.float32(v)) for v in (0, 6)] if op == "Clip" else []
    model = b.output(b.qdq(b.op(op, b.conv(b.image()), *limits, name="act"), scale, zero)).model()
    fitted = model.clone()
    _, error = legalized(model, IMAGE, exact=True)
    assert error == 0.0
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QLinearConv"] == 1
    _, error = legalized(fitted, IMAGE)
    assert error <= 1.01 * scale / 2 + 6 / 255 / 2
    assert not {"Relu", "Clip"} & set(ops(fitted)) or fitted.graph.outputs


def test_activation_behind_others_stays(b, legalized):
    y = b.op("Softplus", b.image())
    model = b.output(b.qdq(b.op("Relu", y, name="act"), 0.02, 40)).model()
    legalized(model, IMAGE)
    assert "Relu" in ops(model)


@pytest.mark.parametrize("kind", ["float", "wrong scale", "int8 with zero point"])
def test_bias_becomes_int32(kind, b, legalized, tmp_path):
    x, weight = b.image(), b.weight((8, 8, 3, 3), 0)
    if kind == "float":
        bias = b.floats(8)
    elif kind == "wrong scale":
        bias = b.bias(error=3.0)
    else:
        q = b.const(b.rng.integers(-100, 100, 8).astype(np.int8))
        bias = b.op("DequantizeLinear", q, b.const(np.float32(0.01)), b.const(np.int8(11)))
    model = b.output(b.qdq(b.op("Conv", x, weight, bias, name="conv"))).model()
    _, error = legalized(model, IMAGE)
    integers, scale, _ = read_weight(node(model, "conv").inputs[2])
    assert integers.dtype == np.int32
    _, weight_scale, _ = read_weight(node(model, "conv").inputs[1])
    grid = read_activation(node(model, "conv").inputs[0]).grid
    np.testing.assert_array_equal(scale, grid.scale * weight_scale)
    assert error <= 0.0501  # one step of the output, where a tie was
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QLinearConv"] == 1


def test_bias_of_a_matmul(b, legalized, tmp_path):
    y = b.matmul(b.qdq(b.input("x", [6, 16])), "fc")
    model = b.output(b.op("Add", b.floats(32), y, name="bias")).model()
    _, error = legalized(model, ROWS)
    assert error < 1e-3
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QGemm"] == 1


def test_bias_too_large_for_int32(b, legalized):
    """A channel with tiny weights and a bias of 5: its weight scale is widened, unless integers have to stay."""
    x, scales = b.image(), np.array([1e-12] + [0.01] * 7, np.float32)
    q = b.const(b.rng.integers(-127, 128, (8, 8, 1, 1)).astype(np.int8))
    weight = b.op("DequantizeLinear", q, b.const(scales), axis=0)
    model = b.output(b.qdq(b.op("Conv", x, weight, b.const(np.full(8, 5, np.float32)), name="conv"))).model()
    exact, _ = legalized(model.clone(), IMAGE, exact=True)
    assert "too large" in refusals(exact)["conv"]
    _, error = legalized(model, IMAGE)
    assert error < 1e-6
    integers, _, _ = read_weight(node(model, "conv").inputs[2])
    assert abs(int(integers[0])) <= 2**30


@pytest.mark.parametrize(("dtype", "zero", "span"), [(np.uint8, 128, 127), (np.int8, 5, 100), (np.uint8, 20, 200)])
def test_weight_zero_point(dtype, zero, span, b, legalized):
    low, high = (zero - span, zero + span) if span < 128 else (0, 256)
    q = b.const(b.rng.integers(low, high, (16, 8)).astype(dtype))
    weight = b.op("DequantizeLinear", q, b.const(np.float32(0.01)), b.const(dtype(zero)), name="w")
    model = b.output(b.op("MatMul", b.qdq(b.input("x", [6, 16])), weight, name="fc")).model()
    edits, error = legalized(model, ROWS)
    assert error == 0.0
    if span == 200:
        assert "int8 with zero point 0" in refusals(edits)["w"]
    else:
        integers, _, _ = read_weight(node(model, "fc").inputs[1])
        assert integers.dtype == np.int8


def test_pairs_that_cancel_or_repeat(b, legalized):
    x = b.input("x", [1, 8, 16, 16])
    parameters = b.const(np.float32(0.05)), b.const(np.uint8(128))
    first = b.op("DequantizeLinear", b.op("QuantizeLinear", x, *parameters), *parameters)
    second = b.op("DequantizeLinear", b.op("QuantizeLinear", x, *parameters), *parameters)
    again = b.op("DequantizeLinear", b.op("QuantizeLinear", first, *parameters), *parameters)
    y = b.qdq(b.op("Add", b.op("Conv", again, b.weight((8, 8, 1, 1), 0)), second), 0.1)
    model = b.output(y).model()
    legalized(model)
    assert sum(n.op_type == "QuantizeLinear" and n.inputs[0].name == "x" for n in model.graph) == 1
    assert ops(model).count("QuantizeLinear") == 3  # input, output of Conv, output of Add


def test_pairs_around_moving_ops(b, legalized, tmp_path):
    """Flatten behind DequantizeLinear, and one in front of QuantizeLinear, keep a Gemm in float."""
    y = b.qdq(b.op("Flatten", b.op("Conv", b.image(), b.weight((2, 8, 16, 16), 0), name="conv")), 0.3)
    y = b.op("Expand", y, b.const(np.array([4, 2])), name="expand")
    weight = b.weight((2, 3), 1)
    model = b.output(b.op("MatMul", y, weight, name="fc")).model()
    _, error = legalized(model, IMAGE)
    assert error == 0.0
    audit = OrtCpu().compile(model, tmp_path / "a").audit
    assert [row.integer for row in audit.rows] == [True, True]


@pytest.mark.parametrize(("size", "reason"), [(8, ""), (4, "stands behind no Conv")])
def test_channel_scales(size, reason, b, legalized):
    """Refused where no Conv stands in front; moved into the weights otherwise is tested with NNCF's form."""
    x = b.input("x", [1, size, 16, 16])
    y = b.conv(b.qdq(x)) if size == 8 else x
    scale, zero = b.const(np.linspace(0.01, 0.05, size).astype(np.float32)), b.const(np.full(size, 128, np.uint8))
    y = b.op("DequantizeLinear", b.op("QuantizeLinear", y, scale, zero, axis=1, name="q"), scale, zero, axis=1)
    y = b.op("Conv", y, b.weight((size, 1, 3, 3), 0), group=size, name="depthwise")
    model = b.output(b.qdq(y)).model()
    edits, error = legalized(model, {"x": IMAGE["x"][:, :size]})
    assert error <= 0.0501
    assert (reason in refusals(edits)["q"]) if reason else not refusals(edits)


@pytest.mark.parametrize(("largest", "count"), [(64, 0), (65, 1)])
def test_weights_that_saturate_are_told_of(b, capabilities, largest, count):
    weight = b.op("DequantizeLinear", b.const(np.full((16, 32), -largest, np.int8)), b.const(np.float32(0.01)))
    model = b.output(b.op("MatMul", b.qdq(b.input("x", [6, 16])), weight, name="fc")).model()
    pipeline = Pipeline(passes=[Legalize()], capabilities=replace(capabilities, reduce_range=True))
    (report,) = pipeline.run(model)
    found = refusals(list(report.edits))
    assert len(found) == count
    assert all("saturate" in reason for reason in found.values())
