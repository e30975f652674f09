"""Joint projections of attention, and tokens that nobody reads."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from builder import Builder

from onnxcomp.passes.cleanup import Cleanup

HEADS, SIZE, TOKENS = 2, 4, 5
WIDTH = HEADS * SIZE


def kinds(model) -> list[str]:
    return sorted(n.op_type for n in model.graph)


def joint(b: Builder, *, batch: int | str = 2, bias: bool = True, taken: str = "gather", parts=(0, 1, 2)) -> Builder:
    """Queries, keys and values of one product, each an output."""
    x = b.input("x", [batch, TOKENS, WIDTH])
    y = b.op("MatMul", x, b.floats(WIDTH, 3 * WIDTH), name="qkv")
    y = b.op("Add", y, b.floats(3 * WIDTH)) if bias else y
    if isinstance(batch, int):
        shape = b.const(np.array([batch, TOKENS, 3, HEADS, SIZE]))
    else:
        first = b.op("Slice", b.op("Shape", x), *(b.const(np.array([i])) for i in (0, 1)))
        shape = b.op("Concat", first, b.const(np.array([TOKENS, 3])), b.const(np.array([HEADS, SIZE])), axis=0)
    y = b.op("Transpose", b.op("Reshape", y, shape), perm=[2, 0, 3, 1, 4])
    if taken == "gather":
        found = [b.op("Gather", y, b.const(np.array(i)), axis=0) for i in parts]
    else:
        b.nodes.append(onnx.helper.make_node("Split", [y], ["s0", "s1", "s2"], axis=0, name="split"))
        found = [b.op("Squeeze", f"s{i}", b.const(np.array([0]))) for i in parts]
    for value in found:
        b.output(b.op("Relu", value))
    return b


@pytest.mark.parametrize("batch", [2, "n"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("taken", "parts"), [("gather", (0, 1, 2)), ("gather", (2, -3)), ("split", (0, 1, 2))])
def test_joint_projection_is_split(batch, bias, taken, parts, run_passes, outputs):
    model = joint(Builder(), batch=batch, bias=bias, taken=taken, parts=parts).model()
    feed = {"x": np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)}
    before = outputs(model, feed)
    edits = run_passes(model, Cleanup(), check="numeric", data=[feed]).edits
    assert any(e.detail == f"joint projection split into {len(parts)} products" for e in edits)
    found = kinds(model)
    assert found.count("MatMul") == len(parts)
    assert not {"Split", "Squeeze"} & set(found)
    for old, new in zip(before, outputs(model, feed), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)
    assert not any("joint" in e.detail for e in run_passes(model, Cleanup()).edits)


@pytest.mark.parametrize(
    "spoiled", ["product read elsewhere", "transposed value read elsewhere", "other order", "part kept"]
)
def test_joint_projection_stays(spoiled, run_passes):
    b = Builder()
    y = b.op("MatMul", b.input("x", [2, TOKENS, WIDTH]), b.floats(WIDTH, 3 * WIDTH))
    z = b.op("Reshape", y, b.const(np.array([2, TOKENS, 3, HEADS, SIZE])))
    z = b.op("Transpose", z, perm=[0, 2, 3, 1, 4] if spoiled == "other order" else [2, 0, 3, 1, 4])
    index = np.array([1]) if spoiled == "part kept" else np.array(1)
    b.output(b.op("Relu", b.op("Gather", z, b.const(index), axis=1 if spoiled == "other order" else 0)))
    if "elsewhere" in spoiled:
        b.output(b.op("Relu", y if spoiled.startswith("product") else z))
    model = b.model()
    run_passes(model, Cleanup())
    assert kinds(model).count("MatMul") == 1


def block(b: Builder, index: int, *, batch: int | str = 2, also: str = "") -> Builder:
    """A residual block with norms behind the mixing of tokens, of whose output one token is read."""
    x = b.input("x", [batch, TOKENS, WIDTH])
    mixed = b.op(
        "Transpose", b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 1]), b.floats(TOKENS, TOKENS)), perm=[0, 2, 1]
    )
    x = b.op("Add", b.op("Add", x, mixed), b.floats(1, TOKENS, WIDTH))
    y = b.op("LayerNormalization", x, b.floats(WIDTH), b.floats(WIDTH), name="norm")
    y = b.op("Add", b.op("MatMul", y, b.floats(WIDTH, 3 * WIDTH), name="up"), b.floats(3 * WIDTH))
    y = b.op("MatMul", b.op("Tanh", y), b.floats(3 * WIDTH, WIDTH), name="down")
    x = b.op("Add", x, y, name="residual")
    if also:
        b.output(b.op("Relu", f"{also}_out"))
    x = b.op("LayerNormalization", x, b.floats(WIDTH), b.floats(WIDTH), name="last")
    x = b.op("Gather", x, b.const(np.array(index)), axis=1)
    return b.output(b.op("MatMul", x, b.floats(WIDTH, 3)))


@pytest.mark.parametrize("batch", [2, "n"])
@pytest.mark.parametrize("index", [0, -1, [3]])
def test_token_is_taken_before_the_last_layers(index, batch, run_passes, outputs):
    model = block(Builder(), index, batch=batch).model()
    feed = {"x": np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)}
    before = outputs(model, feed)[0]
    run_passes(model, Cleanup(), check="numeric", data=[feed])
    after = outputs(model, feed)[0]
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    shapes = {n.name: n.outputs[0].shape for n in model.graph}
    assert [shapes[name][1] for name in ("norm", "up", "down", "residual", "last")] == [1] * 5
    assert not any("position" in e.detail for e in run_passes(model, Cleanup()).edits)


@pytest.mark.parametrize(("also", "full"), [("residual", "up"), ("last", "last"), ("up", "up")])
def test_token_of_what_is_read_elsewhere_is_taken_behind_it(also, full, run_passes, outputs):
    b = Builder()
    model = block(b, 1, also=also).model() if also != "last" else None
    if model is None:
        x = b.op("LayerNormalization", b.input("x", [2, TOKENS, WIDTH]), b.floats(WIDTH), name="last")
        b.output(b.op("Relu", x))
        model = b.output(b.op("Gather", x, b.const(np.array(1)), axis=1)).model()
    feed = {"x": np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)}
    before = outputs(model, feed)
    run_passes(model, Cleanup())
    for old, new in zip(before, outputs(model, feed), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    assert next(n for n in model.graph if n.name == full).outputs[0].shape[1] == TOKENS


def test_normalized_axis_is_not_cut(run_passes, outputs):
    b = Builder()
    x = b.op("LayerNormalization", b.input("x", [2, TOKENS, WIDTH]), b.floats(TOKENS, WIDTH), axis=1, name="norm")
    model = b.output(b.op("Gather", x, b.const(np.array(0)), axis=1)).model()
    run_passes(model, Cleanup())
    assert next(n for n in model.graph if n.op_type == "LayerNormalization").outputs[0].shape[1] == TOKENS


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_axis_is_another_below_a_broadcast(axis, run_passes, outputs):
    b = Builder()
    x = b.op("LayerNormalization", b.input("x", [2, TOKENS, WIDTH]), b.floats(WIDTH), name="norm")
    x = b.op("MatMul", b.op("Tanh", x), b.floats(WIDTH, WIDTH))
    x = b.op("LayerNormalization", b.op("Add", x, b.floats(3, 1, 1, WIDTH)), b.floats(WIDTH), name="last")
    model = b.output(b.op("Gather", x, b.const(np.array(1)), axis=axis)).model()
    feed = {"x": np.random.default_rng(1).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)}
    (before,) = outputs(model, feed)
    run_passes(model, Cleanup())
    (after,) = outputs(model, feed)
    assert after.shape == before.shape
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
