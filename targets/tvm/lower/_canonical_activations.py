"""Finds activations, however they are spelled: a graph of elementwise ops is known by the values that it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.target import Array

_MOST_NODES = 12
"""Nodes that an activation is spelled with at the most."""
_TOLERANCE = 2e-5
"""Twenty times less than what tells GELU from its approximation by tanh."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


_OPS: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Max": np.maximum,
    "Min": np.minimum,
    "Neg": np.negative,
    "Exp": np.exp,
    "Erf": _erf,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Relu": lambda x: np.maximum(x, 0),
}
_SMOOTH = frozenset({"Erf", "Tanh", "Sigmoid", "Exp", "HardSigmoid", "Clip", "Max", "Min", "Relu"})
"""Without one of these it is only arithmetic."""

_KNOWN: Mapping[str, Callable[[Array], Array]] = {
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x * 0.5**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "hard_swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}
_POINTS = np.concatenate([np.linspace(-9, 9, 61), [1e-3, -1e-3]])


@dataclass(frozen=True, kw_only=True)
class Activation:
    """What a node computes of one value.

    Attributes:
        source: The value.
        kind: One of `onnxcomp.targets.tvm.kernels._epilogue.ACTIVATIONS`.
        alpha: Its first parameter.
        beta: Its second one.
    """

    source: ir.Value
    kind: str
    alpha: float = 0.0
    beta: float = 0.0


def find(node: ir.Node) -> Activation | None:
    """The activation whose last node is `node`, if it is one."""
    if node.domain or len(node.outputs) != 1 or node.outputs[0].dtype not in (ir.DataType.FLOAT, None):
        return None
    return _by_name(node) or _by_values(node)


def _by_name(node: ir.Node) -> Activation | None:
    source = node.inputs[0] if node.inputs else None
    if source is None or source.dtype != ir.DataType.FLOAT:
        return None
    match node.op_type:
        case "Relu":
            return Activation(source=source, kind="relu")
        case "LeakyRelu":
            return Activation(source=source, kind="leaky_relu", alpha=attribute(node, "alpha", 0.01))
        case "HardSigmoid":
            alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
            return Activation(source=source, kind="hard_sigmoid", alpha=alpha, beta=beta)
        case "HardSwish":
            return Activation(source=source, kind="hard_swish")
        case "Gelu":
            approximate = attribute(node, "approximate", "none") in ("tanh", b"tanh")
            return Activation(source=source, kind="gelu_tanh" if approximate else "gelu")
        case "Clip":
            bounds = _bounds(node)
            return None if bounds is None else Activation(source=source, kind="clip", alpha=bounds[0], beta=bounds[1])
    return None


def _by_values(node: ir.Node) -> Activation | None:
    """Goes back from `node` until all comes from one value, and compares what is computed of it."""
    if not _is_elementwise(node):
        return None
    inside = [node]
    while len(inside) <= _MOST_NODES:
        sources = _sources(inside)
        if len(sources) == 1 and any(n.op_type in _SMOOTH for n in inside):
            (source,) = sources
            if source.dtype == ir.DataType.FLOAT and (kind := _named(node, inside, source)) is not None:
                return Activation(source=source, kind=kind)
        # The one that reads no other source is the last to be computed.
        behind = [n for v in sources if (n := v.producer()) is not None and _is_elementwise(n)]
        behind = [n for n in behind if n.graph is node.graph]
        if not behind:
            return None
        inside.append(max(behind, key=lambda n: _depth(n, sources)))
    return None


def _depth(node: ir.Node, sources: set[ir.Value], hops: int = _MOST_NODES) -> int:
    """How many nodes lie between `node` and another of `sources` before it."""
    best = 0
    for value in node.inputs:
        if value is None or hops == 0:
            continue
        producer = value.producer()
        below = _depth(producer, sources, hops - 1) if producer is not None and _is_elementwise(producer) else 0
        if below or value in sources:
            best = max(best, below + 1)
    return best


def _named(node: ir.Node, inside: list[ir.Node], source: ir.Value) -> str | None:
    with np.errstate(all="ignore"):
        computed = _evaluate(node.outputs[0], set(inside), {source: _POINTS})
        if computed is None:
            return None
        for kind, function in _KNOWN.items():
            if np.allclose(computed, function(_POINTS), rtol=_TOLERANCE, atol=_TOLERANCE):
                return kind
    return None


def _evaluate(value: ir.Value, inside: set[ir.Node], known: dict[ir.Value, Array]) -> Array | None:
    if value in known:
        return known[value]
    node = value.producer()
    if node not in inside or node is None:
        number = _number(value)
        return None if number is None else np.full(_POINTS.shape, number)
    inputs: Sequence[ir.Value | None] = node.inputs
    function: Callable[..., Array]
    if node.op_type == "Clip":
        low, high = _bounds(node) or (-math.inf, math.inf)
        inputs, function = node.inputs[:1], lambda x: np.clip(x, low, high)
    elif node.op_type == "HardSigmoid":
        alpha, beta = attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)
        function = lambda x: np.clip(x * alpha + beta, 0, 1)  # noqa: E731
    else:
        function = _OPS[node.op_type]
    given = [None if v is None else _evaluate(v, inside, known) for v in inputs]
    if any(g is None for g in given):
        return None
    known[value] = function(*given)
    return known[value]


def _sources(inside: list[ir.Node]) -> set[ir.Value]:
    """What a set of nodes reads that is neither computed in it nor one constant number."""
    made = {n.outputs[0] for n in inside}
    read = (v for n in inside for v in (n.inputs[:1] if n.op_type == "Clip" else n.inputs) if v is not None)
    return {v for v in read if v not in made and _number(v) is None}


def _is_elementwise(node: ir.Node) -> bool:
    if node.domain or len(node.outputs) != 1:
        return False
    if node.op_type == "Clip":
        return _bounds(node) is not None
    if node.op_type == "HardSigmoid":
        return True
    return node.op_type in _OPS and (node.op_type not in ("Max", "Min") or len(node.inputs) == 2)


def _bounds(node: ir.Node) -> tuple[float, float] | None:
    """Of a Clip, if they are constant."""
    bounds = []
    for index, default in ((1, -math.inf), (2, math.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        number = default if value is None else _number(value)
        if number is None:
            return None
        bounds.append(max(min(number, 3.4e38), -3.4e38))
    return bounds[0], bounds[1]


def _number(value: ir.Value) -> float | None:
    """The only element of a constant that does not widen what it is combined with."""
    if ir.convenience.get_const_tensor(value) is None or (value.shape is not None and value.shape.rank() > 1):
        return None
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.dtype.kind == "f" else None
