"""Quantities by channel of a linear op: how strongly it reads each input channel, what a change of weights shifts."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.passes._placement import Linear
from onnxcomp.target import Array


def channel_axis(linear: Linear) -> int:
    """Axis of the channels in the op's input."""
    return 1 if linear.node.op_type == "Conv" else -1


def input_norms(linear: Linear) -> tuple[Array, int]:
    """Squared norm of the weights that read each input channel, shape `(inputs,)`, and the axis of the channels."""
    weight = constant(linear.weight)
    assert weight is not None
    return _by_input(linear, weight.astype(np.float64) ** 2).sum(axis=1).reshape(-1), channel_axis(linear)


def mean_shift(linear: Linear, change: Array, mean: Array, shape: tuple[int, ...] = ()) -> Array:
    """Mean that `change` of the weight adds to each output channel.

    Args:
        linear: The op.
        change: Array in the shape of the weight.
        mean: Mean of each input channel, shape `(inputs,)`.
        shape: Of the input, for a Conv: where it pads, a tap reads zeros at some positions.

    Returns:
        Shape `(outputs,)`, float64.
    """
    change = change.astype(np.float64)
    if linear.node.op_type == "Conv":
        for axis, size in enumerate(shape[2:]):
            inside = _share_inside(linear.node, axis, size, change.shape[2 + axis])
            change = change * inside.reshape(-1, *(1,) * (len(shape) - 3 - axis))
    by_input = _by_input(linear, change)
    return np.asarray(np.einsum("goi,gi->go", by_input, mean.reshape(len(by_input), -1)).reshape(-1))


def _share_inside(node: ir.Node, axis: int, size: int, kernel: int) -> Array:
    """For each tap of a kernel along one spatial axis, the share of output positions at which it reads no padding."""

    def setting(name: str) -> int:
        values = attribute(node, name, None)
        return 1 if values is None else int(values[axis])

    stride, dilation, auto = setting("strides"), setting("dilations"), attribute(node, "auto_pad", "NOTSET")
    extent = (kernel - 1) * dilation + 1
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        outputs = -(-size // stride)
        total = max((outputs - 1) * stride + extent - size, 0)
        before = total // 2 if auto == "SAME_UPPER" else total - total // 2
    else:
        pads = attribute(node, "pads", None) if auto == "NOTSET" else None
        before, after = (0, 0) if pads is None else (int(pads[axis]), int(pads[axis + len(pads) // 2]))
        outputs = max((size + before + after - extent) // stride + 1, 1)
    position = np.arange(outputs) * stride - before + np.arange(kernel)[:, None] * dilation
    return np.asarray(((position >= 0) & (position < size)).mean(axis=1))


def _by_input(linear: Linear, array: Array) -> Array:
    """An array like the weight as `(groups, outputs a group, inputs a group)`, summed over the taps of a kernel."""
    if linear.node.op_type != "Conv":
        return np.moveaxis(array, linear.channel_axis, 0)[None]
    groups = int(attribute(linear.node, "group", 1))
    return np.asarray(array.reshape(groups, len(array) // groups, array.shape[1], -1).sum(axis=3))
