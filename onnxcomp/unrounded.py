"""What a quantized model stands for: the same model without rounding, in place of the float model that it came from.

A fake-quantized tensor is saturated and rounded. The first belongs to the function that its maker wanted (a range was
chosen; a ReLU6 may be nothing else by now), the second is error. So tensors are cut to the range of their integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, users
from onnxcomp.model import all_nodes, infer_shapes
from onnxcomp.target import Array

_DOMAINS = ("", "com.microsoft")
_MOVES = frozenset({
    "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "Tile", "Transpose", "Unsqueeze",
})  # fmt: skip
"""Ops that give back elements of their first input, whatever its type."""

_FLOAT_OPS = {"QLinearConv": "Conv", "QLinearMatMul": "MatMul"}
"""Standard ops on integers, and the float ones that they round."""
_ON_INTEGERS = ("QLinear", "QGemm", "QAttention", "QOrdered", "QEmbedLayerNormalization", "DynamicQuantize")
_CLIP_WITH_INPUTS = 11  # opset


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Parameters of a quantized tensor.

    Attributes:
        steps: Its scales: one, or one a channel.
        zero_points: The integers that stand for 0.
        axis: The axis of channels, from 0; None for one scale.
        kind: Element type of the scales and of the float tensor.
        container: Element type of the integers.
    """

    steps: tuple[float, ...]
    zero_points: tuple[int, ...]
    axis: int | None
    kind: ir.DataType
    container: ir.DataType = field(compare=False)

    def real(self, integer: float, rank: int = 0) -> Array:
        """What an integer stands for, in the shape that a tensor of this rank is compared with."""
        values = (integer - np.asarray(self.zero_points, np.float64)) * np.asarray(self.steps)
        shape = [-1 if i == self.axis else 1 for i in range(rank)] if self.axis is not None else []
        with np.errstate(over="ignore"):  # beyond float16 there is no limit
            return np.asarray(values.astype(self.kind.numpy()).reshape(shape))

    def limits(self, rank: int = 0) -> tuple[Array, Array]:
        """What the smallest and the largest integer stand for."""
        bits = self.container.bitwidth
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if self.container.is_signed() else (0, 2**bits - 1)
        return self.real(low, rank), self.real(high, rank)


def unrounded(model: ir.Model) -> ir.Model | None:
    """Copies a model, and cuts its activations to the range of their integers instead of rounding them.

    The QuantizeLinear of a computed tensor becomes a Clip, or a Max and a Min with limits of each channel, and its
    DequantizeLinear an Identity; QLinearConv and QLinearMatMul become float ops with a Clip. Weights and biases stay
    what their integers stand for.

    Args:
        model: A model that is quantized; unchanged.

    Returns:
        The copy, or None if nothing is rounded, or it cannot be told what the model is without: other ops compute with
        integers, a range depends on the input, a tensor is dequantized with parameters of another.
    """
    if model.opset_imports.get("", 0) < _CLIP_WITH_INPUTS or any(map(_computes_with_integers, all_nodes(model))):
        return None
    if any("QuantizeLinear" in n.op_type for f in model.functions.values() for n in f.all_nodes()):
        return None
    copy = model.clone()
    infer_shapes(copy)
    constants = {v for g in (copy.graph, *copy.graph.subgraphs()) for v in g.initializers.values()}
    constants.difference_update(copy.graph.inputs)
    work = _Work(copy)
    for node in list(copy.graph.all_nodes()):
        given = [v for v in node.inputs if v is not None]
        if node.op_type == "Constant" or (given and constants.issuperset(given) and not _has_body(node)):
            constants.update(node.outputs)
        elif not work.take(node):
            return None
    if not work.scales or any(v.is_graph_output() for v in work.scales):
        return None
    return copy


def _computes_with_integers(node: ir.Node) -> bool:
    if node.op_type in _FLOAT_OPS and node.domain == "":
        return False
    return node.op_type.startswith(_ON_INTEGERS) or "Integer" in node.op_type


class _Work:
    """Turns node after node of a model into what it rounds.

    Attributes:
        scales: What were integers and is not any more.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._editors: dict[ir.Graph, Editor] = {}
        self.scales: dict[ir.Value, _Scale] = {}

    def take(self, node: ir.Node) -> bool:
        """Turns a node of which not all inputs are constant; False if that cannot be done."""
        if node.op_type == "QuantizeLinear" and node.domain in _DOMAINS:
            return self._cut(node)
        if node.op_type in _FLOAT_OPS:
            return self._compute_in_float(node)
        return not any(v in self.scales for v in node.inputs) or self._follow(node)

    def _cut(self, node: ir.Node) -> bool:
        """Makes a QuantizeLinear a Clip. One that has channels stays, if these or its readers are not known."""
        value, scale = node.inputs[0], _parameters(node)
        if value is None or scale is None or value in self.scales:
            return False
        rank = 0 if value.shape is None else value.shape.rank()
        if scale.axis is not None and not (0 <= scale.axis < rank and _is_dequantized(node.outputs[0], scale)):
            return True
        name = node.outputs[0].name or "cut"
        if value.dtype != scale.kind:
            to = {"to": scale.kind}
            value = self._before(node, "Cast", [value], name=f"{name}_cast", attributes=to, kind=scale.kind)
        low, high = self._limits(node, scale, rank)
        if scale.axis is None:
            _become(node, "Clip", [value, low, high])
        else:
            above = self._before(node, "Max", [value, low], name=f"{name}_max", kind=scale.kind)
            _become(node, "Min", [above, high])
        self._note(node.outputs[0], scale)
        return True

    def _compute_in_float(self, node: ir.Node) -> bool:
        """Makes an op on integers the float one with a Clip behind it."""
        source, weight = node.inputs[0], constant(node.inputs[3])
        given, weight_scale, scale = (_scale(node, i, i + 1, axis=None) for i in (1, 4, 6))
        if source is None or weight is None or given is None or scale is None or weight_scale is None:
            return False
        if self.scales.get(source) != given or len(scale.steps) > 1:
            return False
        op_type, editor, name = _FLOAT_OPS[node.op_type], self._editor(node), node.outputs[0].name or "cut"
        shape = [1] * weight.ndim
        shape[0 if op_type == "Conv" else -1] = -1
        steps, zeros = (np.reshape(v, shape) for v in (weight_scale.steps, weight_scale.zero_points))
        inputs = [source, editor.weight(f"{name}_weight", ((weight - zeros) * steps).astype(np.float32))]
        if (bias := _input(node, 8)) is not None:
            integers = constant(bias)
            if integers is None:
                return False
            step = np.multiply(given.steps, weight_scale.steps)
            inputs.append(editor.weight(f"{name}_bias", (integers * step).astype(np.float32)))
        attributes = dict(node.attributes)
        computed = self._before(node, op_type, inputs, name=f"{name}_float", attributes=attributes, kind=scale.kind)
        _become(node, "Clip", [computed, *self._limits(node, scale)])
        self._note(node.outputs[0], scale)
        return True

    def _follow(self, node: ir.Node) -> bool:
        """Turns a node behind a tensor that is no longer one of integers; False if it needs integers."""
        source = node.inputs[0]
        scale = None if source is None else self.scales.get(source)
        if source is None or scale is None:
            return False
        if node.op_type == "DequantizeLinear" and node.domain in _DOMAINS:
            if _parameters(node) != scale:
                return False
            _become(node, "Identity", [source])
            return True
        if node.domain != "" or not self._moves(node, scale):
            return False
        for output in node.outputs:
            self._note(output, scale)
        return True

    def _moves(self, node: ir.Node, scale: _Scale) -> bool:
        """Whether a node gives back elements of what has this scale; a Clip gets the limits that its integers are."""
        others = [v for v in node.inputs[1:] if v is not None]
        if node.op_type == "Concat":
            return all(self.scales.get(v) == scale for v in others)
        if any(v in self.scales for v in others):
            return False
        if node.op_type != "Clip":
            return node.op_type in _MOVES and (node.op_type != "MaxPool" or len(node.outputs) == 1)
        if any(constant(v) is None for v in others):
            return False
        for index, value in enumerate(node.inputs[1:], 1):
            if (limit := constant(value)) is not None:
                real = self._editor(node).weight(f"{node.outputs[0].name}_limit", scale.real(float(limit)))
                node.replace_input_with(index, real)
        return True

    def _limits(self, node: ir.Node, scale: _Scale, rank: int = 0) -> list[ir.Value]:
        name, editor = node.outputs[0].name or "cut", self._editor(node)
        return [
            editor.weight(f"{name}_{end}", limit)
            for end, limit in zip(("low", "high"), scale.limits(rank), strict=True)
        ]

    def _before(
        self,
        node: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        *,
        name: str,
        kind: ir.DataType,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        output = node.outputs[0]
        return self._editor(node).before(
            node, op_type, inputs, name=name, attributes=attributes, like=output, dtype=kind
        )

    def _editor(self, node: ir.Node) -> Editor:
        assert isinstance(node.graph, ir.Graph)
        if node.graph not in self._editors:
            self._editors[node.graph] = Editor(self._model, node.graph)
        return self._editors[node.graph]

    def _note(self, value: ir.Value, scale: _Scale) -> None:
        value.type = ir.TensorType(scale.kind)
        self.scales[value] = scale


def _is_dequantized(value: ir.Value, scale: _Scale) -> bool:
    """Whether nothing else is done with it."""
    return all(user.op_type == "DequantizeLinear" and _parameters(user) == scale for user in users(value))


def _become(node: ir.Node, op_type: str, inputs: Sequence[ir.Value]) -> None:
    """Turns a node into another one with the same output."""
    node.op_type, node.domain = op_type, ""
    node.attributes.clear()
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)


def _parameters(node: ir.Node) -> _Scale | None:
    """Those of a QuantizeLinear or DequantizeLinear; None if they are not constant, or not of integers."""
    value, axis = node.inputs[0], int(attribute(node, "axis", 1))
    if axis < 0 and value is not None and value.shape is not None:
        axis += value.shape.rank()
    scale, output = _scale(node, 1, 2, axis), int(attribute(node, "output_dtype", 0))
    if scale is None or not output:
        return scale
    if node.op_type == "DequantizeLinear":
        return scale if output == scale.kind else None
    container = ir.DataType(output)
    return replace(scale, container=container) if container.is_integer() else None


def _scale(node: ir.Node, scale_at: int, zero_at: int, axis: int | None) -> _Scale | None:
    """What two inputs of a node tell; None if they are not constant, or not of integers."""
    scale, zero_point = constant(_input(node, scale_at)), constant(_input(node, zero_at))
    if scale is None or scale.ndim > 1 or not scale.size or (_input(node, zero_at) is not None and zero_point is None):
        return None
    container = ir.DataType.UINT8 if zero_point is None else ir.DataType.from_numpy(zero_point.dtype)
    if not container.is_integer():
        return None
    return _Scale(
        steps=tuple(scale.astype(np.float64).reshape(-1).tolist()),
        zero_points=(0,) * scale.size if zero_point is None else tuple(int(z) for z in zero_point.reshape(-1)),
        axis=axis if scale.size > 1 else None,
        kind=ir.DataType.from_numpy(scale.dtype),
        container=container,
    )


def _has_body(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
