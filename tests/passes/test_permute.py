"""Orders of channels in every form of layer: outputs stay, groups keep more, and what is shared moves together."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from rotated import NORMS, feed, fused, transformer

from onnxcomp.edit import constant
from onnxcomp.passes._permutation_flow import Flow
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.permute import Permute
from onnxcomp.rewrite import Edit
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

Example = tuple[ir.Model, dict[str, np.ndarray]]


def sample(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(5).normal(size=shape).astype(np.float32)}


def uneven(b: Builder, *shape: int, axis: int = 0) -> str:
    """A weight whose large channels stand side by side, so that another order keeps more."""
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    strength = np.where(np.arange(shape[axis]) % 8 < 4, 3.0, 0.3).reshape(sizes)
    return b.const((b.rng.normal(size=shape) * strength).astype(np.float32))


def plain_mlp() -> Example:
    b = Builder()
    y = b.op("Gemm", b.input("x", ["n", 6]), b.floats(6, 16), b.floats(16), name="up")
    return b.output(b.op("Gemm", b.op("Relu", y), uneven(b, 3, 16, axis=1), name="down", transB=1)).model(), sample(
        9, 6
    )


def transposed() -> Example:
    b = Builder()
    up = b.op("Transpose", b.floats(16, 6), perm=[1, 0])
    y = b.op("Add", b.op("MatMul", b.input("x", [2, 5, 6]), up, name="up"), b.floats(16))
    down = b.op("Transpose", uneven(b, 3, 16, axis=1), perm=[1, 0])
    return b.output(b.op("MatMul", b.op("Erf", y), down, name="down")).model(), sample(2, 5, 6)


def gated() -> Example:
    b = Builder()
    x = b.input("x", [2, 5, 6])
    gate, up = (b.op("MatMul", x, b.floats(6, 16), name=n) for n in ("gate", "up"))
    y = b.op("Mul", b.op("Mul", gate, b.op("Sigmoid", gate)), up)
    return b.output(b.op("MatMul", y, uneven(b, 16, 3), name="down")).model(), sample(2, 5, 6)


def merged_gate() -> Example:
    b = Builder()
    y = b.op("Add", b.op("MatMul", b.input("x", [2, 5, 6]), b.floats(6, 32), name="both"), b.floats(32))
    b.op("Split", y, axis=-1, num_outputs=2, name="split")
    b.nodes[-1].output[:] = ["gate", "up"]
    y = b.op("Mul", b.op("Sigmoid", "gate"), "up")
    return b.output(b.op("MatMul", y, uneven(b, 16, 3), name="down")).model(opset=18), sample(2, 5, 6)


def sliced_gate() -> Example:
    b = Builder()
    y = b.op("MatMul", b.input("x", [2, 5, 6]), b.floats(6, 32), name="both")
    at = {n: b.const(np.array([n])) for n in (0, 16, 32, -1)}
    gate, up = (b.op("Slice", y, at[s], at[e], at[-1]) for s, e in ((0, 16), (16, 32)))
    return b.output(b.op("MatMul", b.op("Mul", b.op("Tanh", gate), up), uneven(b, 16, 3), name="down")).model(), sample(
        2, 5, 6
    )


def merged_qkv() -> Example:
    """One projection whose three parts are split off along the channels."""
    b = Builder()
    y = b.op("Add", b.op("MatMul", b.input("x", [2, 5, 8]), b.floats(8, 48), name="qkv"), b.floats(48))
    b.op("Split", y, b.const(np.array([16, 16, 16])), axis=2, name="split")
    b.nodes[-1].output[:] = ["q", "k", "v"]
    shape = b.const(np.array([0, 0, 2, 8]))
    q, k, v = (b.op("Transpose", b.op("Reshape", n, shape), perm=[0, 2, 1, 3]) for n in "qkv")
    y = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = b.op("Transpose", b.op("MatMul", y, v), perm=[0, 2, 1, 3])
    y = b.op("Reshape", y, b.const(np.array([0, 0, 16])))
    return b.output(b.op("MatMul", y, uneven(b, 16, 8), name="o")).model(), sample(2, 5, 8)


def convolutions() -> Example:
    """Conv, BatchNormalization, ReLU6, depthwise, hard swish, pooling, Pad and Resize on the way to a Conv."""
    b = Builder()
    y = b.op("Conv", b.input("x", [2, 3, 8, 8]), b.floats(16, 3, 3, 3), b.floats(16), name="stem", pads=[1, 1, 1, 1])
    y = b.op("BatchNormalization", y, *(b.const(b.rng.uniform(0.5, 2, 16).astype(np.float32)) for _ in range(4)))
    y = b.op("Clip", y, b.const(np.float32(0)), b.const(np.float32(6)))
    y = b.op("Conv", y, b.floats(16, 1, 3, 3), b.floats(16), name="depthwise", group=16)
    y = b.op("PRelu", b.op("HardSwish", y), b.floats(16, 1, 1))
    y = b.op("MaxPool", y, kernel_shape=[2, 2], strides=[2, 2])
    y = b.op("Pad", y, b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1])))
    y = b.op("Resize", y, "", b.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    return b.output(b.op("Conv", y, uneven(b, 5, 16, 3, 3, axis=1), name="last")).model(), sample(2, 3, 8, 8)


def squeeze_excite() -> Example:
    b = Builder()
    y = b.op("Relu", b.op("Conv", b.input("x", [2, 3, 6, 6]), b.floats(16, 3, 1, 1), name="expand"))
    s = b.op("Relu", b.op("Conv", b.op("GlobalAveragePool", y), uneven(b, 8, 16, 1, 1, axis=1), name="squeeze"))
    s = b.op("HardSigmoid", b.op("Conv", s, b.floats(16, 8, 1, 1), b.floats(16), name="excite"))
    y = b.op("Mul", y, s)
    return b.output(b.op("Conv", y, uneven(b, 4, 16, 1, 1, axis=1), name="project")).model(), sample(2, 3, 6, 6)


def grouped() -> Example:
    """Channels stay within their group of a grouped convolution."""
    b = Builder()
    y = b.op("Relu", b.op("Conv", b.input("x", [2, 3, 6, 6]), b.floats(16, 3, 1, 1), b.floats(16), name="stem"))
    y = b.op("Conv", y, uneven(b, 4, 8, 3, 3, axis=1), name="groups", group=2)
    return b.output(b.op("Relu", y)).model(), sample(2, 3, 6, 6)


def flattened() -> Example:
    """Channels of a Conv of which each becomes nine inputs of a Gemm."""
    b = Builder()
    y = b.op("Relu", b.op("Conv", b.input("x", [2, 3, 5, 5]), b.floats(16, 3, 3, 3), name="conv"))
    y = b.op("Flatten", b.op("Transpose", y, perm=[0, 2, 3, 1]))
    return b.output(b.op("Gemm", y, uneven(b, 144, 4), name="down")).model(), sample(2, 3, 5, 5)


def dense() -> Example:
    """Two convolutions whose outputs are joined: channels stay in their part."""
    b = Builder()
    x = b.input("x", [2, 3, 6, 6])
    parts = [b.op("Relu", b.op("Conv", x, b.floats(8, 3, 1, 1), b.floats(8), name=n)) for n in ("left", "right")]
    y = b.op("Concat", *parts, axis=1)
    return b.output(b.op("Conv", y, uneven(b, 4, 16, 1, 1, axis=1), name="last")).model(), sample(2, 3, 6, 6)


def quantized() -> Example:
    """Integer weights with a scale for each output, and quantized activations."""
    b = Builder()
    y = b.op("MatMul", b.qdq(b.input("x", [4, 8])), b.weight((8, 16), 1), name="up")
    y = b.qdq(b.op("Relu", b.op("Add", y, b.floats(16))))
    return b.output(b.op("MatMul", y, b.weight((16, 4), 1), name="down")).model(), sample(4, 8)


def shared_weight() -> Example:
    """A square weight that two layers in a row read: one order for both sides of it."""
    b = Builder()
    weight = uneven(b, 16, 16)
    y = b.op("Relu", b.op("MatMul", b.input("x", [4, 8]), b.floats(8, 16), name="up"))
    y = b.op("Relu", b.op("MatMul", y, weight, name="one"))
    y = b.op("Relu", b.op("MatMul", y, weight, name="two"))
    return b.output(b.op("MatMul", y, b.floats(16, 4), name="down")).model(), sample(4, 8)


def shared_vector() -> Example:
    """A bias that two spaces read, which gets a copy for each order."""
    b = Builder()
    bias = b.floats(16)
    y = b.op("Relu", b.op("Gemm", b.input("x", [4, 8]), b.floats(8, 16), bias, name="one"))
    y = b.op("Relu", b.op("Gemm", y, uneven(b, 16, 16), bias, name="two"))
    return b.output(b.op("Gemm", y, uneven(b, 16, 4), name="three")).model(), sample(4, 8)


FORMS: dict[str, Callable[[], Example]] = {
    f.__name__: f
    for f in (
        plain_mlp, transposed, gated, merged_gate, sliced_gate, merged_qkv, convolutions, squeeze_excite, grouped,
        flattened, dense, quantized, shared_weight, shared_vector,
    )
}  # fmt: skip


def shares(edit: Edit) -> tuple[float, float]:
    """Kept before and after, in percent."""
    before, after = edit.detail.split(" keeps ")[1].split("% of")[0].split("% -> ")
    return float(before), float(after)


def kept(model: ir.Model, name: str, data: list[dict[str, np.ndarray]]) -> float:
    """Share of the magnitudes that a mask of each layer leaves, measured on the weights themselves."""
    node = next(n for n in model.graph if n.name == name)
    weight = constant(node.inputs[1])
    assert weight is not None
    axis = 1 if node.op_type == "Conv" or "transB" in node.attributes else 0
    rows = np.abs(np.moveaxis(weight, axis, -1)).astype(np.float64)
    groups = np.sort(rows.reshape(*rows.shape[:-1], -1, 4), axis=-1)
    return float(groups[..., 2:].sum() / rows.sum())


@pytest.mark.parametrize("score", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("search", ["deal", "swaps", "assignment"])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_stay_and_groups_keep_more(form, search, score, run_passes, outputs):
    if search == "assignment":
        pytest.importorskip("scipy", reason="needs scipy")
    model, given = FORMS[form]()
    expected = outputs(model, given)
    nodes = [n.op_type for n in model.graph]
    step = Permute(search=search, score=score, include_ends=True)
    edits = run_passes(model, step, data=[given]).edits
    done = [e for e in edits if e.action == "applied"]
    if search != "deal":
        assert done, [e.detail for e in edits]
    if len(done) == 1:
        assert shares(done[0])[0] <= shares(done[0])[1]
    for found, wanted in zip(outputs(model, given), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert [n.op_type for n in model.graph] == nodes


@pytest.mark.parametrize("form", FORMS)
def test_contract(form, capabilities):
    model, given = FORMS[form]()
    check_pass(Permute(include_ends=True), model, capabilities=capabilities, runner=reference_runner, data=[given] * 2)


@pytest.mark.parametrize("form", ["plain_mlp", "gated", "convolutions", "merged_gate"])
def test_report_is_what_the_weights_say(form, run_passes):
    model, given = FORMS[form]()
    edits = run_passes(model, Permute(score="magnitude", include_ends=True), data=[given]).edits
    changed = [e for e in edits if e.action == "applied" and e.node in ("down", "last")]
    assert len(changed) == 1
    node = next(n for n in model.graph if n.name == changed[0].node)
    if node.op_type != "MatMul" or constant(node.inputs[1]) is not None:
        assert shares(changed[0])[1] == pytest.approx(100 * kept(model, changed[0].node, [given]), abs=0.06)
    assert shares(changed[0])[1] > shares(changed[0])[0]
    other = FORMS[form]()[0]
    assert shares(changed[0])[0] == pytest.approx(100 * kept(other, changed[0].node, [given]), abs=0.06)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("options", [{"bias": True}, {"tied": True}, {"groups": 2}, {"scale": True}], ids=str)
def test_whole_transformers(norm, options, run_passes, outputs):
    model = transformer(norm, **options)
    expected = outputs(model, feed(1))[0]
    edits = run_passes(model, Permute(), data=[feed()]).edits
    found = {e.node for e in edits if e.action == "applied"}
    assert found == {"q", "k", "v", "o", "gate", "up", "down"}
    np.testing.assert_allclose(outputs(model, feed(1))[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("norm", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_fused_ops(norm, run_passes, outputs):
    model = fused(norm)
    expected = outputs(model, feed(1))[0]
    edits = run_passes(model, Permute(), data=[feed()]).edits
    assert {e.node for e in edits if e.action == "applied"} == {"q", "k", "v", "o", "up", "down"}
    np.testing.assert_allclose(outputs(model, feed(1))[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_cache_moves_only_if_allowed(run_passes, outputs):
    given = {**feed(1), "lengths": np.full(3, 4, np.int32), "total": np.array([5], np.int32)}
    given |= {n: np.zeros((3, 1, 0, 24), np.float32) for n in ("past_key", "past_value")}
    given["lengths"] = np.full(3, 4, np.int32)
    for cache in (False, True):
        model = fused(cached=True)
        expected = outputs(model, given)
        edits = run_passes(model, Permute(cache=cache, score="magnitude")).edits
        o = next(e for e in edits if e.node == "o")
        assert o.action == ("applied" if cache else "refused")
        assert cache or "present_value" in o.detail or "past_value" in o.detail
        found = outputs(model, given)
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
        order = [np.abs(found[2] - expected[2][..., [i]]).max(axis=(0, 1, 2)).argmin() for i in range(24)]
        assert sorted(order) == list(range(24))
        assert (order != list(range(24))) == cache


def test_values_move_within_their_head(run_passes):
    model, given = merged_qkv()
    before = constant(next(n for n in model.graph if n.name == "qkv").inputs[1]).copy()
    run_passes(model, Permute(include_ends=True), data=[given])
    after = constant(next(n for n in model.graph if n.name == "qkv").inputs[1])
    np.testing.assert_array_equal(after[:, :32], before[:, :32])
    for head in (slice(32, 40), slice(40, 48)):
        assert sorted(map(tuple, after[:, head].T)) == sorted(map(tuple, before[:, head].T))
        assert (after[:, head] != before[:, head]).any()


def test_shared_constants(run_passes):
    model, given = shared_vector()
    run_passes(model, Permute(include_ends=True), data=[given])
    one, two = (constant(n.inputs[2]) for n in model.graph if n.name in ("one", "two"))
    assert (one != two).any()
    np.testing.assert_array_equal(np.sort(one), np.sort(two))
    model, given = shared_weight()
    run_passes(model, Permute(include_ends=True), data=[given])
    first, second = (n.inputs[1] for n in model.graph if n.name in ("one", "two"))
    assert first is second


def test_mask_loses_less_behind_it(run_passes, outputs):
    errors = []
    for passes in ([], [Permute(include_ends=True)]):
        model, given = gated()
        expected = outputs(model, given)[0]
        run_passes(
            model, *passes, NmMask(method="wanda", include_ends=True, where=Select(name=("down",))), data=[given]
        )
        errors.append(np.linalg.norm(outputs(model, given)[0] - expected))
    assert errors[1] < 0.9 * errors[0]


def test_order_depends_on_the_seed_alone(run_passes):
    found = []
    for data in ([sample(4, 5, 6)], [{"x": x[None]} for x in sample(4, 5, 6)["x"]]):
        b = Builder()
        x = b.input("x", ["n", 5, 6])
        y = b.op("Relu", b.op("MatMul", x, b.floats(6, 32), name="up"))
        model = b.output(b.op("MatMul", y, uneven(b, 32, 7), name="down")).model()
        run_passes(model, Permute(include_ends=True), data=data)
        found.append(constant(next(n for n in model.graph if n.name == "down").inputs[1]))
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", [np.float16])
def test_half_precision(dtype, run_passes, outputs):
    from onnx import TensorProto

    b = Builder()
    x = b.input("x", [4, 8], TensorProto.FLOAT16)
    half = lambda *s: b.const((b.rng.normal(size=s) * 0.3).astype(dtype))  # noqa: E731
    y = b.op("Relu", b.op("MatMul", x, half(8, 16), name="up"))
    model = b.output(b.op("MatMul", y, half(16, 4), name="down"), TensorProto.FLOAT16).model()
    given = {"x": np.random.default_rng(0).normal(size=(4, 8)).astype(dtype)}
    expected = outputs(model, given)[0].astype(np.float32)
    edits = run_passes(model, Permute(include_ends=True), data=[given]).edits
    assert any(e.node == "down" and e.action == "applied" for e in edits)
    np.testing.assert_allclose(outputs(model, given)[0], expected, rtol=0, atol=4e-3 * np.abs(expected).max())


@pytest.mark.parametrize("score", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("form", ["gated", "convolutions", "grouped", "quantized"])
def test_mask_keeps_what_was_promised(form, score, run_passes):
    """The share that `nm_mask` reports is the one that this pass reports as the later one."""
    model, given = FORMS[form]()
    edits = run_passes(model, Permute(score=score, include_ends=True), data=[given]).edits
    promised = {e.node: shares(e)[1] for e in edits if e.action == "applied"}
    masks = {e.node: e.detail for e in run_passes(model, NmMask(method=score, include_ends=True), data=[given]).edits}
    assert promised
    for name, share in promised.items():
        if form != "grouped" or score == "magnitude":  # what stands before was masked by then
            found = float(masks[name].split("keeps ")[1].split("%")[0])
            assert found == pytest.approx(share, abs=0.11 if score == "magnitude" else 1.5)


def test_an_order_that_no_rule_foresaw_is_refused(run_passes, outputs, monkeypatch):
    """Were values let out of their head, the check of every node would find that out."""
    model, given = merged_qkv()
    before, expected = ir.to_onnx_text(model), outputs(model, given)[0]
    classes = Flow.classes
    monkeypatch.setattr(Flow, "classes", lambda flow: np.minimum(classes(flow), 0))
    edits = run_passes(model, Permute(include_ends=True), data=[given]).edits
    assert "would see the channels in two different orders" in next(e.detail for e in edits if e.node == "o")
    assert ir.to_onnx_text(model) == before
    np.testing.assert_array_equal(outputs(model, given)[0], expected)
