"""Turns int8 activations into uint8, exactly: 128 is added to every integer and to every zero point.

An int8 value is followed to everything that computes it or reads it, through ops that move or compare integers. The
values found form a group that is turned as a whole, or left when one of its ops is not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import constant, redirect, replace_output, users
from onnxcomp.passes._legalize.graph import (
    STANDARD,
    Work,
    grid_of,
    is_op,
    only_reader,
    operand,
    producer,
    set_operand,
    stored,
)
from onnxcomp.passes._legalize.weights import is_weight

_ONE_INPUT = ({0: 2}, 4)
_TWO_INPUTS = ({0: 2, 3: 5}, 7)
# Op type: inputs of integers with the inputs of their zero points; input of the output's zero point, None if not 8 bit.
_QUANTIZED: Mapping[str, tuple[Mapping[int, int], int | None]] = {
    "QuantizeLinear": ({}, 2),
    "DequantizeLinear": ({0: 2}, None),
    "QLinearConv": ({0: 2}, 7),
    "QLinearMatMul": _TWO_INPUTS,
    "QLinearAdd": _TWO_INPUTS,
    "QLinearMul": _TWO_INPUTS,
    "QLinearSigmoid": _ONE_INPUT,
    "QLinearLeakyRelu": _ONE_INPUT,
    "QLinearAveragePool": _ONE_INPUT,
    "QLinearGlobalAveragePool": _ONE_INPUT,
    "QLinearReduceMean": _ONE_INPUT,
    "QLinearSoftmax": _ONE_INPUT,
    "QLinearWhere": ({1: 3, 4: 6}, 8),
    "QGemm": ({0: 2}, 8),
    "ConvInteger": ({0: 2}, None),
    "MatMulInteger": ({0: 2, 1: 3}, None),
    "MatMulIntegerToFloat": ({0: 4, 1: 5}, None),
}
# Inputs that stay int8 where they are constant: weights.
_WEIGHTS = {"QLinearMatMul": 3, "MatMulInteger": 1, "MatMulIntegerToFloat": 1}
# Op type: inputs that the output takes its integers from, None for all; outputs follow their order or the first.
_MOVING: Mapping[str, Sequence[int] | None] = {
    **dict.fromkeys(
        (
            "Clip", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "MaxPool",
            "ReduceMax", "ReduceMin", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose",
            "Unsqueeze",
        ),
        (0,),
    ),
    "Concat": None,
    "Max": None,
    "Min": None,
    "Where": (1, 2),
}  # fmt: skip
_SINKS = frozenset({"ArgMax", "ArgMin", "Shape", "Size"})


@dataclass(kw_only=True)
class _Group:
    """int8 values that have to be turned together.

    Attributes:
        values: The values, constants not among them.
        nodes: All ops that compute or read them.
        constants: Uses of int8 constants by these ops.
        problem: Why the group cannot be turned.
    """

    values: dict[ir.Value, None] = field(default_factory=dict)
    nodes: dict[ir.Node, None] = field(default_factory=dict)
    constants: list[tuple[ir.Node, int]] = field(default_factory=list)
    problem: str = ""


def unsigned_activations(work: Work) -> None:
    """Turns every group of int8 activations into uint8, and int8 constants that are read as activations."""
    seen: set[ir.Value] = set()
    for value in list(_signed_values(work.model)):
        if value in seen:
            continue
        group = _grow(work, value)
        seen.update(group.values)
        first = value.producer() or next(iter(group.nodes), None)
        if first is None or _converted(value) or not all(work.where(n) for n in group.nodes):
            continue
        if not any(n.op_type in _QUANTIZED for n in group.nodes):
            continue  # an int8 input that is no quantized activation
        if group.problem:
            work.refuse(first, f"int8 activation {value.name!r} stays int8: {group.problem}")
            continue
        _turn(work, group)
        work.done(
            first, f"int8 activation {value.name!r} and {len(group.values) - 1} that share its integers made uint8"
        )
    for node in work.nodes("DequantizeLinear"):
        tensor = stored(node.inputs[0])
        if (
            tensor is None
            or tensor.dtype != ir.DataType.INT8
            or is_weight(node.outputs[0])
            or not _meets_activations(work, node)
        ):
            continue
        _turn_constant(work, node, 0)
        _turn_zero_point(work, node, 2, node.inputs[1])
        work.done(node, "int8 constant that is read as an activation made uint8")


def _meets_activations(work: Work, node: ir.Node) -> bool:
    uses = node.outputs[0].uses()
    return any(work.kind(n) == "elementwise" or (work.kind(n) == "linear" and i == 0) for n, i in uses)


def _signed_values(model: ir.Model) -> Iterator[ir.Value]:
    """int8 values that are read or computed as quantized activations."""
    for value in model.graph.inputs:
        if value.dtype == ir.DataType.INT8 and not value.is_initializer():
            yield value
    for node in model.graph:
        _, zero = _QUANTIZED.get(node.op_type, ({}, None))
        if zero is None or node.domain not in (*STANDARD, "com.microsoft") or stored(node.inputs[0]) is not None:
            continue
        zero_point = constant(operand(node, zero))
        if zero_point is not None and zero_point.dtype == np.int8:
            yield node.outputs[0]


def _converted(value: ir.Value) -> bool:
    """Whether an int8 graph input or output is turned right where it enters or leaves."""
    entry = only_reader(value, "DequantizeLinear") if value.is_graph_input() else None
    if entry is not None and (quantize := only_reader(entry.outputs[0], "QuantizeLinear")) is not None:
        return _shifts(entry, quantize)
    leave = producer(value, "QuantizeLinear") if value.is_graph_output() and not users(value) else None
    source = None if leave is None else producer(leave.inputs[0], "DequantizeLinear")
    return source is not None and leave is not None and _shifts(leave, source)


def _shifts(signed: ir.Node, unsigned: ir.Node) -> bool:
    one, other = grid_of(signed), grid_of(unsigned)
    return (
        one is not None
        and other is not None
        and one.dtype == np.int8
        and other.dtype == np.uint8
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point.astype(np.int16) + 128, other.zero_point)
    )


def _grow(work: Work, start: ir.Value) -> _Group:
    group = _Group()
    todo = [start]
    while todo:
        value = todo.pop()
        if value in group.values:
            continue
        group.values[value] = None
        node = value.producer()
        if node is not None:
            todo += _peers(work, group, node, output=True)
        elif not value.is_graph_input():
            group.problem = f"{value.name!r} is computed nowhere"
        for reader, index in value.uses():
            todo += _peers(work, group, reader, index=index)
    return group


def _peers(work: Work, group: _Group, node: ir.Node, *, output: bool = False, index: int = -1) -> Iterator[ir.Value]:
    """Values that have to be turned with the one that `node` computes, or reads as input `index`."""
    if node.graph is not work.model.graph:
        group.problem = f"{node.op_type} {node.name!r} reads it in a subgraph"
        return
    group.nodes[node] = None
    if node.op_type in _QUANTIZED and node.domain in (*STANDARD, "com.microsoft"):
        inputs, zero = _QUANTIZED[node.op_type]
        if (output and zero is None) or (not output and index not in inputs):
            group.problem = f"{node.op_type} {node.name!r} uses it in another way"
        # A kernel for signed and unsigned integers side by side is rare: all of its activations are turned at once.
        weight = _WEIGHTS.get(node.op_type)
        data = [i for i in inputs if i != weight or stored(operand(node, i)) is None]
        yield from _inputs(group, node, data)
        zero_point = constant(operand(node, zero)) if zero is not None else None
        if zero_point is not None and zero_point.dtype == np.int8:
            yield node.outputs[0]
    elif is_op(node, *_MOVING):
        data = list(_MOVING[node.op_type] or range(len(node.inputs)))
        if node.op_type == "Clip":
            data = [i for i in (0, 1, 2) if operand(node, i) is not None]
        if not output and index not in data:
            group.problem = f"{node.op_type} {node.name!r} uses it in another way"
        yield from _inputs(group, node, data)
        yield from node.outputs if node.op_type == "Split" else node.outputs[:1]
    elif output or node.op_type not in _SINKS:
        group.problem = f"{node.op_type} {node.name!r} is not known to work on integers"


def _inputs(group: _Group, node: ir.Node, data: Sequence[int]) -> Iterator[ir.Value]:
    for index in data:
        value = operand(node, index)
        tensor = stored(value)
        if tensor is not None:
            if tensor.dtype == ir.DataType.INT8 and (node, index) not in group.constants:
                group.constants.append((node, index))
        elif value is not None and _is_signed(node, index, value):
            yield value


def _is_signed(node: ir.Node, index: int, value: ir.Value) -> bool:
    inputs, _ = _QUANTIZED.get(node.op_type, ({}, None))
    zero_point = constant(operand(node, inputs[index])) if index in inputs else None
    return value.dtype == ir.DataType.INT8 if zero_point is None else bool(zero_point.dtype == np.int8)


def _turn(work: Work, group: _Group) -> None:
    for node in group.nodes:
        if node.op_type not in _QUANTIZED:
            continue
        inputs, zero = _QUANTIZED[node.op_type]
        for index, zero_index in inputs.items():
            if node.inputs[index] in group.values or (node, index) in group.constants:
                _turn_zero_point(work, node, zero_index, operand(node, zero_index - 1))
        if zero is not None and node.outputs[0] in group.values:
            _turn_zero_point(work, node, zero, operand(node, zero - 1))
    for node, index in group.constants:
        _turn_constant(work, node, index)
    for value in group.values:
        if value.is_graph_input():
            _enter(work, value)
        else:
            value.dtype = ir.DataType.UINT8
            if value.is_graph_output():
                _leave(work, value)


def _turn_constant(work: Work, node: ir.Node, index: int) -> None:
    value = node.inputs[index]
    array = constant(value)
    assert array is not None
    assert value is not None
    turned = (array.astype(np.int16) + 128).astype(np.uint8)
    node.replace_input_with(index, work.editor.weight(f"{value.name}_u8", turned))


def _turn_zero_point(work: Work, node: ir.Node, index: int, scale: ir.Value | None) -> None:
    value = operand(node, index)
    array = constant(value)
    if array is None:
        factor = constant(scale)
        array = np.zeros(() if factor is None else factor.shape, np.int8)
    if array.dtype == np.int8:
        name = f"{node.name}_zero_point" if value is None else f"{value.name}_u8"
        set_operand(node, index, work.editor.weight(name, (array.astype(np.int16) + 128).astype(np.uint8)))


def _enter(work: Work, value: ir.Value) -> None:
    """Turns an int8 graph input, which keeps its type, behind where it enters."""
    readers = users(value)
    turned = _requantize(work, value, np.int8(0), np.uint8(128))
    redirect(value, turned, readers)


def _leave(work: Work, value: ir.Value) -> None:
    """Turns a uint8 value back for a graph output, which keeps its type."""
    turned = _requantize(work, value, np.uint8(128), np.int8(0))
    replace_output(value, turned)


def _requantize(work: Work, value: ir.Value, source: np.integer, target: np.integer) -> ir.Value:
    one = work.editor.weight(f"{value.name}_one", np.asarray(1, np.float32))
    zero_points = [work.editor.weight(f"{value.name}_zero", np.asarray(z)) for z in (source, target)]
    floats = work.editor.after(
        value,
        "DequantizeLinear",
        [value, one, zero_points[0]],
        name=f"{value.name}_plain",
        like=value,
        dtype=ir.DataType.FLOAT,
    )
    return work.editor.after(
        floats, "QuantizeLinear", [floats, one, zero_points[1]], name=f"{value.name}_turned", like=value,
        dtype=ir.DataType.from_numpy(target.dtype),
    )  # fmt: skip
