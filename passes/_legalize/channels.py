"""Activations quantized per channel in front of a depthwise Conv are quantized per tensor instead, exactly.

Integer kernels take one scale for a tensor. The scale of a channel is moved into the weights on both sides (as in
cross-layer equalization, Nagel et al. 2019): the Conv before multiplies the channel by `s / s_c`, the depthwise Conv
behind by `s_c / s`. Only scales of weights change, their integers stay.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, redirect, users
from onnxcomp.passes._legalize.graph import (
    Work,
    clip_limits,
    grid_of,
    is_op,
    operand,
    producer,
    set_operand,
    stored,
    weight_of,
)
from onnxcomp.passes._legalize.weights import scale_weight
from onnxcomp.qdq import dequantized_weight
from onnxcomp.quant import Grid
from onnxcomp.target import Array


def channels_to_weights(work: Work) -> None:
    """Moves the scales of channels out of every Q/DQ pair where that is exact."""
    for quantize in work.nodes("QuantizeLinear"):
        grid = grid_of(quantize)
        if grid is None or grid.axis is None or stored(quantize.inputs[0]) is not None:
            continue
        found = _match(quantize, grid)
        if isinstance(found, str):
            work.refuse(quantize, f"its scale varies by channel, for which there is no integer kernel: {found}")
        else:
            _move(work, quantize, grid, *found)


def _match(quantize: ir.Node, grid: Grid) -> tuple[ir.Node, ir.Node | None, list[ir.Node], list[ir.Node]] | str:
    """Conv before, activation between, DequantizeLinears and depthwise Convs behind; or why they are not found."""
    if grid.axis != 1 or len(np.unique(grid.zero_point)) != 1:
        return "its axis is not 1 or its zero points differ"
    value = quantize.inputs[0]
    assert value is not None
    activation = producer(value, "Relu", "Clip")
    source = value if activation is None else activation.inputs[0]
    conv = producer(source, "Conv")
    if conv is None or not _channels_scale(conv, grid.scale.size):
        return "it stands behind no Conv with a quantized weight and a constant bias"
    if any(v.is_graph_output() or len(users(v)) != 1 for v in (value, source) if v is not None):
        return "others read the value in front of it"
    if activation is not None and not _saturates(activation, grid):
        return f"{activation.op_type} {activation.name!r} in front of it cuts off more than it does"
    dequantizers = users(quantize.outputs[0])
    if any(not is_op(n, "DequantizeLinear") or not _agrees(n, grid) for n in dequantizers):
        return "not only DequantizeLinear reads it"
    depthwise = [reader for n in dequantizers for reader in users(n.outputs[0])]
    if any(n.outputs[0].is_graph_output() for n in dequantizers) or not all(
        _is_depthwise(n, grid.scale.size) for n in depthwise
    ):
        return "not only depthwise Convs with quantized weights read it"
    return conv, activation, dequantizers, depthwise


def _channels_scale(conv: ir.Node, channels: int) -> bool:
    weight = weight_of(conv)
    bias = operand(conv, 2)
    if weight is None or (bias is not None and dequantized_weight(bias) is None):
        return False
    return _along_outputs(weight, channels)


def _along_outputs(dequantize: ir.Node, channels: int) -> bool:
    integers, scale = stored(dequantize.inputs[0]), constant(dequantize.inputs[1])
    if integers is None or scale is None or not len(integers.shape) or integers.shape[0] != channels:
        return False
    return scale.size == 1 or int(attribute(dequantize, "axis", 1)) % len(integers.shape) == 0


def _saturates(activation: ir.Node, grid: Grid) -> bool:
    limits = clip_limits(activation)
    if limits is None:
        return False
    low, high = (np.rint(np.float32(v) / grid.scale) + grid.zero_point.astype(np.float32) for v in limits)
    return bool((low <= grid.qmin).all() and (high >= grid.qmax).all())


def _agrees(dequantize: ir.Node, grid: Grid) -> bool:
    other = grid_of(dequantize)
    return other is not None and other.axis == grid.axis and np.array_equal(other.scale, grid.scale)


def _is_depthwise(node: ir.Node, channels: int) -> bool:
    weight = weight_of(node) if is_op(node, "Conv") else None
    if weight is None or int(attribute(node, "group", 1)) != channels or stored(node.inputs[0]) is not None:
        return False
    return _along_outputs(weight, channels)


def _move(
    work: Work,
    quantize: ir.Node,
    grid: Grid,
    conv: ir.Node,
    activation: ir.Node | None,
    dequantizers: list[ir.Node],
    depthwise: list[ir.Node],
) -> None:
    scale = np.asarray(grid.scale.max(), np.float32)
    up = np.asarray(scale / grid.scale, np.float32)
    scale_weight(work.editor, conv, up)
    _scale_bias(work, conv, up)
    for node in depthwise:
        scale_weight(work.editor, node, np.asarray(grid.scale / scale, np.float32))
    whole = replace(grid, scale=scale, zero_point=grid.zero_point.reshape(-1)[0], axis=None)
    name = quantize.inputs[0].name if quantize.inputs[0] is not None else quantize.name
    parameters = (
        work.editor.weight(f"{name}_scale", whole.scale),
        work.editor.weight(f"{name}_zero_point", np.asarray(whole.zero_point)),
    )
    for node in (quantize, *dequantizers):
        set_operand(node, 1, parameters[0])
        set_operand(node, 2, parameters[1])
        node.attributes.pop("axis", None)
    if activation is not None:
        redirect(activation.outputs[0], conv.outputs[0], [quantize])
        work.done(activation, "dropped: the quantizer behind it saturates at the same values")
    work.editor.rename(conv.outputs[0], "scaled")
    detail = f"scales of {grid.scale.size} channels moved into the weights of {conv.name}"
    work.done(quantize, f"{detail} and {', '.join(n.name or '' for n in depthwise)}; one scale for the tensor")


def _scale_bias(work: Work, conv: ir.Node, factor: Array) -> None:
    bias = dequantized_weight(operand(conv, 2))
    if bias is not None:
        value = conv.inputs[2]
        assert value is not None
        scaled = np.asarray(bias.reshape(-1) * factor, np.float32)
        conv.replace_input_with(2, work.editor.weight(f"{value.name}_scaled", scaled))
