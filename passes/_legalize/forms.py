"""Writes Q/DQ in the one form that the other rules, and runtimes, read."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, redirect, replace_output, users
from onnxcomp.opset import opset
from onnxcomp.passes._legalize.graph import (
    Work,
    default_dtype,
    is_op,
    operand,
    set_operand,
    stored,
)
from onnxcomp.target import Array

_DOMAIN = "com.microsoft"
_WIDE = 21  # QuantizeLinear of 16 bits


def sorted_nodes(work: Work) -> None:
    """Nodes stand behind those whose outputs they read, as ONNX demands and not every tool writes."""
    seen: set[ir.Node] = set()
    for node in work.model.graph:
        for value in node.inputs:
            before = None if value is None else value.producer()
            if before is not None and before.graph is work.model.graph and before not in seen:
                work.model.graph.sort()
                work.done(node, "graph sorted: it stood in front of what computes its input")
                return
        seen.add(node)


def standard_domain(work: Work) -> None:
    """Q/DQ of the domain `com.microsoft` become those of ONNX, where the opset has them for their types."""
    for node in list(work.model.graph):
        if node.domain != _DOMAIN or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or not work.where(node):
            continue
        if (obstacle := _not_standard(work.model, node)) is None:
            node.domain = ""
            if is_op(node, "QuantizeLinear") and operand(node, 2) is None:
                node.attributes.pop("output_dtype", None)
            work.done(node, f"domain {_DOMAIN} replaced by ONNX's own")
        else:
            work.refuse(node, f"it stays in domain {_DOMAIN}: {obstacle}")


def _not_standard(model: ir.Model, node: ir.Node) -> str | None:
    zero_point = operand(node, 2)
    kind = None if zero_point is None else zero_point.dtype
    if zero_point is not None and kind is None and (array := constant(zero_point)) is not None:
        kind = ir.DataType.from_numpy(array.dtype)
    allowed = {ir.DataType.UINT8, ir.DataType.INT8}
    if node.op_type == "DequantizeLinear":
        allowed.add(ir.DataType.INT32)
    if opset(model) >= _WIDE:
        allowed |= {ir.DataType.UINT16, ir.DataType.INT16}
    if kind is None and zero_point is not None:
        return "the type of its zero point is not known"
    if kind is not None and kind not in allowed:
        return f"ONNX's own of opset {opset(model)} does not take {kind.name.lower()}"
    return None


def scalar_parameters(work: Work) -> None:
    """Scales and zero points of shape [1] on activations become scalars; a zero point that is absent is written."""
    for node in work.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = constant(operand(node, 1))
        if scale is None or scale.size != 1 or stored(operand(node, 0)) is not None:
            continue
        zero_point = constant(operand(node, 2))
        missing = operand(node, 2) is None
        if scale.ndim:
            node.replace_input_with(1, work.editor.weight(_name(node, 1), scale.reshape(())))
            if zero_point is not None and zero_point.ndim:
                node.replace_input_with(2, work.editor.weight(_name(node, 2), zero_point.reshape(())))
            node.attributes.pop("axis", None)
            work.done(node, "scale of shape [1] made a scalar")
        if missing and (dtype := default_dtype(node)) is not None:
            set_operand(node, 2, work.editor.weight(f"{node.name}_zero_point", np.zeros((), dtype)))
            node.attributes.pop("output_dtype", None)
            work.done(node, "zero point 0 written out")


def _name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    return f"{value.name if value is not None else node.name}_scalar"


def positive_axis(work: Work) -> None:
    """A channel axis counted from the end is counted from the front, which every runtime understands."""
    for node in work.nodes("QuantizeLinear", "DequantizeLinear"):
        axis, value = int(attribute(node, "axis", 1)), node.inputs[0]
        scale = constant(operand(node, 1))
        if axis >= 0 or value is None or scale is None:
            continue
        tensor = stored(value)
        shape = value.shape if tensor is None else tensor.shape
        rank = None if shape is None else len(shape)
        if rank is not None:
            node.attributes["axis"] = ir.AttrInt64("axis", axis % rank)
            work.done(node, f"axis {axis} written as {axis % rank}")


def clip_from_min_max(work: Work) -> None:
    """`Min(Max(x, low), high)` with constant scalars, in either order, becomes a Clip."""
    for outer in work.nodes("Min", "Max"):
        found = _scalar_operand(outer)
        if found is None:
            continue
        value, limit = found
        inner = value.producer()
        other = "Max" if outer.op_type == "Min" else "Min"
        if inner is None or not is_op(inner, other) or len(users(value)) != 1 or value.is_graph_output():
            continue
        second = _scalar_operand(inner)
        if second is None:
            continue
        source, inner_limit = second
        low, high = (inner_limit, limit) if outer.op_type == "Min" else (limit, inner_limit)
        if low > high:
            continue
        name = f"{outer.name}_clip"
        limits = [work.editor.weight(f"{name}_{end}", a.reshape(())) for end, a in (("low", low), ("high", high))]
        output = outer.outputs[0]
        clipped = work.editor.before(outer, "Clip", [source, *limits], name=name, like=output)
        redirect(output, clipped, users(output))
        if output.is_graph_output():
            replace_output(output, clipped)
        work.done(outer, "Min and Max written as one Clip")


def _scalar_operand(node: ir.Node) -> tuple[ir.Value, Array] | None:
    """The value and the constant that a Min or Max of the two compares."""
    if len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        limit = constant(other)
        if value is not None and limit is not None and limit.size == 1 and stored(value) is None:
            return value, limit
    return None
