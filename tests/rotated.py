"""Small pre-norm transformers in the forms that exporters write, for tests of rotations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from builder import Builder
from onnx import TensorProto, helper

WIDTH, HEADS, SIZE, TOKENS, VOCABULARY = 48, 2, 24, 5, 16

Norm = Callable[[Builder, str], str]


def matrix(b: Builder, *shape: int) -> np.ndarray:
    return (b.rng.normal(size=shape) * 0.3).astype(np.float32)


def gamma(b: Builder) -> str:
    return b.const(b.rng.uniform(0.2, 3.0, WIDTH).astype(np.float32))


def rms_pow(b: Builder, x: str) -> str:
    mean = b.op("ReduceMean", b.op("Pow", x, b.const(np.float32(2))), axes=[-1])
    root = b.op("Sqrt", b.op("Add", mean, b.const(np.float32(1e-5))))
    return b.op("Mul", b.op("Div", x, root), gamma(b))


def rms_reciprocal(b: Builder, x: str) -> str:
    mean = b.op("ReduceMean", b.op("Mul", x, x), axes=[-1])
    inverse = b.op("Reciprocal", b.op("Sqrt", b.op("Add", mean, b.const(np.float32(1e-5)))))
    return b.op("Mul", gamma(b), b.op("Mul", x, inverse))


def rms_op(b: Builder, x: str) -> str:
    return b.op("RMSNormalization", x, gamma(b), axis=-1, epsilon=1e-5)


def simplified(b: Builder, x: str) -> str:
    """As onnxruntime's exporters write it, which the checker of ONNX does not know."""
    return b.op("SimplifiedLayerNormalization", x, gamma(b), axis=-1, epsilon=1e-5)


def layer_op(b: Builder, x: str) -> str:
    return b.op("LayerNormalization", x, gamma(b), b.floats(WIDTH))


def layer_parts(b: Builder, x: str) -> str:
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    mean = b.op("ReduceMean", b.op("Pow", centred, b.const(np.float32(2))), axes=[-1])
    root = b.op("Sqrt", b.op("Add", mean, b.const(np.float32(1e-5))))
    return b.op("Add", b.op("Mul", b.op("Div", centred, root), gamma(b)), b.floats(WIDTH))


NORMS: dict[str, Norm] = {f.__name__: f for f in (rms_pow, rms_reciprocal, rms_op, layer_op, layer_parts)}


def linear(b: Builder, x: str, inputs: int, outputs: int, name: str, bias: bool = False) -> str:
    y = b.op("MatMul", x, b.const(matrix(b, inputs, outputs), f"{name}_weight"), name=name)
    return b.op("Add", y, b.floats(outputs)) if bias else y


def attend(b: Builder, x: str, bias: bool, groups: int = 1) -> str:
    heads = b.const(np.array([0, TOKENS, -1, SIZE]))
    q, k, v = (
        b.op("Reshape", linear(b, x, WIDTH, WIDTH // (1 if n == "q" else groups), n, bias), heads) for n in "qkv"
    )
    q, k, v = (b.op("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))
    if groups > 1:
        k, v = (b.op("Expand", t, b.const(np.array([1, HEADS, TOKENS, SIZE]))) for t in (k, v))
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 1, 3, 2])), axis=-1)
    y = b.op("Transpose", b.op("MatMul", weights, v, name="weigh"), perm=[0, 2, 1, 3])
    return linear(b, b.op("Reshape", y, b.const(np.array([0, TOKENS, WIDTH]))), WIDTH, WIDTH, "o", bias)


def embed(b: Builder) -> tuple[str, str]:
    """Rows of a table, and the table; one channel is an outlier."""
    table = matrix(b, VOCABULARY, WIDTH)
    table[:, 3] *= 30
    name = b.const(table, "table")
    return b.op("Gather", name, b.input("ids", ["batch", TOKENS], TensorProto.INT64), name="embed"), name


def transformer(
    norm: Norm = rms_pow, *, bias: bool = False, tied: bool = False, groups: int = 1, scale: bool = False
) -> ir.Model:
    """Embedding, attention, a gated MLP and a head."""
    b = Builder()
    x, table = embed(b)
    y = attend(b, norm(b, x), bias, groups)
    x = b.op("Add", x, b.op("Mul", y, gamma(b), name="scale") if scale else y)
    y = norm(b, x)
    gate = b.op("Sigmoid", linear(b, y, WIDTH, 32, "gate", bias))
    y = linear(b, b.op("Mul", gate, linear(b, y, WIDTH, 32, "up", bias)), 32, WIDTH, "down", bias)
    x = norm(b, b.op("Add", x, y))
    if tied:
        logits = b.op("MatMul", x, b.op("Transpose", table, perm=[1, 0]), name="head")
    else:
        logits = linear(b, x, WIDTH, VOCABULARY, "head")
    return b.output(logits).model(opset=23 if norm is rms_op else 17)


def feed(seed: int = 0) -> dict[str, np.ndarray]:
    return {"ids": np.random.default_rng(seed).integers(0, VOCABULARY, (3, TOKENS))}


def fused(norm: str = "SkipSimplifiedLayerNormalization", cached: bool = False) -> ir.Model:
    """The ops of onnxruntime: norms that add first, and attention of grouped queries."""
    b = Builder()
    x, _ = embed(b)
    beta = [b.floats(WIDTH)] if norm == "SkipLayerNormalization" else []
    y = b.op(norm.replace("Skip", ""), x, gamma(b), *beta, epsilon=1e-5)
    q, k, v = (linear(b, y, WIDTH, WIDTH // (1 if n == "q" else HEADS), n) for n in "qkv")
    if cached:
        past = [b.input(n, ["batch", 1, "p", SIZE]) for n in ("past_key", "past_value")]
        lengths = [b.input("lengths", ["batch"], TensorProto.INT32), b.input("total", [1], TensorProto.INT32)]
        names = ["y", "present_key", "present_value"]
        inputs = [q, k, v, *past, *lengths]
        b.nodes.append(
            helper.make_node("GroupQueryAttention", inputs, names, "attend", num_heads=HEADS, kv_num_heads=1)
        )
        b.nodes[-1].domain = "com.microsoft"
        y = "y"
    else:
        k, v = (b.op("Concat", t, t, axis=-1) for t in (k, v))
        y = b.op("MultiHeadAttention", q, k, v, name="attend", domain="com.microsoft", num_heads=HEADS)
    y = linear(b, y, WIDTH, WIDTH, "o")
    inputs = [x, y, gamma(b), *beta, b.floats(WIDTH)]
    b.nodes.append(helper.make_node(norm, inputs, ["n", "", "", "sum"], "skip", domain="com.microsoft", epsilon=1e-5))
    y = linear(b, b.op("Sigmoid", linear(b, "n", WIDTH, 32, "up")), 32, WIDTH, "down")
    b.output(
        linear(b, b.op(norm.replace("Skip", ""), b.op("Add", "sum", y), gamma(b), *beta), WIDTH, VOCABULARY, "head")
    )
    if cached:
        b.output("present_key").output("present_value")
    return b.model()
