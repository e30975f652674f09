"""Rotations in graphs of other shapes: one projection for queries, keys and values, patches by Conv, class tokens."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto
from rotated import HEADS, SIZE, WIDTH, gamma, layer_op, linear, matrix

from onnxcomp.passes._hadamard import hadamard, rotate, rotation
from onnxcomp.passes.rotate import Rotate

PLACES = 9  # patches of an image


def flat_linear(b: Builder, x: str, inputs: int, outputs: int, name: str) -> str:
    """GPT-2's Conv1D: rows, Gemm, and the shape that it was."""
    rows = b.op("Reshape", x, b.const(np.array([-1, inputs])))
    y = b.op("Gemm", rows, b.const(matrix(b, inputs, outputs)), b.floats(outputs), name=name)
    return b.op("Reshape", y, b.const(np.array([1, -1, outputs])))


def heads_of(b: Builder, x: str, tokens: int) -> str:
    return b.op("Transpose", b.op("Reshape", x, b.const(np.array([1, tokens, HEADS, SIZE]))), perm=[0, 2, 1, 3])


def split_channels(b: Builder, x: str, tokens: int) -> list[str]:
    """Parts of the last axis."""
    qkv = flat_linear(b, x, WIDTH, 3 * WIDTH, "qkv")
    b.op("Split", qkv, b.const(np.array([WIDTH] * 3)), name="split", axis=-1)
    b.nodes[-1].output.extend(["split_out_1", "split_out_2"])
    return [heads_of(b, t, tokens) for t in ("split_out", "split_out_1", "split_out_2")]


def gathered(b: Builder, x: str, tokens: int) -> list[str]:
    """timm: an axis of three moved to the front."""
    qkv = linear(b, x, WIDTH, 3 * WIDTH, "qkv", bias=True)
    qkv = b.op("Reshape", qkv, b.const(np.array([1, tokens, 3, HEADS, SIZE])))
    qkv = b.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    return [b.op("Gather", qkv, b.const(np.int64(i)), axis=0) for i in range(3)]


def block(b: Builder, x: str, project, tokens: int) -> str:
    q, k, v = project(b, layer_op(b, x), tokens)
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = b.op("Transpose", b.op("MatMul", weights, v, name="weigh"), perm=[0, 2, 1, 3])
    y = b.op("Reshape", y, b.const(np.array([1, tokens, WIDTH])))
    return b.op("Add", x, b.op("Mul", linear(b, y, WIDTH, WIDTH, "o", bias=True), gamma(b)))


def vit(project) -> ir.Model:
    """Patches by Conv, a class token, positions, a head on the class token."""
    b = Builder()
    image = b.input("x", [1, 3, 12, 12])
    x = b.op("Conv", image, b.floats(WIDTH, 3, 4, 4), b.floats(WIDTH), name="patches", strides=[4, 4])
    x = b.op("Transpose", b.op("Reshape", x, b.const(np.array([1, WIDTH, -1]))), perm=[0, 2, 1])
    x = b.op("Concat", b.floats(1, 1, WIDTH), x, axis=1)
    x = b.op("Add", x, b.floats(1, PLACES + 1, WIDTH))
    x = layer_op(b, block(b, x, project, PLACES + 1))
    return b.output(linear(b, b.op("Gather", x, b.const(np.int64(0)), axis=1), WIDTH, 4, "head", bias=True)).model()


def pooled(project) -> ir.Model:
    """Tokens, and the mean over them at the end."""
    b = Builder()
    x = b.op("Gather", b.floats(16, WIDTH), b.input("ids", [1, PLACES], TensorProto.INT64), name="embed")
    x = b.op("ReduceMean", layer_op(b, block(b, x, project, PLACES)), axes=[1], keepdims=0)
    return b.output(b.op("Gemm", x, b.floats(4, WIDTH), b.floats(4), name="head", transB=1)).model()


@pytest.mark.parametrize("project", [split_channels, gathered])
@pytest.mark.parametrize("build", [vit, pooled])
def test_function_stays(build, project, run_passes, outputs):
    model = build(project)
    rng = np.random.default_rng(1)
    image = {"x": rng.normal(size=(1, 3, 12, 12)).astype(np.float32)}
    feed = image if build is vit else {"ids": rng.integers(0, 16, (1, PLACES))}
    expected = outputs(model, feed)[0]
    edits = run_passes(model, Rotate()).edits
    assert all(e.action == "applied" for e in edits), edits
    turned = [(e.node, e.detail.split(" of ")[0]) for e in edits]
    assert {("qkv", "stream"), ("o", "stream"), ("head", "stream"), ("qkv", "values"), ("o", "values")} <= {*turned}
    assert build is pooled or ("patches", "stream") in turned
    assert np.abs(outputs(model, feed)[0] - expected).max() < 2e-5 * np.abs(expected).max()


def test_values_alone_turn_where_one_weight_holds_queries_too(run_passes):
    model = vit(split_channels)
    before = next(n for n in model.graph if n.name == "qkv").inputs[1].const_value.numpy()
    run_passes(model, Rotate(stream=False))
    after = next(n for n in model.graph if n.name == "qkv").inputs[1].const_value.numpy()
    np.testing.assert_array_equal(after[:, : 2 * WIDTH], before[:, : 2 * WIDTH])
    assert np.abs(after - before)[:, 2 * WIDTH :].max() > 0.1


@pytest.mark.parametrize("size", [1, 2, 3, 12, 20, 28, 36, 48, 52, 80, 100, 112, 384, 576, 768, 960])
def test_hadamard(size):
    matrix = hadamard(size)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    flat = np.abs(matrix).max() * size**0.5
    assert flat < 1 + 1e-12 or (size in (3, 52, 100) and flat < 2**0.5 + 1e-12)
    for turned in (rotation(size, 1), rotation(size, 1, keeps_mean=True)):
        np.testing.assert_allclose(turned @ turned.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(turned.sum(axis=0), 1, atol=1e-10)
    np.testing.assert_allclose(turned.sum(axis=1), 1, atol=1e-10)


def test_rotate_takes_blocks_of_a_window():
    array = np.random.default_rng(0).normal(size=(5, 12, 2)).astype(np.float16)
    matrix = rotation(4, 0)
    turned = rotate(array, 1, matrix, None, (4, 12))
    expected = array.astype(np.float64)
    for first in (4, 8):
        expected[:, first : first + 4] = np.einsum("aib,ij->ajb", expected[:, first : first + 4], matrix)
    assert turned.dtype == np.float16
    np.testing.assert_allclose(turned, expected, atol=2e-3)
