"""Placement of Q/DQ pairs, and what the quantized graph computes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import CalibrationError
from onnxcomp.metrics import sqnr
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_activation, read_weight
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu


def node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def test_cnn_runs_on_integers_throughout(cnn_example, run_passes, outputs, tmp_path):
    model, feed = cnn_example
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    artifact = OrtCpu().compile(model, tmp_path / "a")
    assert artifact.audit.integer_mac_share == 1.0
    assert not artifact.audit.fallbacks
    assert artifact.audit.executed_ops["QLinearConv"] == 3
    assert artifact.audit.executed_ops["QLinearAdd"] == 1
    assert sqnr(expected, outputs(model, feed)[0]) > 25
    assert "Clip" not in {n.op_type for n in model.graph}


def test_moving_op_shares_parameters(cnn_example, run_passes):
    model, feed = cnn_example
    run_passes(model, Quantize(), data=[feed])
    pool = node(model, "pool")
    before = read_activation(pool.inputs[0])
    after = read_activation(next(n for n in model.graph if n.name == "last").inputs[0])
    assert before.grid.scale == after.grid.scale
    assert before.grid.zero_point == after.grid.zero_point
    assert after.value is pool.outputs[0]


def test_transformer_linears_and_reasons(attention_example, run_passes, outputs, tmp_path):
    model, feed = attention_example
    expected = outputs(model, feed)[0]
    report = run_passes(model, Quantize(), data=[feed])
    refusals = {e.node: e.detail for e in report.edits if e.action == "refused"}
    assert set(refusals) == {"scores", "weighted"}
    assert all("another activation" in r for r in refusals.values())
    rows = {r.node: r for r in OrtCpu().compile(model, tmp_path / "a").audit.rows}
    assert all(rows[n].integer for n in ("qkv", "proj", "fc1", "fc2"))
    assert sqnr(expected, outputs(model, feed)[0]) > 25


def test_bias_scale_is_the_product(attention_example, run_passes):
    model, feed = attention_example
    run_passes(model, Quantize(), data=[feed])
    matmul = node(model, "qkv")
    _, weight_scale, axis = read_weight(matmul.inputs[1])
    integers, scale, _ = read_weight(node(model, "qkv_bias").inputs[1])
    assert axis == 1
    assert integers.dtype == np.int32
    np.testing.assert_array_equal(scale, read_activation(matmul.inputs[0]).grid.scale * weight_scale)


def test_subgraph_is_refused_and_shared_weight_survives(branching_example, run_passes, outputs):
    model, feed = branching_example
    expected = outputs(model, feed)[0]
    report = run_passes(model, Quantize(), data=[feed])
    actions = Counter(e.action for e in report.edits)
    assert actions == {"applied": 2, "refused": 1}
    assert "subgraph" in next(e.detail for e in report.edits if e.action == "refused")
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=0.03)


def test_second_application_says_why_not(cnn_example, run_passes):
    model, feed = cnn_example
    run_passes(model, Quantize(), data=[feed])
    report = run_passes(model, Quantize(), data=[feed])
    assert {e.detail for e in report.edits} == {"it is quantized already"}


@pytest.mark.parametrize("bits", [2, 4, 7])
def test_narrow_values_keep_to_their_levels(bits, cnn_example, run_passes, outputs):
    model, feed = cnn_example
    run_passes(model, Quantize(activation_bits=bits, weight_bits=bits), data=[feed])
    clips = [n.outputs[0].name for n in model.graph if n.op_type == "Clip"]
    assert len(clips) == sum(n.op_type == "QuantizeLinear" for n in model.graph)
    from onnxcomp.targets.ort import reference_runner

    for values in reference_runner(model, clips)(feed).values():
        assert values.dtype == np.uint8
        assert values.max() <= 2**bits - 1
    integers, _, _ = read_weight(node(model, "last").inputs[1])
    assert np.abs(integers.astype(int)).max() <= 2 ** (bits - 1) - 1


def test_graph_output_keeps_its_name(b, run_passes, outputs, tmp_path):
    y = b.op("Conv", b.input("x", [1, 4, 8, 8]), b.floats(4, 4, 3, 3), name="only")
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    assert [v.name for v in model.graph.outputs] == [y]
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops["QLinearConv"] == 1
    assert sqnr(expected, outputs(model, feed)[0]) > 30


def test_huge_bias_on_a_dead_channel_does_not_overflow(b, run_passes, outputs):
    weight = np.ones((3, 2), np.float32)
    weight[:, 1] = 0.0
    y = b.op("Gemm", b.input("x", [4, 3]), b.const(weight), b.const(np.array([1.0, 1e6], np.float32)))
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)}
    run_passes(model, Quantize(), data=[feed])
    np.testing.assert_allclose(outputs(model, feed)[0][:, 1], 1e6, rtol=1e-6)


def test_selector(cnn_example, run_passes):
    model, feed = cnn_example
    report = run_passes(model, Quantize(where=Select(name=("last",))), data=[feed])
    assert [e.node for e in report.edits if e.action == "applied"] == ["last"]
    assert sum(n.op_type == "QuantizeLinear" for n in model.graph) == 2


def test_old_opset_is_converted_and_said(b, run_passes):
    y = b.op("Gemm", b.input("x", [2, 3]), b.floats(3, 4), b.floats(4))
    model = b.output(y).model(opset=11)
    report = run_passes(model, Quantize(), data=[{"x": np.ones((2, 3), np.float32)}])
    assert report.edits[0].detail == "opset 11 converted to 13"
    assert model.opset_imports[""] == 13


def test_no_data(cnn_example, run_passes):
    with pytest.raises(CalibrationError, match=r"pass 'quantize'.*--data"):
        run_passes(cnn_example[0], Quantize())
