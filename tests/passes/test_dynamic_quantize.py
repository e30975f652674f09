"""Dynamic int8: numbers, what onnxruntime makes of it, what is shared, what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.metrics import sqnr
from onnxcomp.passes.dynamic_quantize import DynamicQuantize
from onnxcomp.quant import weight_grid
from onnxcomp.rewrite import Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.testing import check_pass

ALL = DynamicQuantize(min_weights=0)


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(np.float32)


def audit(model, tmp_path):
    return OrtCpu().compile(model, tmp_path / "a").audit


def by_name(model):
    return {n.name: n for n in model.graph.all_nodes()}


def reference(x, weight, bits=8, per_channel=True, bias=None):
    """DynamicQuantizeLinear as the ONNX standard has it, then integers."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    codes = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - int(zero)
    grid = weight_grid(weight, bits, 1 if per_channel else None, "mse")
    y = (codes @ grid.quantize(weight).astype(np.int64)).astype(np.float32) * (scale * grid.scale)
    return y if bias is None else y + bias


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("op", ["MatMul", "3-D", "Gemm", "transB"])
def test_numbers(op, per_channel, b, run_passes, outputs, tmp_path):
    shape = [2, 5, 16] if op == "3-D" else [5, 16]
    weight, bias = normal(16, 24) * np.linspace(0.1, 3, 24, dtype=np.float32), normal(24)
    x = b.input("x", shape)
    if op in ("MatMul", "3-D"):
        y, bias = b.op("MatMul", x, b.const(weight), name="layer"), None
    else:
        turned = op == "transB"
        y = b.op("Gemm", x, b.const(weight.T if turned else weight), b.const(bias), name="layer", transB=int(turned))
    model = b.output(y).model()
    feed = {"x": normal(*shape) + 1}
    run_passes(model, replace(ALL, per_channel=per_channel))
    found = outputs(model, feed)[0]
    expected = reference(feed["x"], weight, per_channel=per_channel, bias=bias)
    np.testing.assert_allclose(found, expected, atol=2e-4)  # a code on the edge may fall to the other side
    assert [v.name for v in model.graph.outputs] == [y]
    (row,) = audit(model, tmp_path).rows
    assert (row.node, row.executed_as, row.integer) == ("layer", "DynamicQuantizeMatMul", True)
    assert row.macs == np.prod(shape) * 24


def test_products_of_one_activation_share_its_quantizer(b, run_passes, tmp_path):
    x = b.op("Relu", b.input("x", [5, 16]))
    y = [b.op("Gemm", x, b.floats(16, 16), b.floats(16), name=f"layer{i}") for i in range(3)]
    model = b.output(b.op("Sum", *y)).model()
    report = run_passes(model, ALL)
    assert report.applied == 3
    assert Counter(n.op_type for n in model.graph)["DynamicQuantizeLinear"] == 1
    found = audit(model, tmp_path)
    assert found.executed_ops["MatMulIntegerToFloat"] == 3
    assert all(row.integer for row in found.rows)


def test_a_shared_weight_is_stored_once(b, run_passes):
    shared = b.floats(16, 16)
    y = b.op("MatMul", b.op("MatMul", b.input("x", [5, 16]), shared), shared)
    model = b.output(y).model()
    edits = run_passes(model, ALL).edits
    assert all("shared by 2 nodes" in e.detail for e in edits)
    assert sum(v.const_value.size == 256 for v in model.graph.initializers.values()) == 1


def test_in_a_branch(branching_example, run_passes, outputs):
    model, feed = branching_example
    expected = outputs(model, feed)[0]
    report = run_passes(model, ALL)
    assert [(e.action, e.node, e.op_type) for e in report.edits] == [("applied", f"n{i}", "MatMul") for i in (0, 1, 3)]
    assert sqnr(expected, outputs(model, feed)[0]) > 35
    inner = [n.op_type for n in model.graph.all_nodes() if n.graph is not model.graph]
    assert inner.count("MatMulInteger") == 1


def test_an_outlier_costs_precision(b, run_passes, outputs):
    """What the docstring says of dynamic ranges; else one could always leave the data out."""
    model = b.output(b.op("MatMul", b.input("x", [64, 16]), b.floats(16, 16))).model()
    feeds = [{"x": normal(64, 16)} for _ in range(2)]
    feeds[1]["x"][0, 0] = 100
    expected = [outputs(model, f)[0][1:] for f in feeds]
    run_passes(model, ALL)
    tame, wild = (sqnr(e, outputs(model, f)[0][1:]) for e, f in zip(expected, feeds, strict=True))
    assert tame > wild + 15


def test_reduce_range(b, capabilities, outputs):
    weight = normal(16, 24)
    model = b.output(b.op("MatMul", b.input("x", [5, 16]), b.const(weight), name="layer")).model()
    pipeline = Pipeline(passes=[ALL], capabilities=replace(capabilities, reduce_range=True))
    (edit,) = pipeline.run(model)[-1].edits
    assert "weight 7 bit" in edit.detail
    integers = by_name(model)["layer"].inputs[1].const_value.numpy()
    assert np.abs(integers.astype(int)).max() == 63
    x = normal(5, 16)
    np.testing.assert_allclose(outputs(model, {"x": x})[0], reference(x, weight, bits=7), atol=2e-4)


# --- LSTM


def recurrent(b, op_type="LSTM", direction="forward", optional=False, **attributes):
    directions, gates = 2 if direction == "bidirectional" else 1, {"LSTM": 4, "GRU": 3}[op_type] * 16
    weights = [b.const(normal(directions, gates, n) * np.float32(0.2)) for n in (24, 16)]
    inputs = [b.input("x", [7, 3, 24]), *weights, b.const(normal(directions, 2 * gates))]
    if optional:
        inputs.append(b.const(np.array([7, 5, 3], np.int32)))
        inputs += [b.const(normal(directions, *shape)) for shape in ((3, 16), (3, 16), (48,))]
    return b.op(op_type, *inputs, name="layer", hidden_size=16, direction=direction, **attributes)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_lstm(direction, optional, per_channel, b, capabilities, outputs, tmp_path):
    model = b.output(recurrent(b, direction=direction, optional=optional)).model()
    feed = {"x": normal(7, 3, 24)}
    expected = outputs(model, feed)[0]
    step = replace(ALL, per_channel=per_channel)
    (edit,) = check_pass(step, model, capabilities=capabilities)
    assert (edit.action, edit.node, edit.op_type) == ("applied", "layer", "LSTM")
    Pipeline(passes=[step], capabilities=capabilities).run(model)
    assert sqnr(expected, outputs(model, feed)[0]) > 28
    (row,) = audit(model, tmp_path).rows
    assert (row.executed_as, row.integer) == ("DynamicQuantizeLSTM", True)


def test_lstm_of_a_target_without_it(b, capabilities):
    model = b.output(recurrent(b)).model()
    (edit,) = check_pass(ALL, model, capabilities=replace(capabilities, contrib_ops=frozenset()))
    assert edit.detail == "target 'ort-cpu' has no integer LSTM"


# --- refusals

CASES = {
    "conv": (lambda b: b.op("Conv", b.input("x", [1, 4, 8]), b.floats(4, 4, 3), name="layer"), "8 times the time"),
    "gru": (lambda b: recurrent(b, "GRU"), "no integer GRU"),
    "layout": (lambda b: recurrent(b, layout=1), "layout = 1"),
    "tied": (
        lambda b: b.op("MatMul", b.op("Gather", shared(b), b.input("i", [3], TensorProto.INT64)), "t", name="layer"),
        "weight_only stores it once",
    ),
    "not finite": (
        lambda b: b.op("MatMul", b.input("x", [2, 16]), b.const(np.full((16, 8), np.inf, np.float32)), name="layer"),
        "NaN or infinity",
    ),
    "two activations": (
        lambda b: b.op("MatMul", b.input("x", [2, 8]), b.input("y", [8, 2]), name="layer"),
        "another activation",
    ),
    "small": (lambda b: b.op("MatMul", b.input("x", [2, 8]), b.floats(8, 8), name="layer"), "min_weights = 65"),
    "float16": (
        lambda b: b.op(
            "MatMul",
            b.input("x", [2, 16], TensorProto.FLOAT16),
            b.const(normal(16, 8).astype(np.float16)),
            name="layer",
        ),
        "float32",
    ),
}


def shared(b):
    table = b.floats(16, 16)
    b.op("Transpose", table, name="t", perm=[1, 0])
    b.nodes[-1].output[0] = "t"
    return table


@pytest.mark.parametrize("case", sorted(CASES))
def test_refusal(case, b, capabilities):
    build, reason = CASES[case]
    kind = TensorProto.FLOAT16 if case == "float16" else TensorProto.FLOAT
    model = b.output(build(b), kind).model()
    (edit,) = check_pass(DynamicQuantize(min_weights=65), model, capabilities=capabilities)
    assert (edit.action, edit.node) == ("refused", "layer")
    assert reason in edit.detail


def test_weights_that_are_computed(b, capabilities):
    y = recurrent(b)
    model = b.output(y).model()
    lstm = by_name(model)["layer"]
    weight = lstm.inputs[1]
    model.graph.inputs.append(weight)  # the caller may override it
    (edit,) = check_pass(ALL, model, capabilities=capabilities)
    assert "no constants" in edit.detail


def test_selector(b, run_passes):
    x = b.input("x", [5, 16])
    y = b.op("MatMul", b.op("MatMul", x, b.floats(16, 16), name="first"), b.floats(16, 16), name="second")
    model = b.output(y).model()
    report = run_passes(model, replace(ALL, where=Select(name=("second",))))
    assert [e.node for e in report.edits] == ["second"]
    assert by_name(model)["first"].op_type == "MatMul"


def test_snapshot(b, run_passes):
    model = b.output(b.op("Gemm", b.input("x", [5, 16]), b.const(normal(16, 8), "w"), b.const(normal(8), "c"))).model()
    run_passes(model, ALL)
    found = [(n.op_type, n.name, [v.name for v in n.inputs]) for n in model.graph]
    assert found == [
        ("DynamicQuantizeLinear", "x_q", ["x"]),
        ("MatMulInteger", "Gemm_0", ["x_q", "w_q", "x_q_zero_point"]),
        ("Mul", "Gemm_0_scales", ["x_q_scale", "w_scale"]),
        ("Cast", "Gemm_0_floats", ["Gemm_0_integers"]),
        ("Mul", "Gemm_0_scaled", ["Gemm_0_floats", "Gemm_0_scales"]),
        ("Add", "Gemm_0_dequantized", ["Gemm_0_scaled", "c"]),
    ]


def test_types_are_noted(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", [5, 16]), b.floats(16, 8), name="layer")).model()
    run_passes(model, ALL)
    dtypes = {v.name: v.dtype for n in model.graph for v in n.outputs}
    assert dtypes["x_q"] == dtypes["x_q_zero_point"] == ir.DataType.UINT8
    assert dtypes["layer_integers"] == ir.DataType.INT32
