"""Thresholds in models that are put together oddly: shared weights, subgraphs, functions, no types, other readers."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, weight

from onnxcomp.passes.threshold import Threshold

METHODS = ("cats", "chess", "teal", "wina", "topk", "cett")
DATA = feeds(4)


def refusals(report) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == "refused"}


def ops(model: ir.Model) -> dict[str, str]:
    return {n.name or "": n.op_type for n in model.graph}


def unchanged(model: ir.Model, method: str, run_passes, outputs):
    """Drops nothing, or what is exactly zero, and checks that outputs stay what they were."""
    before = outputs(model, DATA[0])
    report = run_passes(model, Threshold(method=method, sparsity=0.0), data=DATA)
    for want, found in zip(before, outputs(model, DATA[0]), strict=True):
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(want).max())
    return report


@pytest.mark.parametrize("method", METHODS)
def test_shared_weights(method, b, run_passes, outputs):
    """Two blocks in a row with the same three weights: no copy is made of any."""
    weights = weight(b, WIDTH, HIDDEN), weight(b, WIDTH, HIDDEN), weight(b, HIDDEN, WIDTH)
    y = b.input("x", [1, 12, WIDTH])
    for i in range(2):
        gate = blocks.silu(b, b.op("MatMul", y, weights[0], name=f"gate{i}"))
        b.nodes[-1].name, b.nodes[-1].output[0] = f"act{i}", f"act{i}_out"
        up = b.op("MatMul", y, weights[1], name=f"up{i}")
        y = b.op("MatMul", b.op("Mul", f"act{i}_out", up, name=f"product{i}"), weights[2], name=f"down{i}")
        assert gate
    model = b.output(y).model(opset=18)
    unchanged(model, method, run_passes, outputs)
    large = [v for v in model.graph.initializers.values() if v.const_value.size > HIDDEN]
    assert len(large) == 3
    assert ops(model)["down0"] == ops(model)["down1"] != "MatMul"


@pytest.mark.parametrize("method", METHODS)
def test_values_that_others_read(method, b, run_passes, outputs):
    """Activation, product and what is multiplied are outputs of the model as well."""
    model = blocks.gated(b)
    for name in ("act", "up", "product"):
        value = model.graph.node(name).outputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    unchanged(model, method, run_passes, outputs)
    assert ops(model)["down"] != "MatMul"


@pytest.mark.parametrize("method", METHODS)
def test_no_types(method, b, run_passes, outputs):
    model = blocks.gated(b)
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.type = None, None
    unchanged(model, method, run_passes, outputs)
    assert ops(model)["down"] != "MatMul"


def test_the_last_product_is_the_output(b, run_passes, outputs):
    x = b.input("x", [12, WIDTH])
    y = b.op("Relu", b.op("Gemm", x, weight(b, WIDTH, HIDDEN), b.floats(HIDDEN), name="fc1"))
    model = b.output(b.op("Gemm", y, weight(b, HIDDEN, WIDTH), b.floats(WIDTH), name="fc2")).model(opset=18)
    data = [{"x": feed["x"][0]} for feed in DATA]
    before, name = outputs(model, data[0])[0], model.graph.outputs[0].name
    run_passes(model, Threshold(method="cats", sparsity=0.0), data=data)
    assert model.graph.outputs[0].name == name
    np.testing.assert_allclose(outputs(model, data[0])[0], before, rtol=0, atol=1e-5 * np.abs(before).max())


def test_subgraphs_and_functions_are_refused(run_passes):
    """What calibration cannot see is left alone, with the reason."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[3, 4] x, bool c) => (float[3, 4] y)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
            first = local.Layer(x, w)
            y = If (c) <
                then_branch = t () => (float[3, 4] p) { h = MatMul(first, w)  r = Relu(h)  p = MatMul(r, w) },
                else_branch = e () => (float[3, 4] q) { q = Identity(first) }>
        }
        <domain: "local", opset_import: ["" : 18]> Layer (p, q) => (s) { r = MatMul(p, q)  s = Relu(r) }""")
    names = iter(("a", "b", "c"))
    for graph in (model.graph, *model.functions.values()):
        for node in graph.all_nodes():
            if node.op_type == "MatMul":
                node.name = next(names)
    data = [{"x": np.eye(3, 4, dtype=np.float32), "c": np.array(True)}]
    for method in ("cats", "teal"):
        report = run_passes(model, Threshold(method=method), data=data)
        assert not report.applied
        found = refusals(report)
        assert "subgraph" in found["a"]
        assert "subgraph" in found["b"]
        assert "function" in found["c"]


def test_dead_channels(b, run_passes, outputs):
    """A channel that adds nothing has no finite threshold; it gets the largest number instead."""
    model = blocks.gated(b)
    down = model.graph.node("down").inputs[1]
    array = down.const_value.numpy().copy()
    array[5] = 0.0
    down.const_value = ir.tensor(array, name=down.name)
    unchanged(model, "wina", run_passes, outputs)
    limit = model.graph.node("down").inputs[-1].const_value.numpy()
    assert np.isfinite(limit).all()
    assert limit[5] > 1e38
