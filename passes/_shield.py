"""Keeps onnxruntime from quantizing float weights by itself.

Between a DequantizeLinear with one scale and a QuantizeLinear, it takes a Conv, ConvTranspose or Gemm with float
weights for half quantized and rounds the weights to int8 with one scale for the tensor, which hurts a depthwise Conv
most. If the DequantizeLinear has a scale for each channel, all of them equal, it lets the op be.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, users
from onnxcomp.qdq import read_activation

_CHANNEL_AXIS = 1  # of the activation of all three


def shield_float_ops(model: ir.Model) -> int:
    """Gives every op that would be quantized a DequantizeLinear of its own, with a scale for each channel.

    Returns:
        The number of ops that were shielded.
    """
    editor = Editor(model)
    count = 0
    for node in list(model.graph):
        channels = _channels(node)
        tensor = read_activation(node.inputs[0]) if channels else None
        if tensor is None or tensor.grid.scale.ndim or not _leads_to_quantize(node):
            continue
        name = f"{tensor.value.name}_for_{node.name}"
        scale = editor.weight(f"{name}_scale", np.full(channels, tensor.grid.scale, np.float32))
        zero_point = editor.weight(f"{name}_zero_point", np.full(channels, tensor.grid.zero_point))
        inputs = [tensor.dequantize.inputs[0], scale, zero_point]
        own = editor.before(
            node, "DequantizeLinear", inputs, name=name, attributes={"axis": _CHANNEL_AXIS}, like=node.inputs[0]
        )
        node.replace_input_with(0, own)
        count += 1
    return count


def _channels(node: ir.Node) -> int:
    """Input channels of an op with constant float weights that may be quantized; 0 for any other op."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
        return 0
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or attribute(node, "transA", 0):
        return 0
    if node.op_type == "Conv":
        return int(weight.shape[1]) * int(attribute(node, "group", 1))
    return int(weight.shape[1 if attribute(node, "transB", 0) else 0])


def _leads_to_quantize(node: ir.Node) -> bool:
    """Whether a QuantizeLinear reads the output, with nothing but ReLU and Clip between, and nobody else does."""
    value = node.outputs[0]
    while len(readers := users(value)) == 1 and not value.is_graph_output():
        if readers[0].op_type == "QuantizeLinear":
            return True
        if readers[0].op_type not in ("Relu", "Clip"):
            return False
        value = readers[0].outputs[0]
    return False
