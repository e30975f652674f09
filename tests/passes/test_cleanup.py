"""Cleanup keeps the function of the model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.passes.cleanup import Cleanup


def image(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def conv_between(b: Builder, before: list[str], after: list[str], **attributes) -> ir.Model:
    group = attributes.get("group", 1)
    y = b.input("x", [1, 4, 6, 6])
    for op in before:
        y = b.op(op, y, b.const(b.rng.uniform(0.5, 2, (1, 4, 1, 1)).astype(np.float32)))
    y = b.op("Conv", y, b.floats(8, 4 // group, 3, 3), name="conv", **attributes)
    for op in after:
        y = b.op(op, b.const(b.rng.uniform(0.5, 2, (8, 1, 1)).astype(np.float32)), y)
    return b.output(b.op("Relu", y)).model()


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("before", [[], ["Mul"], ["Mul", "Add"], ["Div", "Sub"], ["Add"]])
@pytest.mark.parametrize("after", [[], ["Mul", "Add"]])
def test_scales_and_shifts_around_a_conv(b, group, pads, before, after, run_passes, outputs):
    model = conv_between(b, before, after, group=group, pads=pads)
    feed = image(1, 4, 6, 6)
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-4, atol=1e-4)
    ops = [n.op_type for n in model.graph]
    shift_stays = any(pads) and ("Add" in before or "Sub" in before)
    assert ops == [*(["Sub" if before == ["Sub"] else "Add"] if shift_stays else []), "Conv", "Relu"]


def test_batch_norm_of_constant_nodes(run_passes, outputs):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) {
            w = Constant <value = float[1, 1, 1, 1] {3}> ()
            s = Constant <value = float[1] {2}> ()
            b = Constant <value = float[1] {1}> ()
            m = Constant <value = float[1] {0.5}> ()
            v = Constant <value = float[1] {4}> ()
            c = Conv(x, w)
            d = Dropout(c)
            y = BatchNormalization(d, s, b, m, v)
        }""")
    feed = image(1, 1, 4, 4)
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Conv"]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-6)


def test_patch_embedding(b, run_passes, outputs):
    y = b.op("Conv", b.input("x", ["n", 3, 8, 12]), b.floats(5, 3, 4, 4), b.floats(5), name="patch", strides=[4, 4])
    y = b.op("Transpose", b.op("Reshape", y, b.const(np.array([0, 5, -1]))), perm=[0, 2, 1])
    model = b.output(y).model()
    feed = image(2, 3, 8, 12)
    expected = outputs(model, feed)[0]
    report = run_passes(model, Cleanup())
    assert any("MatMul" in e.detail for e in report.edits)
    assert "Conv" not in {n.op_type for n in model.graph}
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "transposes"),
    [([0, 5, -1], 1), ([-1, 5, 6], 1), ([0, 0, 6], 1), ([0, -1, 6], 1), ([-1, 5, 0], 3), ([0, 6, -1], 3)],
)
def test_tokens_of_patches_are_read_as_they_are(b, run_passes, outputs, shape, transposes):
    """A grid of 2 x 3 patches; the last two shapes mix patches with images and channels."""
    y = b.op("Conv", b.input("x", ["n", 3, 8, 12]), b.floats(5, 3, 4, 4), b.floats(5), name="patch", strides=[4, 4])
    y = b.op("Transpose", b.op("Reshape", y, b.const(np.array(shape))), perm=[0, 2, 1])
    model = b.output(b.op("Exp", y)).model()
    feed = image(2, 3, 8, 12)
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph].count("Transpose") == transposes
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "bias", "vector"),
    [(["n", 6], [1, 4], True), ([2, 3, 6], [1, 1, 4], True), ([6], [1, 4], False), (["n", 6], [1, 1, 4], False)],
)
@pytest.mark.parametrize("first", [True, False])
def test_bias_becomes_a_vector(b, run_passes, outputs, x, bias, vector, first):
    """Unless it adds a dimension."""
    parts = b.op("MatMul", b.input("x", x), b.floats(6, 4)), b.floats(*bias)
    model = b.output(b.op("Add", *(parts if first else parts[::-1]), name="add")).model()
    feed = image(*(2 if d == "n" else d for d in x))
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup())
    add = next(n for n in model.graph if n.op_type in ("Add", "Gemm"))
    assert ([4] in [v.const_value.shape for v in add.inputs if v.const_value is not None]) == vector
    assert outputs(model, feed)[0].shape == expected.shape
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-6)


def test_downsampling_conv_stays_a_conv(b, run_passes):
    y = b.op("Conv", b.input("x", [1, 3, 8, 8]), b.floats(5, 3, 2, 2), name="down", strides=[2, 2])
    model = b.output(b.op("Relu", y)).model()
    run_passes(model, Cleanup())
    assert [n.op_type for n in model.graph] == ["Conv", "Relu"]


def test_value_that_an_output_needs_is_not_folded_away(b, run_passes, outputs):
    conv = b.op("Conv", b.input("x", [1, 4, 6, 6]), b.floats(4, 4, 1, 1), name="conv")
    scaled = b.op("Mul", conv, b.const(np.float32(3)))
    model = b.output(conv).output(scaled).model()
    feed = image(1, 4, 6, 6)
    expected = outputs(model, feed)
    run_passes(model, Cleanup())
    assert [v.name for v in model.graph.outputs] == [conv, scaled]
    for found, want in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_allclose(found, want, rtol=1e-5)


def test_portable_functions_stay_and_others_are_inlined(run_passes, outputs):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1, "onnxcomp" : 1]>
        g (float[2] x) => (float[2] y) { a = local.Twice(x)  y = onnxcomp.Keep(a) }
        <domain: "local", opset_import: ["" : 17]> Twice (v) => (w) { w = Add(v, v) }
        <domain: "onnxcomp", opset_import: ["" : 17]> Keep (v) => (w) { w = Neg(v) }""")
    run_passes(model, Cleanup(), check="none")
    assert [n.op_type for n in model.graph] == ["Add", "Keep"]
    np.testing.assert_array_equal(outputs(model, {"x": np.array([1, 2], np.float32)})[0], [-2, -4])
