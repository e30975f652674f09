"""Feed-forward and attention blocks as different exporters write them, for tests of activation sparsity."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
from builder import Builder

WIDTH, HIDDEN = 16, 48


def weight(b: Builder, *shape: int) -> str:
    """Weights whose rows differ in norm, as those of trained networks do."""
    array = b.rng.normal(size=shape) / math.sqrt(shape[0])
    return b.const((array * np.exp(b.rng.normal(size=(shape[0], 1)) * 0.7)).astype(np.float32))


def silu(b: Builder, x: str) -> str:
    return b.op("Mul", x, b.op("Sigmoid", x), name="act")


def gelu(b: Builder, x: str) -> str:
    erf = b.op("Erf", b.op("Div", x, b.const(np.float32(2**0.5))))
    return b.op("Mul", b.op("Mul", x, b.op("Add", erf, b.const(np.float32(1)))), b.const(np.float32(0.5)), name="act")


def gelu_tanh(b: Builder, x: str) -> str:
    cube = b.op("Mul", b.op("Pow", x, b.const(np.float32(3))), b.const(np.float32(0.044715)))
    inner = b.op("Mul", b.op("Add", x, cube), b.const(np.float32(math.sqrt(2 / math.pi))))
    half = b.op("Mul", x, b.const(np.float32(0.5)))
    return b.op("Mul", half, b.op("Add", b.op("Tanh", inner), b.const(np.float32(1))), name="act")


def gated(b: Builder, *, act=silu, tokens: int = 12) -> ir.Model:
    """SwiGLU with three MatMuls without biases, as decoders have it."""
    x = b.input("x", [1, tokens, WIDTH])
    gate = b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="gate")
    up = b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="up")
    y = b.op("MatMul", b.op("Mul", act(b, gate), up, name="product"), weight(b, HIDDEN, WIDTH), name="down")
    return b.output(b.op("Add", x, y, name="residual")).model(opset=18)


def feeds(count: int = 6, tokens: int = 12, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(1, tokens, WIDTH)).astype(np.float32)} for _ in range(count)]
