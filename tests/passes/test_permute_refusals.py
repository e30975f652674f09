"""Channels that have to stay where they are, and the reasons given; the model then keeps its bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto
from rotated import feed, transformer

from onnxcomp.edit import constant
from onnxcomp.errors import CalibrationError, OnnxcompError, RecipeError
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.permute import Permute
from onnxcomp.recipe import parse_recipe
from onnxcomp.select import Select
from onnxcomp.testing import _text

PLAIN = {"score": "magnitude", "include_ends": True}


def down(b: Builder, y: str, width: int = 16) -> ir.Model:
    return b.output(b.op("MatMul", y, b.floats(width, 4), name="down")).model()


def up(b: Builder, width: int = 16) -> str:
    return b.op("MatMul", b.input("x", ["n", 8]), b.floats(8, width), name="up")


def graph_input(b: Builder) -> ir.Model:
    return down(b, b.input("x", ["n", 16]))


def graph_output(b: Builder) -> ir.Model:
    y = b.op("Relu", up(b), name="relu")
    b.output(y)
    return down(b, y)


def no_rule(b: Builder) -> ir.Model:
    return down(b, b.op("CumSum", up(b), b.const(np.int64(1)), name="sum"))


def other_order(b: Builder) -> ir.Model:
    """Channels meet themselves in reverse: what moves one would have to move the other."""
    y = up(b, 4)
    reverse = b.op("Gather", y, b.const(np.arange(4)[::-1].copy()), axis=1)
    return down(b, b.op("Concat", b.op("Add", y, reverse), b.op("Mul", y, reverse), axis=1), 8)


def picked(b: Builder) -> ir.Model:
    """Every channel is picked out by itself by some op."""
    y = up(b, 8)
    parts = [b.op("Gather", y, b.const(np.array([i])), axis=1) for i in range(8)]
    b.output(b.op("Mul", parts[0], parts[1]))
    total = b.op("Sum", *(b.op("Mul", p, b.const(np.float32(i))) for i, p in enumerate(parts)))
    b.output(total)
    return down(b, b.op("Relu", y), 8)


def too_few(b: Builder) -> ir.Model:
    return down(b, b.op("Relu", up(b, 6)), 6)


def blocked_scales(b: Builder) -> ir.Model:
    """A scale for every eight inputs of an output."""
    q = b.const(b.rng.integers(-127, 128, (16, 4)).astype(np.int8))
    w = b.op("DequantizeLinear", q, b.const(b.rng.uniform(0.01, 0.02, (2, 4)).astype(np.float32)), axis=0, block_size=8)
    return b.output(b.op("MatMul", b.op("Relu", up(b)), w, name="down")).model(opset=21)


def subgraph(b: Builder) -> ir.Model:
    weights = [", ".join(f"{x:.4f}" for x in b.rng.normal(size=n)) for n in (32, 16)]
    model = ir.from_onnx_text(f"""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 4] x, bool c) => (float[3, 2] y, float[3, 8] z)
        <float[4, 8] w = {{{weights[0]}}}, float[8, 2] v = {{{weights[1]}}}> {{
            a = MatMul(x, w)
            y = MatMul(a, v)
            z = If (c) <
                then_branch = t () => (float[3, 8] p) {{ p = Relu(a) }},
                else_branch = e () => (float[3, 8] q) {{ q = Neg(a) }}>
        }}""")
    for node, name in zip(model.graph, ("up", "down", "if"), strict=True):
        node.name = name
    return model


REFUSED: dict[str, tuple[Callable[[Builder], ir.Model], str]] = {
    "graph_input": (graph_input, "'x' is an input of the graph"),
    "graph_output": (graph_output, "'relu_out' is an output of the graph"),
    "no_rule": (no_rule, "CumSum 'sum' does not commute with another order of"),
    "other_order": (other_order, "cannot be reordered"),
    "picked": (picked, "picks a single channel out"),
    "too_few": (too_few, "there are no two groups of 4"),
    "blocked_scales": (blocked_scales, "tells their positions apart"),
    "subgraph": (subgraph, "in a subgraph reads the channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_reason(case, b, run_passes):
    make, reason = REFUSED[case]
    model = make(b)
    before = _text(model)
    edits = run_passes(model, Permute(**PLAIN), check="none").edits
    assert not [e for e in edits if e.action == "applied"]
    assert reason in next(e.detail for e in edits if e.node == "down")
    assert _text(model) == before


def test_a_part_that_an_op_holds_stays(b, run_passes, outputs):
    """Of 24 channels, eight are an output of the model."""
    y = b.op("Relu", up(b, 24), name="relu")
    b.output(b.op("Slice", y, b.const(np.array([8])), b.const(np.array([16])), b.const(np.array([1]))))
    model = down(b, y, 24)
    given = {"x": np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)}
    expected = outputs(model, given)
    old = constant(next(n for n in model.graph if n.name == "up").inputs[1]).copy()
    edits = run_passes(model, Permute(**PLAIN)).edits
    assert next(e for e in edits if e.node == "down").action == "applied"
    new = constant(next(n for n in model.graph if n.name == "up").inputs[1])
    np.testing.assert_array_equal(new[:, 8:16], old[:, 8:16])
    assert (new != old).any()
    for found, wanted in zip(outputs(model, given), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_residual_stream_is_left_alone_on_request(run_passes):
    model = transformer(groups=2)
    edits = run_passes(model, Permute(residual=False), data=[feed()]).edits
    assert {e.node for e in edits if e.action == "applied"} == {"o", "down"}
    refused = {e.node: e.detail for e in edits if e.action == "refused"}
    assert refused["q"] == refused["up"] == "its inputs are a residual stream; residual = true reorders it, too"


def test_what_is_not_selected_stays(run_passes, b):
    model = down(b, b.op("Relu", up(b)))
    before = _text(model)
    edits = run_passes(model, Permute(**PLAIN, where=Select(name=("down",)))).edits
    assert [e.detail for e in edits] == ["its inputs cannot be reordered: MatMul 'up' is not selected"]
    assert _text(model) == before


def test_a_masked_layer_keeps_its_mask(run_passes, b):
    model = down(b, b.op("Relu", up(b)))
    run_passes(model, NmMask(method="magnitude", include_ends=True))
    before = _text(model)
    edits = run_passes(model, Permute(**PLAIN)).edits
    assert {e.node: e.detail for e in edits}["down"] == "its weight is 2:4 sparse already; permute goes before nm_mask"
    assert _text(model) == before


def test_a_default_of_an_input_is_no_constant(run_passes, b):
    model = down(b, b.op("Relu", up(b)))
    value = next(n for n in model.graph if n.name == "up").inputs[1]
    model.graph.inputs.append(value)
    edits = run_passes(model, Permute(**PLAIN, cache=True)).edits
    assert "is an input of the graph" in next(e.detail for e in edits if e.node == "down")


def test_data_and_pattern(run_passes, b):
    model = down(b, b.op("Relu", up(b)))
    with pytest.raises(CalibrationError, match="calibration data"):
        run_passes(model.clone(), Permute(include_ends=True))
    with pytest.raises(RecipeError, match="N:M"):
        Permute(pattern="4:4")
    with pytest.raises(OnnxcompError):
        parse_recipe('version = 1\nsummary = ""\n[[passes]]\npass = "permute"\nsearch = "luck"')


def test_without_scipy(run_passes, b, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    model = down(b, b.op("Relu", up(b)))
    with pytest.raises(OnnxcompError, match=r"pip install 'onnxcomp\[permute\]'"):
        run_passes(model, Permute(**PLAIN, search="assignment"))
    run_passes(model, Permute(**PLAIN))


def test_weight_of_a_looked_up_table(run_passes, outputs, b):
    """Rows of a table are the inputs of a MLP; its columns move with them."""
    x = b.op("Gather", b.floats(10, 16), b.input("ids", [5], TensorProto.INT64), name="embed")
    model = b.output(b.op("MatMul", x, b.floats(16, 4), name="down")).model()
    given = {"ids": np.arange(5)}
    expected = outputs(model, given)[0]
    edits = run_passes(model, Permute(**PLAIN)).edits
    assert any(e.node == "down" and e.action == "applied" for e in edits)
    np.testing.assert_allclose(outputs(model, given)[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
