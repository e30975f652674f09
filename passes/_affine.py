"""Folds multiplications and additions by constants around a Conv into its weight and bias."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, bypass, constant, sole_reader
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select
from onnxcomp.target import Array

_AFFINE = ("Mul", "Div", "Add", "Sub")


def fold_affine(model: ir.Model, where: Select) -> list[Edit]:
    """Folds `conv(a x + b)` and `a conv(x) + b` for every Conv of the main graph with constant parameters.

    A shift before a Conv that pads stays, since padding inserts zeros behind it; its scale is folded all the same.
    """
    editor = Editor(model)
    edits: list[Edit] = []
    for node in list(model.graph):
        if node.op_type == "Conv" and node.domain == "" and where(node) and _has_own_constants(node):
            _after(editor, node, edits)
            _before(editor, node, edits)
    return edits


def _has_own_constants(node: ir.Node) -> bool:
    values = [v for v in node.inputs[1:] if v is not None]
    return all(constant(v) is not None and len(v.uses()) == 1 for v in values)


def _after(editor: Editor, conv: ir.Node, edits: list[Edit]) -> None:
    output = conv.outputs[0]
    while (step := sole_reader(output)) is not None:
        weight, bias = _parameters(conv)
        found = _operand(step, output, len(weight), weight.ndim)
        if found is None:
            return
        scale, shift = found
        shape = (-1,) + (1,) * (weight.ndim - 1)
        _store(editor, conv, weight * scale.reshape(shape), bias * scale + shift)
        edits.append(applied(step, f"folded into {conv.name}"))
        bypass(step, output, rename=True)


def _before(editor: Editor, conv: ir.Node, edits: list[Edit]) -> None:
    weight, _ = _parameters(conv)
    channels = weight.shape[1] * int(attribute(conv, "group", 1))
    steps: list[ir.Node] = []
    scale, shift = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    value = conv.inputs[0]
    while value is not None and (step := value.producer()) is not None and sole_reader(value) is not None:
        source = next((v for v in step.inputs if constant(v) is None), None)
        found = _operand(step, source, channels, weight.ndim)
        if found is None or source is None:
            break
        shift, scale = shift + scale * found[1], scale * found[0]
        steps.append(step)
        value = source
    padded = any(attribute(conv, "pads", ()) or ()) or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    leaves_shift = padded and bool(shift.any())
    if not steps or (leaves_shift and (len(steps) == 1 or not np.all(scale))):
        return
    _absorb(editor, conv, scale, np.zeros_like(shift) if leaves_shift else shift)
    for step in steps:
        source = next(v for v in step.inputs if constant(v) is None)
        edits.append(applied(step, f"folded into {conv.name}"))
        bypass(step, source)
    if leaves_shift:
        value = conv.inputs[0]
        assert value is not None
        offset = shift / scale
        offset = offset[:1] if np.all(offset == offset[0]) else offset.reshape(-1, *(1,) * (weight.ndim - 2))
        name = f"{value.name}_shift"
        inputs = [value, editor.weight(f"{name}_offset", offset.astype(np.float32))]
        conv.replace_input_with(0, editor.before(conv, "Add", inputs, name=name, like=value))


def _absorb(editor: Editor, conv: ir.Node, scale: Array, shift: Array) -> None:
    """`conv(scale x + shift)` without padding: both go into the parameters."""
    weight, bias = _parameters(conv)
    groups = int(attribute(conv, "group", 1))
    shape = (groups, 1, weight.shape[1]) + (1,) * (weight.ndim - 2)
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    moved = (grouped * shift.reshape(shape)).sum(axis=tuple(range(2, grouped.ndim))).reshape(-1)
    _store(editor, conv, (grouped * scale.reshape(shape)).reshape(weight.shape), bias + moved)


def _operand(step: ir.Node, value: ir.Value | None, channels: int, rank: int) -> tuple[Array, Array] | None:
    """Scale and shift a channel that `step` applies to `value`, or None if it is no such step."""
    if step.op_type not in _AFFINE or step.domain != "" or len(step.inputs) != 2:
        return None
    first = step.inputs[0] is value
    other = step.inputs[1 if first else 0]
    array = constant(other)
    if array is None or array.dtype != np.float32 or (step.op_type in ("Div", "Sub") and not first):
        return None
    vector = _per_channel(array, channels, rank)
    if vector is None:
        return None
    one, zero = np.ones_like(vector), np.zeros_like(vector)
    forms: dict[str, Callable[[], tuple[Array, Array]]] = {
        "Mul": lambda: (vector, zero),
        "Div": lambda: (one / vector, zero),
        "Add": lambda: (one, vector),
        "Sub": lambda: (one, -vector),
    }
    return forms[step.op_type]()


def _per_channel(array: Array, channels: int, rank: int) -> Array | None:
    """A constant as one value a channel (axis 1 of `rank` axes), or None if it varies along another axis."""
    if array.size == 1 and array.ndim <= rank:
        return np.full(channels, array.reshape(-1)[0], np.float32)
    padded = (1,) * (rank - array.ndim) + array.shape
    if array.ndim > rank or array.size != channels or padded[1] != channels:
        return None
    return np.asarray(array.reshape(-1), np.float32)


def _parameters(conv: ir.Node) -> tuple[Array, Array]:
    weight = constant(conv.inputs[1])
    assert weight is not None
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    return weight, np.zeros(len(weight), np.float32) if bias is None else bias


def _store(editor: Editor, conv: ir.Node, weight: Array, bias: Array) -> None:
    old = conv.inputs[1]
    assert old is not None
    conv.replace_input_with(1, editor.weight(f"{old.name}_folded", weight.astype(np.float32)))
    if len(conv.inputs) < 3:
        if not bias.any():
            return
        conv.resize_inputs(3)
    conv.replace_input_with(2, editor.weight(f"{conv.name}_bias", bias.astype(np.float32)))
