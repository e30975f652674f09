"""Recognises activation functions by what they compute, in whatever ops an exporter wrote them.

The elementwise ops between two layers are evaluated on a few numbers and compared with the known functions, so that
neither the order of factors nor the choice of ops matters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.target import Array

_MOST = 48  # ops of one activation
_CLOSE = 2e-3  # constants may have been rounded to float16

Root = TypeVar("Root")


def _erf(x: Array) -> Array:
    return np.asarray(np.vectorize(math.erf, otypes=[np.float64])(x))


def _sigmoid(x: Array) -> Array:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


_KNOWN: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "relu_squared": lambda x: np.maximum(x, 0.0) ** 2,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": lambda x: x * _sigmoid(1.702 * x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
}
_GRID = np.linspace(-6.0, 6.0, 49)

RECTIFIED = frozenset({"relu", "relu_squared", "thresholded_relu"})
"""Activations that put out exact zeros."""

_Args = tuple[Array, ...]
_OPS: dict[tuple[str, str], Callable[[ir.Node, _Args], Any]] = {
    ("", "Mul"): lambda _, a: a[0] * a[1],
    ("", "Add"): lambda _, a: a[0] + a[1],
    ("", "Sub"): lambda _, a: a[0] - a[1],
    ("", "Div"): lambda _, a: a[0] / a[1],
    ("", "Pow"): lambda _, a: np.power(a[0], a[1]),
    ("", "Max"): lambda _, a: np.maximum(a[0], a[-1]),
    ("", "Min"): lambda _, a: np.minimum(a[0], a[-1]),
    ("", "Neg"): lambda _, a: -a[0],
    ("", "Exp"): lambda _, a: np.exp(a[0]),
    ("", "Sqrt"): lambda _, a: np.sqrt(a[0]),
    ("", "Reciprocal"): lambda _, a: 1.0 / a[0],
    ("", "Erf"): lambda _, a: _erf(a[0]),
    ("", "Tanh"): lambda _, a: np.tanh(a[0]),
    ("", "Sigmoid"): lambda _, a: _sigmoid(a[0]),
    ("", "Relu"): lambda _, a: np.maximum(a[0], 0.0),
    ("", "LeakyRelu"): lambda n, a: np.where(a[0] < 0, attribute(n, "alpha", 0.01) * a[0], a[0]),
    ("", "ThresholdedRelu"): lambda n, a: np.where(a[0] > attribute(n, "alpha", 1.0), a[0], 0.0),
    ("", "Gelu"): lambda n, a: (_gelu_tanh if attribute(n, "approximate", "none") == "tanh" else _gelu)(a[0]),
    ("", "Swish"): lambda n, a: a[0] * _sigmoid(attribute(n, "alpha", 1.0) * a[0]),
    ("", "Softplus"): lambda _, a: np.logaddexp(a[0], 0.0),
    ("", "Mish"): lambda _, a: a[0] * np.tanh(np.logaddexp(a[0], 0.0)),
    ("com.microsoft", "QuickGelu"): lambda n, a: a[0] * _sigmoid(attribute(n, "alpha", 1.702) * a[0]),
    ("com.microsoft", "Gelu"): lambda _, a: _gelu(a[0]),
    ("com.microsoft", "BiasGelu"): lambda _, a: _gelu(a[0]),
    ("com.microsoft", "FastGelu"): lambda _, a: _gelu_tanh(a[0]),
    **{
        ("", op): lambda _, a: a[0]
        for op in ("Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
    },
}
_FIRST_ONLY = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Dropout", "BiasGelu", "FastGelu"})
"""Ops whose further inputs are no operands, or a bias, which does not change the kind of function."""
LAYOUT = frozenset({"Identity", "Dropout", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Ops that change no value. Where the last axis is as long before a chain of them as behind it, channels stay put."""


@dataclass(frozen=True, kw_only=True)
class Elementwise:
    """Elementwise ops that lead to a value.

    Attributes:
        value: The value.
        roots: Where they start.
        nodes: The ops, the last one first.
    """

    value: ir.Value
    roots: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]

    def name(self) -> str:
        """The function of the only root; `other` if it is none that is known."""
        (root,) = self.roots
        values = {root: _GRID}
        with np.errstate(all="ignore"):
            found = _evaluate(self.value, values)
            errors = {k: float(np.abs(found - f(_GRID)).max()) for k, f in _KNOWN.items()}
        kind = min(errors, key=lambda k: errors[k] if np.isfinite(errors[k]) else np.inf)
        if errors[kind] < _CLOSE:
            return kind
        kept = found != 0.0
        cut = bool(np.allclose(found[kept], _GRID[kept])) and not kept[_GRID <= 0.0].any()
        return "thresholded_relu" if cut and kept.any() and bool((np.diff(kept.astype(int)) >= 0).all()) else "other"


def follow(value: ir.Value, roots: Mapping[ir.Value, Root]) -> Elementwise | str:
    """Follows `value` back through elementwise ops to `roots`, or says what stands in the way."""
    seen: dict[ir.Node, None] = {}
    found: dict[ir.Value, None] = {}
    pending = [value]
    while pending:
        current = pending.pop(0)
        if current in roots:
            found[current] = None
            continue
        node = current.producer()
        if node is None:
            return f"{current.name} is the output of no layer"
        if node in seen:
            continue
        seen[node] = None
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return "its activations are quantized already; this goes before"
        if (_domain(node), node.op_type) not in _OPS or current is not node.outputs[0] or len(seen) > _MOST:
            return f"{node.op_type} {node.name} stands between it and the layer before"
        for operand in _operands(node):
            if not _is_constant(operand):
                pending.append(operand)
            elif not _fits(node, operand):
                return f"{node.op_type} {node.name} has a constant that is no scalar"
    return Elementwise(value=value, roots=tuple(found), nodes=tuple(seen))


def behind_layout(value: ir.Value) -> ir.Value:
    """The value before ops that change none of its numbers."""
    node = value.producer()
    while node is not None and node.op_type in LAYOUT and _domain(node) == "" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _domain(node: ir.Node) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _operands(node: ir.Node) -> list[ir.Value]:
    inputs = node.inputs[:1] if node.op_type in _FIRST_ONLY else node.inputs
    return [v for v in inputs if v is not None]


def _is_constant(value: ir.Value) -> bool:
    override = value.is_graph_input() and value.is_initializer()
    return not override and ir.convenience.get_const_tensor(value) is not None


def _fits(node: ir.Node, value: ir.Value) -> bool:
    """Whether a constant operand may be there: a scalar, or a factor a channel, which changes no kind of function."""
    tensor = ir.convenience.get_const_tensor(value)
    assert tensor is not None
    return tensor.size == 1 or (node.op_type in ("Mul", "Div") and max(tensor.shape.numpy()) == tensor.size)


def _evaluate(value: ir.Value, values: dict[ir.Value, Array]) -> Array:
    if value in values:
        return values[value]
    node = value.producer()
    array = constant(value) if _is_constant(value) else None
    if array is not None:
        found = array.reshape(()).astype(np.float64) if array.size == 1 else np.ones(())
    else:
        assert node is not None
        operands = tuple(_evaluate(v, values) for v in _operands(node))
        found = np.asarray(_OPS[_domain(node), node.op_type](node, operands), np.float64)
    values[value] = found
    return found
