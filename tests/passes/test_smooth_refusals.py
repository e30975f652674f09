"""What smoothing leaves alone, and the reasons it gives."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.smooth import Smooth

SPREAD = np.geomspace(1, 50, 8).astype(np.float32)


@pytest.fixture
def data():
    return [{"x": np.random.default_rng(i).normal(size=(32, 8)).astype(np.float32)} for i in range(4)]


def normed(b: Builder) -> str:
    return b.op("LayerNormalization", b.input("x", [32, 8]), b.const(SPREAD), b.floats(8), name="norm")


def other_reader(b: Builder) -> Builder:
    y = normed(b)
    return b.output(b.op("MatMul", y, b.floats(8, 4), name="fc")).output(b.op("Neg", y, name="spy"))


def graph_output(b: Builder) -> Builder:
    y = normed(b)
    return b.output(b.op("MatMul", y, b.floats(8, 4), name="fc")).output(y)


def shared_weight(b: Builder) -> Builder:
    y, weight = normed(b), b.floats(8, 8)
    z = b.op("MatMul", y, weight, name="fc")
    return b.output(b.op("MatMul", z, weight, name="again"))


def half_weight(b: Builder) -> Builder:
    y = b.op("Cast", normed(b), to=10)
    y = b.op("MatMul", y, b.const(b.rng.normal(size=(8, 4)).astype(np.float16)), name="fc")
    return b.output(b.op("Cast", y, to=1))


def three_dimensions(b: Builder) -> Builder:
    return b.output(b.op("MatMul", normed(b), b.floats(1, 8, 4), name="fc"))


def scaled_gemm(b: Builder) -> Builder:
    return b.output(b.op("Gemm", normed(b), b.floats(8, 4), name="fc", alpha=2.0))


def computed_gamma(b: Builder) -> Builder:
    x = b.input("x", [32, 8])
    scale = b.op("ReduceMax", x, axes=[0], keepdims=0)
    y = b.op("LayerNormalization", x, scale, b.floats(8), name="norm")
    return b.output(b.op("MatMul", y, b.floats(8, 4), name="fc"))


def an_input(b: Builder) -> Builder:
    return b.output(b.op("MatMul", b.input("x", [32, 8]), b.floats(8, 4), name="fc"))


def behind_a_sigmoid(b: Builder) -> Builder:
    return b.output(b.op("MatMul", b.op("Sigmoid", normed(b)), b.floats(8, 4), name="fc"))


def two_activations(b: Builder) -> Builder:
    y = normed(b)
    return b.output(b.op("MatMul", y, b.op("Transpose", y, perm=[1, 0]), name="fc"))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (other_reader, "read by Neg 'spy' too"),
        (graph_output, "an output of the graph"),
        (shared_weight, "shared with another op"),
        (half_weight, "float16"),
        (three_dimensions, "3 dimensions"),
        (scaled_gemm, "alpha"),
        (computed_gamma, "no constant float32 vector"),
        (an_input, "an input of the graph"),
        (behind_a_sigmoid, "comes from Sigmoid"),
        (two_activations, "not constant"),
    ],
)
def test_refusals(build, reason, b, data, run_passes):
    model = build(b).model()
    before = ir.to_onnx_text(model)
    report = run_passes(model, Smooth(rows=64), data=data)
    assert not report.applied
    assert any(e.node == "fc" and reason in e.detail for e in report.edits), [e.detail for e in report.edits]
    assert ir.to_onnx_text(model) == before


def test_nothing_to_gain(b, data, run_passes):
    """Channels of one width."""
    y = b.op(
        "LayerNormalization", b.input("x", [32, 8]), b.const(np.ones(8, np.float32)), b.const(np.zeros(8, np.float32))
    )
    weight = np.linalg.qr(b.rng.normal(size=(8, 8)))[0].astype(np.float32)
    model = b.output(b.op("MatMul", y, b.const(weight), name="fc")).model()
    report = run_passes(model, Smooth(rows=128, min_gain=0.3), data=data)
    assert [e.detail for e in report.edits] == ["no scale lowers the held-out output error by 30%"]


def test_a_quantized_model_is_left_alone(b, data, run_passes):
    model = b.output(b.op("MatMul", normed(b), b.floats(8, 4), name="fc")).model()
    run_passes(model, Quantize(), data=data)
    before = ir.to_onnx_text(model)
    report = run_passes(model, Smooth(rows=64), data=data)
    assert [(e.action, e.detail) for e in report.edits] == [
        ("refused", "it is quantized already; scales go into float weights")
    ]
    assert ir.to_onnx_text(model) == before


def test_subgraphs_and_what_they_read(run_passes):
    """The MatMul in the branch cannot be observed; the one outside shares its input with the branch."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[32, 4] x, bool c) => (float[32, 4] y, float[32, 4] z)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4] s = {1, 30, 1, 1}> {
            n = LayerNormalization(x, s)
            z = MatMul(n, w)
            y = If (c) <
                then_branch = t () => (float[32, 4] p) { p = MatMul(n, n) },
                else_branch = e () => (float[32, 4] q) { q = Identity(n) }>
        }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    feed = {"x": np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32), "c": np.array(False)}
    report = run_passes(model, Smooth(rows=32), data=[feed])
    assert not report.applied
    reasons = [e.detail for e in report.edits]
    assert any("subgraph" in r for r in reasons)
    assert any("too, which cannot undo it" in r for r in reasons)
