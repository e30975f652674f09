"""Stores weights as int8, with zero point 0 wherever that is exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, users
from onnxcomp.passes._legalize.graph import (
    STANDARD,
    Work,
    default_dtype,
    is_op,
    operand,
    producer,
    set_operand,
    stored,
)
from onnxcomp.target import Array

_INTEGERS = frozenset(np.dtype(t) for t in (np.uint8, np.int8, np.uint16, np.int16))
_LINEAR = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_MOVING = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"})
# Ops on integers: input that holds the weight; its zero point is two inputs behind.
_INTEGER_OPS = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}


def fold_quantized_constants(work: Work) -> None:
    """A constant that is quantized when the model runs is stored as the integers."""
    for node in work.nodes("QuantizeLinear"):
        value, output = node.inputs[0], node.outputs[0]
        array, scale = constant(value), constant(operand(node, 1))
        zero_point = constant(operand(node, 2))
        if array is None or scale is None or value is None or output.is_graph_output() or attribute(node, "block_size"):
            continue
        if operand(node, 2) is None and (kind := default_dtype(node)) is not None:
            zero_point = np.zeros(scale.shape, kind)
        if array.dtype != np.float32 or zero_point is None or zero_point.dtype not in _INTEGERS:
            advice = "; convert the model to float32 first" if array.dtype == np.float16 else ""
            kinds = f"{array.dtype}, quantized to {'another type' if zero_point is None else zero_point.dtype}"
            work.refuse(node, f"constant {value.name!r} is {kinds}; only float32 to 8 or 16 bits is folded{advice}")
            continue
        axis = int(attribute(node, "axis", 1))
        integers = _quantize(array, _spread(scale, array.ndim, axis), _spread(zero_point, array.ndim, axis))
        redirect(output, work.editor.weight(f"{value.name}_q", integers), users(output))
        work.done(node, f"constant {value.name!r} stored as {integers.dtype}")


def _quantize(array: Array, scale: Array, zero_point: Array) -> Array:
    info = np.iinfo(zero_point.dtype)
    shifted = np.rint(array / scale) + zero_point.astype(np.float32)
    return np.asarray(np.clip(shifted, info.min, info.max).astype(zero_point.dtype))


def _spread(parameter: Array, rank: int, axis: int) -> Array:
    if parameter.size == 1:
        return parameter.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return parameter.reshape(shape)


def is_weight(value: ir.Value) -> bool:
    """Whether a dequantized constant is read as the weight of linear ops only, also through ops that move values."""
    readers = value.uses()
    return bool(readers) and not value.is_graph_output() and all(_reads_weight(node, index) for node, index in readers)


def _reads_weight(node: ir.Node, index: int) -> bool:
    if node.domain not in STANDARD:
        return False
    if node.op_type in _MOVING and index == 0:
        return is_weight(node.outputs[0])
    return node.op_type in _LINEAR and index == 1


def symmetric_weights(work: Work) -> None:
    """uint8 weights, and int8 weights with a zero point, become int8 with zero point 0 where they fit."""
    for node in work.nodes("DequantizeLinear"):
        if is_weight(node.outputs[0]):
            _center(work, node, 0, 2)
    for node in list(work.model.graph):
        if (index := _INTEGER_OPS.get(node.op_type)) is not None and work.where(node):
            _center(work, node, index, index + 2)


def written_zero_points(work: Work) -> None:
    """The zero point of an int8 weight is written out: without it, onnxruntime 1.32 computes a Gemm in float."""
    for node in work.nodes("DequantizeLinear"):
        tensor, scale = stored(node.inputs[0]), constant(operand(node, 1))
        if tensor is None or scale is None or operand(node, 2) is not None or attribute(node, "block_size"):
            continue
        readers = node.outputs[0].uses()
        if tensor.dtype == ir.DataType.INT8 and any(is_op(n, "MatMul", "Gemm") and i == 1 for n, i in readers):
            set_operand(node, 2, work.editor.weight(f"{node.name}_zero_point", np.zeros(scale.shape, np.int8)))
            work.done(node, "zero point 0 written out")


def _center(work: Work, node: ir.Node, data: int, zero: int) -> None:
    value = operand(node, data)
    tensor, zero_point = stored(value), constant(operand(node, zero))
    if tensor is None or tensor.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return
    if zero_point is None:
        zero_point = np.zeros((), tensor.dtype.numpy())
    if tensor.dtype == ir.DataType.INT8 and not zero_point.any():
        return
    integers = constant(value)
    assert integers is not None
    assert value is not None
    axis = _axis(node, integers.ndim)
    shifted = integers.astype(np.int16) - _spread(zero_point, integers.ndim, axis).astype(np.int16)
    if shifted.size and (shifted.min() < -128 or shifted.max() > 127):
        span = f"{shifted.min()} to {shifted.max()}"
        work.refuse(
            node, f"weight {value.name!r} spans {span} around its zero point: int8 with zero point 0 cannot hold it"
        )
        return
    set_operand(node, data, work.editor.weight(f"{value.name}_s8", shifted.astype(np.int8)))
    zeros = np.zeros(zero_point.shape, np.int8)
    set_operand(node, zero, work.editor.weight(f"{value.name}_s8_zero_point", zeros))
    work.done(node, f"weight {value.name!r} stored as int8 with zero point 0 instead of {zero_point.dtype}")


def _axis(node: ir.Node, rank: int) -> int:
    """Axis along which parameters of a weight vary."""
    if node.op_type == "DequantizeLinear":
        return int(attribute(node, "axis", 1))
    return {"QLinearConv": 0, "QGemm": 0 if attribute(node, "transB", 0) else rank - 1}.get(node.op_type, rank - 1)


def scale_weight(editor: Editor, node: ir.Node, factor: Array) -> None:
    """Multiplies the scale of a Conv's quantized weight by one factor an output channel.

    Args:
        editor: Of the graph.
        node: A Conv whose weight is dequantized along axis 0 or as a whole.
        factor: Float32 `(channels,)`.
    """
    old = producer(node.inputs[1], "DequantizeLinear")
    assert old is not None
    scale, zero_point = constant(old.inputs[1]), constant(operand(old, 2))
    assert scale is not None
    set_weight(editor, node, old.inputs[0], np.asarray(scale * factor, np.float32), zero_point, 0)


def set_weight(
    editor: Editor, node: ir.Node, integers: ir.Value | None, scale: Array, zero_point: Array | None, axis: int
) -> None:
    """Gives a linear op a weight of constant integers, dequantized along `axis` by a node of its own.

    Args:
        editor: Of the graph.
        node: The op.
        integers: The constant integers.
        scale: Float32 `(channels,)`.
        zero_point: `()`, `(channels,)`, or None for 0.
        axis: Axis of the output channels.
    """
    old = node.inputs[1]
    assert old is not None
    assert integers is not None
    name = integers.name
    inputs = [integers, editor.weight(f"{name}_scale", scale)]
    if zero_point is not None:
        inputs.append(editor.weight(f"{name}_zero_point", np.broadcast_to(zero_point, scale.shape).copy()))
    attributes = {"axis": axis}
    scaled = editor.before(node, "DequantizeLinear", inputs, name=f"{name}_dq", attributes=attributes, like=old)
    node.replace_input_with(1, scaled)
