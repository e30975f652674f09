"""Which nodes of a graph can compute in float16, and the casts between them and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, replace_output, users
from onnxcomp.macs import MAC_OPS
from onnxcomp.model import infer_shapes
from onnxcomp.opset import opset
from onnxcomp.select import Select
from onnxcomp.target import Array

LARGEST = 65504.0
_MASK = 1e8
"""Constants beyond this stand for infinity, as in masks, and may become the largest float16."""
_LOSS = 1e-3
"""Relative error above which a constant stays float32; rounding normal float16 values costs 3e-4."""
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")
_GROWING = frozenset({"CumSum", "Exp", "Pow", "ReduceL2", "ReduceProd", "ReduceSumSquare"})
_MOVING = frozenset({"Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Cast behind them, not before: onnxruntime 1.32 crashes on a Cast, Transpose of leading axes, MatMul in float16."""
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def to_half(array: Array, *, clamp: bool = False) -> Array | str:
    """A constant in float16, or why it has to stay float32.

    Args:
        array: Float32, any shape.
        clamp: Whether values that stand for infinity may become the largest float16.
    """
    finite = array[np.isfinite(array)]
    if clamp:
        finite = finite[np.abs(finite) < _MASK]
        array = np.where(np.isfinite(array) & (np.abs(array) >= _MASK), np.sign(array) * np.float32(LARGEST), array)
    peak = float(np.abs(finite).max(initial=0.0))
    if peak > LARGEST:
        return f"it holds {peak:.4g}, more than the largest float16, {LARGEST:g}"
    half = array.astype(np.float16)
    kept = finite.astype(np.float16).astype(np.float32)
    error = float(np.linalg.norm(kept - finite)) / max(float(np.linalg.norm(finite)), 1e-30)
    if error > _LOSS:
        return f"float16 would change it by {100 * error:.2g} %, since values below 6.1e-5 lose bits"
    return half


@dataclass(kw_only=True)
class HalfPlan:
    """What can compute in float16.

    Attributes:
        slots: Nodes with the indices of inputs and outputs that become float16.
        constants: Constants that they read, in float16.
        refusals: Nodes that compute in float32, and why.
    """

    slots: dict[ir.Node, tuple[list[int], list[int]]] = field(default_factory=dict)
    constants: dict[ir.Value, Array] = field(default_factory=dict)
    refusals: dict[ir.Node, str] = field(default_factory=dict)


def float_values(model: ir.Model) -> set[str]:
    """Names of the values of the main graph that hold float32, as far as types can be inferred."""
    known = model.clone()
    infer_shapes(known)
    values = [*known.graph.inputs, *known.graph.initializers.values(), *(v for n in known.graph for v in n.outputs)]
    return {v.name for v in values if v.name is not None and v.dtype == FLOAT}


def plan_half(
    model: ir.Model,
    where: Select,
    keep: Collection[str],
    peaks: Mapping[str, float],
    floats: set[str],
    *,
    keep_io: bool,
) -> HalfPlan:
    """Finds out what can compute in float16.

    Args:
        model: The model.
        where: Takes nodes.
        keep: Op types that stay float32.
        peaks: Largest magnitude of values by name, from data; without it, values that grow fast count as too large.
        floats: Of `float_values`.
        keep_io: Inputs and outputs of the model stay float32.
    """
    plan = HalfPlan()
    version = opset(model)
    for node in model.graph:
        slots = _slots(node, version, floats)
        if slots is None or not where(node):
            continue
        reason = _objection(node, keep, peaks) or _round_constants(node, slots[0], plan)
        if reason:
            plan.refusals[node] = reason
        else:
            plan.slots[node] = slots
    for node in list(plan.slots):
        if node.op_type in _MOVING and not any(_arrives(node.inputs[i], plan, keep_io) for i in plan.slots[node][0]):
            del plan.slots[node]
    for node in list(_idle(plan)):
        del plan.slots[node]
    return plan


def _arrives(value: ir.Value | None, plan: HalfPlan, keep_io: bool) -> bool:
    """Whether a value comes in float16, so that an op which only moves it need not wait for a cast."""
    if value is None:
        return False
    producer = value.producer()
    if producer is None:
        return value in plan.constants or (value.is_graph_input() and not keep_io)
    return producer in plan.slots and value.index() in plan.slots[producer][1]


def _slots(node: ir.Node, version: int, floats: set[str]) -> tuple[list[int], list[int]] | None:
    """Indices of float32 inputs and outputs whose type the schema lets be float16; None if there are none."""
    if node.domain not in ("", "ai.onnx") or any(a.type in _GRAPHS for a in node.attributes.values()):
        return None
    if node.op_type == "Cast":  # a number that is made float may as well be made float16
        source = node.inputs[0]
        made = attribute(node, "to") == FLOAT and source is not None and source.name not in floats
        return ([], [0]) if made and source is not None and source.dtype != HALF else None
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    free = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    read = [i for i, v in enumerate(node.inputs) if v is not None and v.name in floats]
    written = [i for i, v in enumerate(node.outputs) if v.name in floats]
    inputs = [i for i in read if _parameter(schema.inputs, i) in free]
    bound = {_parameter(schema.inputs, i) for i in inputs}
    outputs = [i for i in written if _parameter(schema.outputs, i) in bound]
    return (inputs, outputs) if inputs else None


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _parameter(formal: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> str:
    """Type variable of an input or output; the last one may stand for many."""
    return formal[min(index, len(formal) - 1)].type_str if formal else ""


def _objection(node: ir.Node, keep: Collection[str], peaks: Mapping[str, float]) -> str:
    """Why a node has to compute in float32; empty if it need not."""
    if node.op_type in keep:
        return f"{node.op_type} stays float32, as the field keep says"
    values = [v for v in (*node.inputs, *node.outputs) if v is not None]
    producers = [p for v in node.inputs if v is not None and (p := v.producer()) is not None]
    if any(n.op_type in _QUANTIZING for n in (*producers, *(u for v in node.outputs for u in users(v)))):
        return "it stands beside Q/DQ; integer kernels are fused from float32"
    for value in values:
        peak = peaks.get(value.name or "")
        if peak is not None and peak > LARGEST / 2:
            return f"{value.name} reaches {peak:.4g} on the data; the largest float16 is {LARGEST:g}"
        producer = value.producer()
        if peak is None and producer is not None and _grows(producer):
            return f"what {producer.op_type} puts out may exceed the largest float16; calibration data would tell"
    return ""


def _grows(node: ir.Node) -> bool:
    """Whether an op puts out values much larger than it reads; a product with itself does, too."""
    squares = node.op_type == "Mul" and node.inputs[0] is node.inputs[1]
    return node.op_type in _GROWING or squares


def _round_constants(node: ir.Node, inputs: list[int], plan: HalfPlan) -> str:
    """Rounds the constants that a node reads; why one cannot be rounded, or empty."""
    for index in inputs:
        value = node.inputs[index]
        if value is None or value in plan.constants:
            continue
        array = constant(value)
        if array is None:
            continue
        half = to_half(array, clamp=True)
        if isinstance(half, str):
            return f"its constant {value.name} stays float32: {half}"
        plan.constants[value] = half
    return ""


def _idle(plan: HalfPlan) -> Iterator[ir.Node]:
    """Nodes in parts without a product or convolution, where casts would be all that is gained."""
    seen: set[ir.Node] = set()
    for start in plan.slots:
        part, front = [start], [start]
        if start in seen:
            continue
        seen.add(start)
        while front:
            node = front.pop()
            inputs, outputs = plan.slots[node]
            near = [p for i in inputs if (v := node.inputs[i]) is not None and (p := v.producer()) is not None]
            near += [u for i in outputs for u in users(node.outputs[i])]
            fresh = [n for n in dict.fromkeys(near) if n in plan.slots and n not in seen]
            seen.update(fresh)
            front += fresh
            part += fresh
        if not any(node.op_type in MAC_OPS for node in part):
            yield from part


def make_half(model: ir.Model, plan: HalfPlan, *, keep_io: bool) -> None:
    """Turns the planned nodes to float16, with casts where they meet the rest.

    Args:
        model: The model.
        plan: Of `plan_half`.
        keep_io: Inputs and outputs of the model stay float32.
    """
    editor = Editor(model)
    written = {node.outputs[i] for node, (_, outputs) in plan.slots.items() for i in outputs}
    read: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
    for node, (inputs, _) in plan.slots.items():
        for index in inputs:
            value = node.inputs[index]
            assert value is not None
            read.setdefault(value, []).append((node, index))
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", HALF)
    for value, uses in read.items():
        if value in written:
            continue
        name = f"{value.name}_f16"
        if value in plan.constants:
            half = editor.weight(name, plan.constants[value])
        elif value.is_graph_input() and not keep_io:
            written.add(value)
            continue
        else:
            half = editor.after(value, "Cast", [value], name=name, attributes={"to": HALF}, like=value, dtype=HALF)
        for node, index in uses:
            node.replace_input_with(index, half)
    for value in written:
        others = [use for use in value.uses() if use not in read.get(value, [])]
        value.type = ir.TensorType(HALF)  # a new one: clones of the model share the old
        output = value.is_graph_output() and keep_io
        if not others and not output:
            continue
        whole = editor.after(
            value, "Cast", [value], name=f"{value.name}_f32", attributes={"to": FLOAT}, like=value, dtype=FLOAT
        )
        for node, index in others:
            node.replace_input_with(index, whole)
        if output:
            replace_output(value, whole)
