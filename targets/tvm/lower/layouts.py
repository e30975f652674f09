"""Keeps images with their channels last from one kernel to the next: Transposes sink until they meet and cancel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, hand_over
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.lower._images import TO_FIRST, TO_LAST, enter, leave, ordered
from onnxcomp.targets.tvm.nodes import DOMAIN

UNARY = frozenset(
    (
        "Abs",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    )
)
"""Ops on each value of their first input; other inputs are scalars."""

BROADCASTING = frozenset(["Add", "Div", "Max", "Mean", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"])
"""Ops on values at the same place of all inputs."""

OURS = frozenset({"Activate", "Dequantize", "QTable", "Quantize"})
"""Nodes of ours on each value of their first input."""

OURS_OF_TWO = frozenset({"QAdd", "QMul"})
"""Nodes of ours on values at the same place of their first two inputs."""

_REDUCTIONS = frozenset(["ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"])


@dataclass(frozen=True, kw_only=True)
class Layouts(Pass):
    """Moves Transposes that put channels first behind nodes that do not care, and takes away those that cancel."""

    name: ClassVar[str] = "tvm_layouts"
    summary: ClassVar[str] = "Channels stay last between kernels."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        editor = Editor(model)
        last: dict[ir.Value, ir.Value] = {}
        edits = []
        for node in list(model.graph):
            if node.op_type == "Transpose" and not node.domain:
                _merge(node, last)
            elif (act := _action(node)) is not None and any(v in last for v in node.inputs if v is not None):
                if not act(editor, node, last):
                    continue
                for output in node.outputs:
                    last[leave(editor, output)] = output
                edits.append(applied(node, "works with channels last"))
        for node in reversed(list(model.graph)):
            if node.op_type == "Transpose" and not node.domain:
                _tidy(editor, node)
        return edits


_Action = Callable[[Editor, ir.Node, Mapping[ir.Value, ir.Value]], bool]
"""Makes a node work with channels last; False where that is not possible, and then nothing was changed."""


def _action(node: ir.Node) -> _Action | None:
    if node.domain == DOMAIN:
        if node.op_type in OURS_OF_TWO:
            return _broadcasting
        return _unary if node.op_type in OURS else None
    if node.domain:
        return None
    if node.op_type in UNARY:
        return _unary
    if node.op_type in BROADCASTING:
        return _broadcasting
    if node.op_type in ("Concat", "Split", "Softmax"):
        return _along
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return _quantized
    if node.op_type in _REDUCTIONS:
        return _reduction
    return {"Pad": _pad, "Slice": _slice}.get(node.op_type)


def _unary(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    x = node.inputs[0]
    if x not in last:
        return False
    node.replace_input_with(0, last[x])  # type: ignore[index]
    return True


def _broadcasting(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    ranks = {len(v.shape) for v in node.inputs if v in last and v.shape is not None}  # type: ignore[union-attr]
    if len(ranks) != 1:
        return False
    rank = ranks.pop()
    given = [v for v in node.inputs if v is not None]
    for value in given:
        array = constant(value)
        if array is None and value not in last and (value.shape is None or len(value.shape) != rank):
            return False
        if array is not None and array.ndim > rank:
            return False
    for index, value in enumerate(given):
        array = constant(value)
        if value in last:
            node.replace_input_with(index, last[value])
        elif array is None:
            node.replace_input_with(index, enter(editor, node, value))
        elif array.size > 1:
            turned = array.reshape((1,) * (rank - array.ndim) + array.shape).transpose(TO_LAST[rank])
            node.replace_input_with(index, editor.weight(f"{value.name}_last", np.ascontiguousarray(turned)))
    return True


def _along(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    """Ops with an attribute `axis`."""
    images = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    if any(v is None or v.shape is None for v in images) or not any(v in last for v in images):
        return False
    rank = _rank(images)
    default = {"Split": 0, "Softmax": -1}.get(node.op_type)
    axis = attribute(node, "axis", default)
    if axis is None or any(output.shape is None for output in node.outputs):
        return False
    for index, value in enumerate(images):
        assert value is not None
        node.replace_input_with(index, last[value] if value in last else enter(editor, node, value))
    node.attributes["axis"] = ir.AttrInt64("axis", TO_LAST[rank].index(axis % rank))
    return True


def _quantized(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    x, scale = node.inputs[:2]
    if x not in last or scale is None or scale.shape is None:
        return False
    rank = _rank([x])
    if len(scale.shape) > 1 or attribute(node, "block_size", 0):
        return False
    if len(scale.shape) == 1:
        axis = attribute(node, "axis", 1) % rank
        node.attributes["axis"] = ir.AttrInt64("axis", TO_LAST[rank].index(axis))
    return _unary(editor, node, last)


def _reduction(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    x = node.inputs[0]
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant(node.inputs[1])
    if x not in last or axes is None or not attribute(node, "keepdims", 1):
        return False
    rank = _rank([x])
    turned = [TO_LAST[rank].index(int(axis) % rank) for axis in axes]
    if len(node.inputs) > 1:
        node.replace_input_with(1, editor.weight(f"{node.name}_axes", np.array(turned, np.int64)))
    else:
        node.attributes["axes"] = ir.AttrInt64s("axes", turned)
    return _unary(editor, node, last)


def _pad(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    x = node.inputs[0]
    pads = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if x not in last or pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
        return False
    rank = _rank([x])
    order = TO_LAST[rank]
    turned = np.concatenate([pads[:rank][list(order)], pads[rank:][list(order)]])
    node.replace_input_with(1, editor.weight(f"{node.name}_pads", turned))
    return _unary(editor, node, last)


def _slice(editor: Editor, node: ir.Node, last: Mapping[ir.Value, ir.Value]) -> bool:
    x = node.inputs[0]
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    if x not in last or axes is None:
        return False
    rank = _rank([x])
    turned = np.array([TO_LAST[rank].index(int(axis) % rank) for axis in axes], axes.dtype)
    node.replace_input_with(3, editor.weight(f"{node.name}_axes", turned))
    return _unary(editor, node, last)


def _rank(values: Sequence[ir.Value | None]) -> int:
    (first, *_) = values
    assert first is not None
    assert first.shape is not None
    return len(first.shape)


def _merge(node: ir.Node, last: dict[ir.Value, ir.Value]) -> None:
    """Makes a Transpose of a Transpose one, and notes a value that is an image with its channels last."""
    x, output = node.inputs[0], node.outputs[0]
    if x is None:
        return
    rank = None if x.shape is None else len(x.shape)
    order = tuple(attribute(node, "perm", () if rank is None else tuple(reversed(range(rank)))))
    inner = x.producer()
    if inner is not None and inner.op_type == "Transpose" and not inner.domain and attribute(inner, "perm") is not None:
        before = tuple(attribute(inner, "perm"))
        order = tuple(before[axis] for axis in order)
        node.replace_input_with(0, inner.inputs[0])
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
        x = inner.inputs[0]
        assert x is not None
    if order == tuple(range(len(order))) and not (output.is_graph_output() and _cannot_be_output(x)):
        hand_over(output, x)
    elif order == TO_FIRST.get(len(order)) and output.shape is not None and x.shape is not None:
        last[output] = x


def _cannot_be_output(value: ir.Value) -> bool:
    return value.producer() is None or value.is_graph_output()


def _tidy(editor: Editor, node: ir.Node) -> None:
    """Takes a Transpose away that nobody reads; one that moves no values is a Reshape."""
    x, output = node.inputs[0], node.outputs[0]
    if not output.uses() and not output.is_graph_output():
        editor.graph.remove(node, safe=True)
        return
    if x is None or x.shape is None or attribute(node, "perm") is None:
        return
    order = attribute(node, "perm")
    moved = [axis for axis in order if x.shape[axis] != 1]
    sizes = [x.shape[axis] for axis in order]
    if moved == sorted(moved) and sum(not isinstance(d, int) for d in sizes) <= 1:
        target = np.array([d if isinstance(d, int) else -1 for d in sizes], np.int64)
        shape = editor.weight(f"{node.name}_shape", target)
        node.op_type = "Reshape"
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(1, shape)
        output.shape = ordered(x, order)
