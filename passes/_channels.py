"""Quantities by channel of a linear op: how strongly it reads each input channel, what a change of weights shifts."""

from __future__ import annotations

import numpy as np

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


def mean_shift(linear: Linear, change: Array, mean: Array) -> Array:
    """Mean that `change` of the weight adds to each output channel.

    Where a Conv pads, the zeros of the border are not accounted for.

    Args:
        linear: The op.
        change: Array in the shape of the weight.
        mean: Mean of each input channel, shape `(inputs,)`.

    Returns:
        Shape `(outputs,)`, float64.
    """
    by_input = _by_input(linear, change.astype(np.float64))
    return np.asarray(np.einsum("goi,gi->go", by_input, mean.reshape(len(by_input), -1)).reshape(-1))


def _by_input(linear: Linear, array: Array) -> Array:
    """An array like the weight as `(groups, outputs a group, inputs a group)`, summed over the taps of a kernel."""
    if linear.node.op_type != "Conv":
        return np.moveaxis(array, linear.channel_axis, 0)[None]
    groups = int(attribute(linear.node, "group", 1))
    return np.asarray(array.reshape(groups, len(array) // groups, array.shape[1], -1).sum(axis=3))
