"""Feed-forward blocks are recognised however an exporter writes them, and nothing else is."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, gelu, gelu_tanh, silu, weight
from builder import Builder

from onnxcomp.passes._attention_layers import find_attention_layers
from onnxcomp.passes._feed_forward import find_feed_forward
from onnxcomp.passes.weight_only import WeightOnly


def quick_gelu(b: Builder, x: str) -> str:
    return b.op("Mul", b.op("Sigmoid", b.op("Mul", x, b.const(np.float32(1.702)))), x)


def squared(b: Builder, x: str) -> str:
    y = b.op("Relu", x)
    return b.op("Mul", y, y)


def spelt_out(b: Builder, x: str) -> str:
    """SiLU as x / (1 + exp(-x))."""
    return b.op("Div", x, b.op("Add", b.const(np.float32(1)), b.op("Exp", b.op("Neg", x))))


def op(name: str, domain: str = "", **attributes):
    return lambda b, x: b.op(name, x, domain=domain, **attributes)


def fused_with_bias(b: Builder, x: str) -> str:
    return b.op("BiasGelu", x, b.floats(HIDDEN), domain="com.microsoft")


ACTIVATIONS = {
    "silu": [silu, spelt_out, op("Swish"), op("QuickGelu", "com.microsoft", alpha=1.0)],
    "gelu": [gelu, op("Gelu"), op("Gelu", "com.microsoft"), fused_with_bias],
    "gelu_tanh": [gelu_tanh, op("Gelu", approximate="tanh"), op("FastGelu", "com.microsoft")],
    "quick_gelu": [quick_gelu, op("QuickGelu", "com.microsoft", alpha=1.702)],
    "relu": [op("Relu")],
    "relu_squared": [squared],
    "thresholded_relu": [op("ThresholdedRelu", alpha=0.5)],
    "tanh": [op("Tanh")],
    "other": [op("LeakyRelu", alpha=0.1)],
}
CASES = [(kind, act) for kind, acts in ACTIVATIONS.items() for act in acts]


def single(model: ir.Model):
    (block,) = find_feed_forward(model).blocks
    return block


@pytest.mark.parametrize(("kind", "act"), CASES)
def test_activations(kind, act, b):
    x = b.input("x", ["n", WIDTH])
    hidden = b.op("Gemm", x, weight(b, HIDDEN, WIDTH), b.floats(HIDDEN), name="fc1", transB=1)
    y = b.op("Gemm", act(b, hidden), weight(b, HIDDEN, WIDTH), b.floats(WIDTH), name="fc2")
    block = single(b.output(y).model(opset=24))
    assert (block.activation, block.hidden, block.gate) == (kind, HIDDEN, None)
    assert (block.up.dense.node.name, block.down.node.name) == ("fc1", "fc2")
    assert block.down.matrix().shape == (HIDDEN, WIDTH)


@pytest.mark.parametrize(("kind", "act"), CASES)
def test_gates(kind, act, b):
    block = single(blocks.gated(b, act=act))
    assert (block.activation, block.gate.dense.node.name, block.up.dense.node.name) == (kind, "gate", "up")
    assert (block.product.name, block.hidden) == ("product", HIDDEN)


@pytest.mark.parametrize("form", ["split", "sizes", "slices"])
@pytest.mark.parametrize("first", ["gate", "up"])
def test_gate_and_up_in_one(form, first, b):
    x = b.input("x", [1, 4, WIDTH])
    both = b.op("Add", b.op("MatMul", x, weight(b, WIDTH, 2 * HIDDEN), name="both"), b.floats(2 * HIDDEN))
    if form == "slices":
        cut = lambda i: b.op("Slice", both, *(b.const(np.array([v])) for v in (i * HIDDEN, (i + 1) * HIDDEN, -1)))  # noqa: E731
        parts = [cut(0), cut(1)]
    else:
        sizes = [b.const(np.array([HIDDEN, HIDDEN]))] if form == "sizes" else []
        parts = [f"{b.op('Split', both, *sizes, name='split', axis=-1)}", "second"]
        b.nodes[-1].output.append("second")
    gate, up = parts if first == "gate" else parts[::-1]
    y = b.op("MatMul", b.op("Mul", up, gelu(b, gate)), weight(b, HIDDEN, WIDTH), name="down")
    block = single(b.output(y).model())
    assert (block.gate.start, block.gate.stop) == ((0, HIDDEN) if first == "gate" else (HIDDEN, 2 * HIDDEN))
    assert block.up.start == HIDDEN - block.gate.start
    assert block.gate.merged
    assert block.activation == "gelu"


def test_gemm_between_reshapes(b):
    """A layer on a matrix, between two Reshapes, as converters from TensorFlow write it."""
    x = b.op("Reshape", b.input("x", [2, 3, WIDTH]), b.const(np.array([-1, WIDTH])))
    y = b.op("Gemm", x, weight(b, WIDTH, HIDDEN), b.floats(HIDDEN), name="fc1")
    y = gelu(b, b.op("Reshape", y, b.const(np.array([2, 3, HIDDEN]))))
    y = b.op("Gemm", b.op("Reshape", y, b.const(np.array([-1, HIDDEN]))), weight(b, HIDDEN, WIDTH), name="fc2")
    assert single(b.output(y).model()).down.node.name == "fc2"


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_quantized_weights(form, b, run_passes):
    model = blocks.gated(b)
    before = single(model).down.matrix()
    run_passes(model, WeightOnly(bits=8, block_size=16, min_weights=1, form=form))
    block = single(model)
    assert block.down.quantized
    assert block.gate is not None
    np.testing.assert_allclose(block.down.matrix(), before, rtol=0, atol=0.02 * np.abs(before).max())


def test_what_is_none(b):
    x = b.input("x", [1, 8, WIDTH])
    linear = b.op("MatMul", b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="a"), weight(b, HIDDEN, WIDTH), name="b")
    softmax = b.op("MatMul", b.op("Softmax", linear), weight(b, WIDTH, WIDTH), name="c")
    bilinear = b.op("Mul", b.op("MatMul", x, weight(b, WIDTH, WIDTH)), b.op("MatMul", x, weight(b, WIDTH, WIDTH)))
    last = b.op("MatMul", bilinear, weight(b, WIDTH, WIDTH), name="d")
    product = b.op("MatMul", softmax, b.op("Transpose", last, perm=[0, 2, 1]), name="e")
    found = find_feed_forward(b.output(product).model())
    assert not found.blocks
    reasons = {node.name: reason for node, reason in found.reasons.items()}
    assert "output of no layer" in reasons["a"]
    assert "no activation" in reasons["b"]
    assert "Softmax" in reasons["c"]
    assert "no product of an activated and a linear layer" in reasons["d"]
    assert "no constant weight" in reasons["e"]


def test_quantized_activations_are_refused(b):
    hidden = b.op("MatMul", b.input("x", [4, WIDTH]), weight(b, WIDTH, HIDDEN), name="fc1")
    y = b.op("MatMul", b.qdq(b.op("Relu", hidden)), weight(b, HIDDEN, WIDTH), name="fc2")
    found = find_feed_forward(b.output(y).model())
    assert not found.blocks
    assert any("quantized already" in reason for reason in found.reasons.values())


def test_attention(attention_example):
    model, _ = attention_example
    found = find_feed_forward(model)
    (layers,) = find_attention_layers(model, found.dense)
    assert layers.query.node is layers.key.node is layers.value.node
    assert (layers.query.node.name, layers.output.node.name) == ("qkv", "proj")
    assert found.blocks[0].down.node.name == "fc2"


def test_fused_attention(b):
    x = b.input("x", [1, 6, WIDTH])
    q, k, v = (b.op("MatMul", x, weight(b, WIDTH, WIDTH), name=name) for name in "qkv")
    y = b.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=2)
    model = b.output(b.op("MatMul", y, weight(b, WIDTH, WIDTH), name="o")).model()
    (layers,) = find_attention_layers(model, find_feed_forward(model).dense)
    assert [n.name for n in layers.nodes] == ["q", "k", "v", "o"]
