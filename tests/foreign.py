"""One small network as each of several tools quantizes it, and bits of such networks.

The forms were read off files that the tools wrote; scales come from what the float network gives for one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from builder import Builder

SIZE = 12
Example = tuple[ir.Model, dict[str, np.ndarray]]


def feed() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(5).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)}


class Foreign(Builder):
    """A builder whose quantizers follow one tool.

    Attributes:
        symmetric: int8 activations with zero point 0; else uint8 and a zero point.
        domain: Domain of QuantizeLinear and DequantizeLinear.
        folded: Weights are stored as integers and not quantized when the model runs.
        int_bias: Biases are int32 with a DequantizeLinear, else float.
    """

    def __init__(
        self, *, symmetric: bool = False, domain: str = "", folded: bool = True, int_bias: bool = False
    ) -> None:
        super().__init__()
        self.symmetric, self.folded, self.int_bias = symmetric, folded, int_bias
        self.attributes = {"domain": domain} if domain else {}
        self.last = np.ones((), np.float32)  # scale of the last pair

    def pair(self, x: str, low: float, high: float) -> str:
        """A Q/DQ pair per tensor for a range."""
        if self.symmetric:
            scale, zero, dtype = max(-low, high) / 127, 0, np.int8
        else:
            scale, zero, dtype = (high - low) / 255, round(-low / (high - low) * 255), np.uint8
        return self.pair_of(x, np.float32(scale), dtype(zero))

    def pair_of(self, x: str, scale: Any, zero: Any, **attributes: int) -> str:
        names = self.const(scale), self.const(zero)
        q = self.op("QuantizeLinear", x, *names, **attributes, **self.attributes)
        self.last = np.asarray(scale)
        return self.op("DequantizeLinear", q, *names, **attributes, **self.attributes)

    def quantized_weight(self, shape: tuple[int, ...], axis: int = 0) -> str:
        """int8 per output channel, DequantizeLinear behind."""
        array = (self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        rest = tuple(i for i in range(len(shape)) if i != axis)
        self.scales = (np.abs(array).max(axis=rest) / 127).astype(np.float32)
        names = self.const(self.scales), self.const(np.zeros(shape[axis], np.int8))
        spread = self.scales.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if self.folded:
            q = self.const(np.clip(np.rint(array / spread), -127, 127).astype(np.int8))
        else:
            q = self.op("QuantizeLinear", self.const(array), *names, axis=axis, **self.attributes)
        return self.op("DequantizeLinear", q, *names, axis=axis, **self.attributes)

    def layer(self, op: str, x: str, shape: tuple[int, ...], name: str, **attributes: Any) -> str:
        """A linear op with quantized weight and a bias."""
        x_scale = self.last
        weight = self.quantized_weight(shape)
        bias = self.rng.normal(size=shape[0]).astype(np.float32) * np.float32(0.3)
        if self.int_bias:
            scale = (x_scale * self.scales).astype(np.float32)
            q = self.const(np.rint(bias / scale).astype(np.int32))
            value = self.op("DequantizeLinear", q, self.const(scale), axis=0, **self.attributes)
        else:
            value = self.const(bias)
        return self.op(op, x, weight, value, name=name, **attributes)

    def relu6(self, x: str, name: str) -> str:
        return self.op("Clip", x, self.const(np.float32(0)), self.const(np.float32(6)), name=name)


def _network(b: Foreign, between: Callable[[Foreign, str, str], str], residual: bool = True) -> Example:
    """Conv, depthwise Conv, Conv, residual Add, pooling, Gemm; `between` makes ReLU6 and quantizer behind a Conv."""
    x = b.pair(b.input("x", [1, 3, SIZE, SIZE]), -3.5, 3.5)
    x = between(b, b.layer("Conv", x, (8, 3, 3, 3), "stem", pads=[1, 1, 1, 1]), "stem")
    y = between(b, b.layer("Conv", x, (8, 1, 3, 3), "depthwise", pads=[1, 1, 1, 1], group=8), "depthwise")
    y = b.layer("Conv", y, (8, 8, 1, 1), "project")
    if residual:
        y = b.pair(y, -4, 4)
    y = b.pair(b.op("Add", x, y, name="residual"), -4, 8)
    y = b.pair(b.op("GlobalAveragePool", y, name="average"), -1, 3)
    y = b.op("Flatten", y, name="flat")
    y = b.layer("Gemm", y, (5, 8), "classify", transB=1)
    model = b.output(y).model()
    model.opset_imports["com.microsoft"] = 1
    return model, feed()


def ort_default() -> Example:
    """int8 activations, ReLU6 already in the quantizer."""

    def between(b: Foreign, y: str, name: str) -> str:
        return b.pair_of(y, np.float32(6 / 255), np.int8(-128))

    return _network(Foreign(symmetric=True, int_bias=True), between)


def ort_linear_only() -> Example:
    """A pair in front of ReLU6 and one behind it."""

    def between(b: Foreign, y: str, name: str) -> str:
        return b.pair(b.relu6(b.pair(y, -8, 7), name + "_relu6"), 0, 6)

    return _network(Foreign(int_bias=True), between)


def quark() -> Example:
    """Symmetric int8 of the domain com.microsoft with ReLU6 in front."""

    def between(b: Foreign, y: str, name: str) -> str:
        return b.pair(b.relu6(y, name + "_relu6"), 0, 6)

    return _network(Foreign(symmetric=True, domain="com.microsoft", int_bias=True), between)


def nncf() -> Example:
    """One scale a channel in front of a depthwise Conv."""

    b = Foreign()
    x = b.pair(b.input("x", [1, 3, SIZE, SIZE]), -3.5, 3.5)
    x = b.layer("Conv", x, (8, 3, 3, 3), "expand", pads=[1, 1, 1, 1])
    x = b.pair_of(b.relu6(x, "relu6"), np.linspace(0.004, 6 / 255, 8).astype(np.float32), np.zeros(8, np.uint8), axis=1)
    x = b.layer("Conv", x, (8, 1, 3, 3), "depthwise", pads=[1, 1, 1, 1], group=8)
    x = b.pair(b.relu6(x, "relu6_1"), 0, 6)
    x = b.pair(b.layer("Conv", x, (4, 8, 1, 1), "project"), -4, 4)
    return b.output(x).model(), feed()


def modelopt() -> Example:
    """Float weights that are quantized when the model runs; what goes into the residual Add stays float."""

    def between(b: Foreign, y: str, name: str) -> str:
        return b.pair(b.relu6(y, name + "_relu6"), 0, 6)

    return _network(Foreign(symmetric=True, folded=False), between, residual=False)


def aimet() -> Example:
    """Limits of ReLU6 that are dequantized, and a pair in front of it."""

    def between(b: Foreign, y: str, name: str) -> str:
        y = b.pair(y, -8, 7)
        low = b.op("DequantizeLinear", b.const(np.uint8(0)), b.const(np.float32(1e-7)), b.const(np.uint8(0)))
        high = b.op("DequantizeLinear", b.const(np.uint8(255)), b.const(np.float32(6 / 255)), b.const(np.uint8(0)))
        return b.pair(b.op("Clip", y, low, high, name=name + "_relu6"), 0, 6)

    return _network(Foreign(folded=False, int_bias=True), between)


def onnxsim() -> Example:
    """The float output of an op is read by a residual Add besides the quantizer."""
    b = Foreign()
    x = b.pair(b.input("x", [1, 3, SIZE, SIZE]), -3.5, 3.5)
    float_output = b.layer("Conv", x, (8, 3, 3, 3), "stem", pads=[1, 1, 1, 1])
    y = b.layer("Conv", b.pair(float_output, -4, 4), (8, 8, 1, 1), "branch")
    total = b.op("Add", float_output, y, name="residual")
    y = b.layer("Conv", b.pair(total, -6, 6), (8, 8, 1, 1), "next")
    y = b.pair(b.op("Add", total, y, name="residual_1"), -8, 8)
    return b.output(b.pair(b.layer("Conv", y, (4, 8, 1, 1), "last"), -4, 4)).model(), feed()


def qoperator() -> Example:
    """QLinearConv and QLinearAdd on int8, ReLU6 in float between them."""
    b = Foreign()

    def constants(scale: float, zero: int) -> tuple[str, str]:
        return b.const(np.float32(scale)), b.const(np.int8(zero))

    def conv(x: str, given: tuple[str, str], shape: tuple[int, ...], given_scale: float, out: tuple[str, str]) -> str:
        weight = b.const(b.rng.integers(-127, 128, shape).astype(np.int8))
        scales = b.rng.uniform(0.001, 0.003, shape[0]).astype(np.float32)
        bias = b.const(np.rint(b.rng.normal(size=shape[0]) / (given_scale * scales)).astype(np.int32))
        zeros = b.const(np.zeros(shape[0], np.int8))
        return b.op("QLinearConv", x, *given, weight, b.const(scales), zeros, *out, bias)

    image, wide, relu = constants(0.03, 5), constants(0.05, 0), constants(6 / 255, -128)
    x = b.op("QuantizeLinear", b.input("x", [1, 3, SIZE, SIZE]), *image)
    y = b.op("DequantizeLinear", conv(x, image, (8, 3, 3, 3), 0.03, wide), *wide)
    y = b.op("QuantizeLinear", b.relu6(y, "relu6"), *relu)
    z = conv(y, relu, (8, 8, 1, 1), 6 / 255, wide)
    total = constants(0.07, -20)
    z = b.op("QLinearAdd", y, *relu, z, *wide, *total, domain="com.microsoft")
    model = b.output(b.op("DequantizeLinear", z, *total)).model()
    model.opset_imports["com.microsoft"] = 1
    return model, feed()


TOOLS: dict[str, Callable[[], Example]] = {
    f.__name__: f for f in (ort_default, ort_linear_only, quark, nncf, modelopt, aimet, onnxsim, qoperator)
}
