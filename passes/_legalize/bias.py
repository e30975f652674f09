"""Stores every bias of a quantized linear op as int32 with scale `s_x * s_w`, the form that integer kernels take."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, redirect
from onnxcomp.passes._legalize.graph import (
    LINEAR,
    Work,
    dequantized,
    floats,
    only_reader,
    operand,
    producer,
    stored,
    weight_of,
)
from onnxcomp.passes._legalize.weights import set_weight
from onnxcomp.qdq import quantize_bias
from onnxcomp.target import Array

_TOLERANCE = 1e-4  # of the scale; what is off by less is rounding of the tool that wrote it
_LIMIT = 2.0**30  # half of what int32 holds, so that the accumulator that the bias starts has room


def integer_biases(work: Work) -> None:
    """Requantizes biases that are float, not int32, or of another scale."""
    for node in work.nodes(*LINEAR):
        weight, activation = weight_of(node), dequantized(node.inputs[0])
        if weight is None or activation is None or activation[1].axis is not None:
            continue
        found = _bias(node)
        weight_scale = constant(operand(weight, 1))
        if found is None or weight_scale is None or weight_scale.dtype != np.float32:
            continue
        value, user, bias = found
        scale = np.asarray(activation[1].scale * weight_scale, np.float32)
        scale = scale.reshape(()) if scale.size == 1 else scale
        channels = _channels(node, weight)
        if _is_legal(value, scale) or bias.size not in (1, channels) or scale.size not in (1, channels):
            continue
        bias = np.broadcast_to(bias, channels)
        if (np.abs(bias) / scale >= _LIMIT).any():
            wider = _make_room(work, node, weight, bias, activation[1].scale)
            if wider is None:
                work.refuse(node, f"bias {value.name!r} is too large for int32 at scale s_x * s_w")
                continue
            scale = wider
        redirect(value, quantize_bias(work.editor, value, bias, scale, user), [user])
        work.done(node, f"bias {value.name!r} stored as int32 with scale s_x * s_w")


def _bias(node: ir.Node) -> tuple[ir.Value, ir.Node, Array] | None:
    """The bias as it is read, the op that reads it, and its values, float `(channels,)`."""
    user, value = node, operand(node, 2)
    if node.op_type == "MatMul":
        add = only_reader(node.outputs[0], "Add")
        if add is None or add.inputs[0] is add.inputs[1]:
            return None
        user, value = add, next(v for v in add.inputs if v is not node.outputs[0])
    array = floats(value)
    if value is None or array is None or (user is not node and array.ndim != 1):
        return None
    return value, user, array.reshape(-1)


def _channels(node: ir.Node, weight: ir.Node) -> int:
    integers = stored(weight.inputs[0])
    assert integers is not None
    return integers.shape.numpy()[-1 if _channels_last(node) else 0]


def _channels_last(node: ir.Node) -> bool:
    """Whether the output channels are the last axis of the weight, and not the first."""
    return node.op_type != "Conv" and not (node.op_type == "Gemm" and attribute(node, "transB", 0))


def _is_legal(value: ir.Value, scale: Array) -> bool:
    """Whether a bias is int32 with this scale and no zero point."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None:
        return False
    integers, own, zero_point = (constant(operand(dequantize, i)) for i in range(3))
    if integers is None or own is None or integers.dtype != np.int32 or (zero_point is not None and zero_point.any()):
        return False
    return own.size == scale.size and np.allclose(own.reshape(-1), scale.reshape(-1), rtol=_TOLERANCE, atol=0.0)


def _make_room(work: Work, node: ir.Node, weight: ir.Node, bias: Array, input_scale: Array) -> Array | None:
    """Widens the weight's scale in channels whose weights are so small that the bias overflows an int32.

    Such a channel is its bias and next to nothing else: what its weights lose to rounding is less than 1e-4 of that.

    Returns:
        The new scale of the bias; None if the weight is not symmetric int8 along its output channels, or exactness is
        asked for.
    """
    integers, scale, zero_point = (constant(operand(weight, i)) for i in range(3))
    if integers is None or scale is None or work.exact or (zero_point is not None and zero_point.any()):
        return None
    axis = integers.ndim - 1 if _channels_last(node) else 0
    if scale.size > 1 and int(attribute(weight, "axis", 1)) % integers.ndim != axis:
        return None
    wide = np.maximum(np.broadcast_to(scale, bias.shape), np.abs(bias) / (input_scale * np.float32(_LIMIT)))
    wide = wide.astype(np.float32)
    shape = [1] * integers.ndim
    shape[axis] = -1
    rounded = np.rint(integers * (scale / wide).reshape(shape)).astype(np.int8)
    name = "weight" if weight.inputs[0] is None else weight.inputs[0].name
    set_weight(work.editor, node, work.editor.weight(f"{name}_wide", rounded), wide, None, axis)
    work.done(node, f"weight scale widened in {int((wide > scale).sum())} channels, for their bias to fit an int32")
    return np.asarray(input_scale * wide, np.float32)
