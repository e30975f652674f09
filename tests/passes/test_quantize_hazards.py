"""Models that made quantization fail, abort onnxruntime, or take the wrong statistics."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.api import rewrite
from onnxcomp.errors import CalibrationError
from onnxcomp.metrics import sqnr
from onnxcomp.passes.quantize import Quantize


def data(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", [6, 4], ids=["sizes differ", "sizes are the same"])
def test_conv_and_matmul_read_one_tensor(size, run_passes, outputs):
    """Their channels lie on different axes, and so do the means that correct the biases."""
    b = Builder()
    x = b.input("x", [1, 4, 4, size])
    conv = b.op("Conv", x, b.floats(4, 4, 1, 1), b.floats(4))
    product = b.op("Add", b.op("MatMul", x, b.floats(size, 5)), b.floats(5))
    model = b.output(conv).output(product).model()
    shift = np.array([8, -4, 2, 0], np.float32).reshape(1, 4, 1, 1)  # every channel of the Conv has a mean of its own
    feed = {"x": data(1, 4, 4, size) + shift}
    expected = outputs(model, feed)
    run_passes(model, Quantize(weight_bits=4, activation_bits=8), data=[feed])
    for want, found in zip(expected, outputs(model, feed), strict=True):
        axes = (0, 2, 3) if want.shape[1] == 4 and want.shape[3] == size else (0, 1, 2)
        drift = np.abs((found - want).mean(axis=axes)).max()
        assert drift < 0.01 * np.abs(want).max(), "the mean of every output channel is kept"


def test_layer_whose_weights_are_all_zero(run_passes, outputs):
    b = Builder()
    y = b.op("Conv", b.input("x", [1, 3, 6, 6]), b.const(np.zeros((4, 3, 3, 3), np.float32)), b.floats(4), name="zero")
    model = b.output(b.op("Conv", y, b.floats(2, 4, 1, 1))).model()
    feed = {"x": data(1, 3, 6, 6)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    assert sqnr(expected, outputs(model, feed)[0]) > 25


def test_empty_tensor_is_named(run_passes):
    b = Builder()
    model = b.output(b.op("MatMul", b.input("x", ["n", 4]), b.floats(4, 4))).model()
    with pytest.raises(CalibrationError, match="'x' is empty"):
        run_passes(model, Quantize(), data=[{"x": data(0, 4)}])


def test_default_of_an_input_that_calibration_does_not_reach(tmp_path):
    """The probe computes only what is observed; an input that it does not need keeps its default all the same."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 4] x, float[4] last) => (float[2, 4] y)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] last = {1, 2, 3, 4}> {
            h = MatMul(x, w) r = Sin(h) y = Mul(r, last) }""")
    ir.save(model, tmp_path / "m.onnx")
    report = rewrite(tmp_path / "m.onnx", tmp_path / "r.onnx", recipe="int8", data=[{"x": data(2, 4)}])
    assert any(e.action == "applied" for e in report.passes[-1].edits)


def test_moved_tensor_that_a_subgraph_reads(run_passes, outputs):
    """Between DequantizeLinear and such a reader, onnxruntime does not bear an op that only moves values."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 4, 6, 6] x, bool c) => (float[1, 4, 3, 3] y)
        <float[4, 4, 1, 1] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
            h = Conv(x, w)
            m = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (h)
            y = If (c) <then_branch = t () => (float[1, 4, 3, 3] p) { p = Neg(m) },
                        else_branch = e () => (float[1, 4, 3, 3] q) { q = Abs(m) }> }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    feed = {"x": data(1, 4, 6, 6), "c": np.array(True)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    pool = next(n for n in model.graph if n.op_type == "MaxPool")
    assert [user.op_type for user, _ in pool.outputs[0].uses()] == ["QuantizeLinear"]
    assert sqnr(expected, outputs(model, feed)[0]) > 30


@pytest.mark.parametrize("reader", ["Add(p, b)", "Relu(p)"])
def test_product_that_a_subgraph_alone_reads(reader, run_passes, outputs):
    """What stands in a branch is not taken for the product's bias or activation."""
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 4] x, bool c) => (float[3, 2] y)
        <float[4, 2] w = {{1, -2, 3, -4, 5, -6, 7, -8}}, float[2] b = {{0.5, -0.5}}, int64[2] s = {{3, 2}}> {{
            p = MatMul(x, w)
            y = If (c) <then_branch = t () => (float[3, 2] q) {{ q = {reader} }},
                        else_branch = e () => (float[3, 2] r) {{ r = Expand(b, s) }}> }}""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    feed = {"x": data(3, 4), "c": np.array(True)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    assert sqnr(expected, outputs(model, feed)[0]) > 30
