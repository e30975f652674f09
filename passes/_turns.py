"""How a value is turned by a rotation of its channels, and what has to be known of the values around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.model import infer_shapes
from onnxcomp.target import Array

Sizes = tuple[int | str | None, ...]

_SCALAR_OPS = frozenset({"Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "Max", "Min", "Clip", "Cast", "Neg"})
# Ops of onnxruntime that shape inference stops at: output to the input whose shape it has, up to the length of a cache.
_ALIKE = {
    "SimplifiedLayerNormalization": {0: 0},
    "SkipLayerNormalization": {0: 0, 3: 0},
    "SkipSimplifiedLayerNormalization": {0: 0, 3: 0},
    "MultiHeadAttention": {0: 0, 1: 6, 2: 7},
    "GroupQueryAttention": {0: 0, 1: 3, 2: 4},
}
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"})


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """A value `v` that becomes `(v * before) @ Q`, or that was `base * gain + shift` and becomes `base @ Q`.

    Attributes:
        after: Number of axes behind that of the channels.
        window: First and behind-last channel that turn; all if None.
        before: Factors that the linear op before it takes in, float64, one a channel.
        gain: Factors that the linear ops behind it take in.
        shift: What the linear ops behind it add.
    """

    after: int = 0
    window: tuple[int, int] | None = None
    before: Array | None = None
    gain: Array | None = None
    shift: Array | None = None

    @property
    def open(self) -> bool:
        """Whether factors or terms wait for the linear ops behind it."""
        return self.gain is not None or self.shift is not None

    @property
    def plain(self) -> bool:
        """Whether the value is turned, and nothing more."""
        return self.before is None and not self.open


@dataclass(frozen=True, kw_only=True, eq=False)
class Use:
    """A constant that turns: `node` reads `value` as its input `index`, with the channels at `axis`."""

    node: ir.Node
    index: int
    value: ir.Value
    axis: int
    gain: Array | None
    window: tuple[int, int] | None


def agree(one: Turn | Use, other: Turn | Use) -> bool:
    """Whether both say the same."""
    names = [n for n in ("after", "axis", "window", "before", "gain", "shift") if hasattr(one, n)]
    return all(_same(getattr(one, name), getattr(other, name)) for name in names)


def _same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)
    return one == other


class Shapes:
    """Shapes of the values of a model, inferred on a copy so that the model stays as it is."""

    def __init__(self, model: ir.Model) -> None:
        copy = model.clone()
        for node in list(copy.graph):
            _stand_in(copy.graph, node)
        infer_shapes(copy)
        inferred = {v.name: v.shape for node in copy.graph for v in node.outputs}
        self._known = {v: inferred.get(v.name) for node in model.graph for v in node.outputs}

    def sizes(self, value: ir.Value | None) -> Sizes:
        """Sizes of a value, symbolic ones by name; empty if nothing is known."""
        if value is None:
            return ()
        shape = constant_shape(value)
        if shape is not None:
            return shape
        found = self._known.get(value, value.shape)
        return () if found is None else tuple(d if isinstance(d, int) else d.value for d in found)


def _stand_in(graph: ir.Graph, node: ir.Node) -> None:
    """Puts Identity ops in the place of an op that shape inference does not know."""
    for output, index in _ALIKE.get(node.op_type, {}).items():
        source = node.inputs[index] if index < len(node.inputs) else None
        if source is None or output >= len(node.outputs):
            continue
        old = node.outputs[output]
        alike = ir.node("Identity", [source])
        graph.insert_before(node, alike)
        alike.outputs[0].name, old.name = old.name, None
        ir.convenience.replace_all_uses_with(old, alike.outputs[0], replace_graph_outputs=True)
    if node.op_type in _ALIKE and not any(v.uses() or v.is_graph_output() for v in node.outputs):
        graph.remove(node, safe=True)


def constant_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a constant or of the transpose of a constant matrix, not read from disk; None if it is no such thing."""
    if value is None or (value.is_graph_input() and value.is_initializer()):
        return None  # the caller may override it
    source = transposed_constant(value)
    if source is not None:
        shape = constant_shape(source)
        return None if shape is None else shape[::-1]
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(tensor.shape.numpy())


def transposed_constant(value: ir.Value) -> ir.Value | None:
    """The constant matrix that `value` is the transpose of, or None."""
    node = value.producer()
    source = node.inputs[0] if node is not None and node.op_type == "Transpose" and node.domain == "" else None
    if node is None or source is None or len(attribute(node, "perm", constant_shape(source) or ())) != 2:
        return None
    turned = list(attribute(node, "perm", [1, 0])) == [1, 0]
    return source if turned and constant_shape(source) is not None else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is a constant or the transpose of a constant matrix."""
    return constant_shape(value) is not None


def is_row_scalar(value: ir.Value, shapes: Shapes) -> bool:
    """Whether `value` holds one number for all channels of a row: a mean or norm over the last axis, or so."""
    node = value.producer()
    shape = constant_shape(value)
    if shape is not None:
        return math.prod(shape) == 1
    if node is None:
        return False
    if node.op_type in _REDUCTIONS:
        return bool(attribute(node, "keepdims", 1)) and reduced_axes(node, shapes) == [-1]
    return node.op_type in _SCALAR_OPS and all(v is None or is_row_scalar(v, shapes) for v in node.inputs)


def reduced_axes(node: ir.Node, shapes: Shapes) -> list[int] | None:
    """The axes that a reduction goes over, counted from the end; None if that is not known."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    axes = attribute(node, "axes", []) if given is None else given.reshape(-1).tolist()
    rank = len(shapes.sizes(node.inputs[0]))
    if not axes or (not rank and max(axes) >= 0):
        return None
    return [int(a) if a < 0 else int(a) - rank for a in axes]
