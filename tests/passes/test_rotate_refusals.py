"""What does not turn, and the reasons given: nothing of a stream turns unless all of it can."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto
from rotated import TOKENS, VOCABULARY, WIDTH, attend, embed, feed, gamma, layer_op, linear, rms_pow, transformer

from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.rotate import Rotate
from onnxcomp.select import Select


def finish(b: Builder, x: str) -> Builder:
    """A layer and a head behind the stream `x`."""
    y = linear(b, b.op("Sigmoid", linear(b, rms_pow(b, x), WIDTH, 32, "up")), 32, WIDTH, "down")
    return b.output(linear(b, rms_pow(b, b.op("Add", x, y)), WIDTH, VOCABULARY, "head"))


def graph_input(b: Builder) -> Builder:
    return finish(b, b.input("x", [2, TOKENS, WIDTH]))


def graph_output(b: Builder) -> Builder:
    x, _ = embed(b)
    return finish(b, x).output(x)


def nonlinear_reader(b: Builder) -> Builder:
    x, _ = embed(b)
    return finish(b, x).output(b.op("Tanh", x, name="spy"))


def post_norm(b: Builder) -> Builder:
    """BERT: the output of a norm is the stream, gain included."""
    x, _ = embed(b)
    for i in range(2):
        y = b.op("Sigmoid", linear(b, x, WIDTH, 32, f"up{i}"))
        x = layer_op(b, b.op("Add", x, linear(b, y, 32, WIDTH, f"down{i}"), name=f"residual{i}"))
    return b.output(linear(b, x, WIDTH, VOCABULARY, "head"))


def in_and_out(b: Builder) -> Builder:
    x, _ = embed(b)
    return finish(b, b.op("Add", x, linear(b, rms_pow(b, x), WIDTH, WIDTH, "square")))


def weight_shared_with_another_op(b: Builder) -> Builder:
    x, table = embed(b)
    return finish(b, x).output(b.op("Tanh", table, name="spy"))


def computed_weight(b: Builder) -> Builder:
    x, _ = embed(b)
    weight = b.op("Tanh", b.floats(WIDTH, 32), name="weight")
    return finish(b, x).output(b.op("MatMul", layer_op(b, x), weight, name="dynamic"))


def channels_joined(b: Builder) -> Builder:
    """Swin's patch merging."""
    x, _ = embed(b)
    y = layer_op(b, x)
    return b.output(linear(b, b.op("Concat", y, y, axis=-1, name="merge"), 2 * WIDTH, VOCABULARY, "head"))


def norm_of_a_group(b: Builder) -> Builder:
    """RMSNorm over half of the channels at a time."""
    x, _ = embed(b)
    halves = b.op("Reshape", x, b.const(np.array([0, TOKENS, 2, WIDTH // 2])))
    y = b.op("LayerNormalization", halves, b.floats(WIDTH // 2), name="group")
    y = b.op("Reshape", y, b.const(np.array([0, TOKENS, WIDTH])))
    return b.output(b.op("Tanh", y, name="last"))


def sum_of_squares_over_tokens(b: Builder) -> Builder:
    x, _ = embed(b)
    wrong = b.op("ReduceMean", b.op("Mul", x, x, name="squares"), axes=[1])
    return finish(b, x).output(wrong)


def quotient_of_itself(b: Builder) -> Builder:
    x, _ = embed(b)
    return finish(b, x).output(b.op("ReduceMean", b.op("Div", x, x, name="ones"), axes=[-1]))


def tokens_in_pairs(b: Builder) -> Builder:
    """Two tokens make a row behind the norm, so that gamma is no vector of the row any more."""
    x = b.op("Gather", b.floats(VOCABULARY, WIDTH), b.input("ids", [2, 4], TensorProto.INT64))
    pairs = b.op("Reshape", layer_op(b, x), b.const(np.array([2, 2, 2 * WIDTH])), name="pairs")
    return b.output(linear(b, pairs, 2 * WIDTH, VOCABULARY, "head"))


def no_layer(b: Builder) -> Builder:
    """Nothing reads the channels."""
    x, _ = embed(b)
    return b.output(b.op("Shape", layer_op(b, x)), TensorProto.INT64)


def not_finite(b: Builder) -> Builder:
    x, _ = embed(b)
    bad = np.full((WIDTH, 32), np.nan, np.float32)
    return finish(b, x).output(b.op("MatMul", rms_pow(b, x), b.const(bad, "bad"), name="nan"))


def overridable(b: Builder) -> Builder:
    x, _ = embed(b)
    b.input("table", [VOCABULARY, WIDTH])  # the weight is now but a default
    return finish(b, x)


CASES = {
    graph_input: "'x' is an input of the graph",
    graph_output: "is an output of the graph",
    nonlinear_reader: "Tanh 'spy' does not commute",
    post_norm: "Add 'residual1' does not commute",
    in_and_out: "both reads and writes",
    weight_shared_with_another_op: "is read by an op besides that does not turn",
    computed_weight: "the weight of 'dynamic' is computed",
    channels_joined: "Concat 'merge' does not commute",
    norm_of_a_group: "several times those that a norm scales",
    sum_of_squares_over_tokens: "Mul 'squares' does not commute",
    quotient_of_itself: "Div 'ones' does not commute",
    tokens_in_pairs: "several times those that a norm scales",
    no_layer: "no linear op reads the channels",
    not_finite: "holds NaN or infinity",
    overridable: "'table' is an input of the graph",
}


@pytest.mark.parametrize("build", CASES, ids=lambda f: f.__name__)
def test_reason(build, run_passes):
    model = build(Builder()).model()
    before = ir.to_onnx_text(model)
    edits = run_passes(model, Rotate(online=False)).edits
    assert edits
    assert all(e.action == "refused" for e in edits)
    assert any(CASES[build] in e.detail for e in edits), [e.detail for e in edits]
    assert ir.to_onnx_text(model) == before


def test_reader_in_a_subgraph(run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (int64[2, 4] ids, bool c) => (float[2, 4, 8] y)
        <float[2, 8] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}, float[8] one = {1, 1, 1, 1, 1, 1, 1, 1},
         float[8, 1] w = {1, 1, 1, 1, 1, 1, 1, 1}> {
            x = Gather(table, ids)
            n = LayerNormalization(x, one)
            m = MatMul(n, w)
            y = If (c) <
                then_branch = t () => (float[2, 4, 8] p) { p = Tanh(x) },
                else_branch = e () => (float[2, 4, 8] q) { q = Identity(m) }>
        }""")
    edits = run_passes(model, Rotate()).edits
    assert "in a subgraph reads the channels" in next(e.detail for e in edits)


def test_norm_in_a_subgraph(run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 8] x, bool c, float[8] one) => (float[2, 8] y) {
            y = If (c) <
                then_branch = t () => (float[2, 8] p) { p = LayerNormalization(x, one) },
                else_branch = e () => (float[2, 8] q) { q = Identity(x) }>
        }""")
    edits = run_passes(model, Rotate()).edits
    assert [e.detail for e in edits] == ["it stands in a subgraph or function"]


def test_quantized_already(run_passes):
    model = transformer()
    data = [feed(i) for i in range(2)]
    run_passes(model, Quantize(), data=data)
    edits = run_passes(model, Rotate()).edits
    assert all(e.action == "refused" for e in edits)
    assert "quantized already" in edits[0].detail


def test_values_that_something_else_reads(run_passes):
    b = Builder()
    x, _ = embed(b)
    y = attend(b, rms_pow(b, x), bias=False)
    weigh = next(n for n in b.nodes if n.name == "weigh")
    b.output(y).output(b.op("Tanh", weigh.input[1], name="spy"))
    edits = run_passes(b.model(), Rotate(stream=False)).edits
    assert ["Tanh 'spy' does not commute" in e.detail for e in edits] == [True]


def test_untyped_values_and_open_sizes(run_passes):
    b = Builder()
    ids = b.input("ids", ["batch", "tokens"], TensorProto.INT64)
    x = b.op("Gather", b.floats(VOCABULARY, WIDTH), ids)
    mixed = b.op("Reshape", x, b.input("shape", ["rank"], TensorProto.INT64))
    edits = run_passes(b.output(linear(b, layer_op(b, mixed), WIDTH, 4, "fc")).model(), Rotate()).edits
    assert [e.detail for e in edits if "not known" in e.detail]


def test_online_refuses_odd_channels(run_passes):
    b = Builder()
    x, _ = embed(b)
    y = b.op("Sigmoid", linear(b, rms_pow(b, x), WIDTH, 34, "up"))
    y = b.op("Add", x, linear(b, y, 34, WIDTH, "down"))
    model = b.output(linear(b, rms_pow(b, y), WIDTH, VOCABULARY, "head")).model()
    edits = run_passes(model, Rotate(online=True)).edits
    reasons = {e.node: e.detail for e in edits if e.action == "refused"}
    assert reasons["down"] == "its 34 channels make no blocks of 16 or more"


def test_selected_alone(run_passes):
    assert not run_passes(transformer(), Rotate(where=Select(name=("nothing",)))).edits


def test_computed_gamma(run_passes):
    b = Builder()
    x, _ = embed(b)
    scale = b.op("Tanh", gamma(b))
    y = b.op("LayerNormalization", x, scale, name="norm")
    edits = run_passes(b.output(linear(b, y, WIDTH, 4, "fc")).model(), Rotate()).edits
    assert "LayerNormalization 'norm' does not commute" in edits[0].detail
