"""Says of every quantized linear op that still has no integer kernel what is missing."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.model import all_nodes
from onnxcomp.passes._legalize.graph import (
    LINEAR,
    STANDARD,
    Work,
    dequantized,
    is_op,
    operand,
    producer,
    stored,
    weight_of,
)

_SEVEN_BITS = 64  # 255 * (64 + 64) still fits 16 bits


def refuse_rest(work: Work) -> None:
    """Reports what stays in float or slow, once an op."""
    known = {name for name, _ in work.refusals}
    for node in all_nodes(work.model):
        if not work.where(node) or node.domain not in STANDARD or node.name in known:
            continue
        if node.graph is not work.model.graph:
            if is_op(node, "QuantizeLinear"):
                work.refuse(node, "it stands in a subgraph or function; inline that first")
        elif (reason := _obstacle(node) or _saturation(work, node)) is not None:
            work.refuse(node, reason)


def _obstacle(node: ir.Node) -> str | None:
    if node.op_type == "ConvInteger":
        return "it quantizes its input anew in every run, which is slower than float; quantize the float model instead"
    weight = weight_of(node) if is_op(node, *LINEAR) else None
    if weight is None or not _is_activation_quantized(node):
        return None
    if dequantized(node.inputs[0]) is None:
        return _activation(node)
    return _weight(node, weight) or _gemm(node)


def _is_activation_quantized(node: ir.Node) -> bool:
    return producer(node.inputs[0], "DequantizeLinear") is not None


def _activation(node: ir.Node) -> str:
    dequantize = producer(node.inputs[0], "DequantizeLinear")
    assert dequantize is not None
    scale = constant(operand(dequantize, 1))
    if scale is None:
        return "the scale of its activation is computed when the model runs; integer kernels need a constant"
    if scale.dtype != np.float32:
        return f"the scale of its activation is {scale.dtype}; convert the model to float32 first"
    return "its activation is not quantized to 8 bits per tensor"


def _weight(node: ir.Node, weight: ir.Node) -> str | None:
    integers, scale, zero_point = stored(weight.inputs[0]), constant(operand(weight, 1)), constant(operand(weight, 2))
    if integers is None or scale is None or integers.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        return "its weight is not quantized to 8 bits"
    if scale.size == 1:
        return None
    rank = len(integers.shape)
    outputs = {"Conv": 0, "Gemm": 0 if attribute(node, "transB", 0) else rank - 1}
    axis = int(attribute(weight, "axis", 1)) % rank
    if scale.ndim != 1 or axis != outputs.get(node.op_type, rank - 1):
        return f"the scale of its weight varies along axis {axis} and not along the output channels"
    if zero_point is not None and len(np.unique(zero_point)) > 1:
        return "the zero points of its weight differ between channels"
    return None


def _saturation(work: Work, node: ir.Node) -> str | None:
    """Whether sums of two products overflow 16 bits on a CPU that keeps them there."""
    weight = weight_of(node) if work.capabilities.reduce_range else None
    if weight is None or not _is_activation_quantized(node):
        return None
    integers = constant(weight.inputs[0])
    if integers is None or integers.dtype != np.int8 or np.abs(integers.astype(np.int16)).max(initial=0) <= _SEVEN_BITS:
        return None
    return (
        "its weight has 8 bits, whose products saturate on this CPU, which has no 8-bit dot product: outputs may be "
        "wrong; have the other tool quantize weights to 7 bits (reduce_range), or quantize the float model here"
    )


def _gemm(node: ir.Node) -> str | None:
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)) != (1.0, 1.0):
        return "alpha or beta is not 1; fold it into weight and bias first"
    return None
