"""Why onnxruntime executes a quantized node in float, from the neighbourhood of the node in the model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users

COMPUTE = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
"""Op types whose execution is audited, besides those that are integer by name."""

_MOVING = frozenset({
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Identity", "MaxPool", "Expand", "Gather",
    "DepthToSpace", "GatherElements", "ReduceMax", "Tile",
})  # fmt: skip
_MOVED_THROUGH = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity"})
_EIGHT_BIT = frozenset({ir.DataType.UINT8, ir.DataType.INT8})


def source(value: ir.Value | None, op_type: str | None) -> ir.Value | None:
    """Follows ops that only move values upstream from `value`.

    Args:
        value: Where to start.
        op_type: Op type whose output is looked for; None goes on through DequantizeLinear to a weight.

    Returns:
        The value found, or None.
    """
    for _ in range(16):
        if value is None:
            return None
        producer = value.producer()
        if producer is None:
            return value if op_type is None and value.is_initializer() else None
        if producer.op_type == op_type:
            return value
        if producer.op_type not in _MOVING and not (op_type is None and producer.op_type == "DequantizeLinear"):
            return None
        value = producer.inputs[0]
    return None


def why_float(node: ir.Node, executed_as: str) -> str:
    """The most likely reason, with what to do about it."""
    return next(_reasons(node, executed_as))


def _reasons(node: ir.Node, executed_as: str) -> Iterator[str]:
    if node.op_type == "ConvTranspose":
        yield "onnxruntime has no integer ConvTranspose; leave it in float"
    yield from _types(node)
    yield from _between(node)
    if node.op_type == "Gemm" and (attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0):
        yield "alpha or beta is not 1; fold it into weight and bias"
    yield from _output(node)
    yield from _bias(node, executed_as)
    if ir.DataType.INT8 in {_integer_type(v) for v in node.inputs[:1]}:
        yield (
            "its activations are int8, and onnxruntime turns only some Q/DQ pairs to uint8, so that input and output "
            "come to differ; use uint8"
        )
    yield (
        "onnxruntime left it in float for a reason that is not known here; compare the Q/DQ pairs around it with the "
        "placements that the target names"
    )


def _types(node: ir.Node) -> Iterator[str]:
    for value, what in zip(node.inputs[:2], ("activation", "weight"), strict=False):
        dequantize = _dequantizer(value)
        if dequantize is None:
            continue
        dtype = _integer_type(value)
        if dtype is not None and dtype not in _EIGHT_BIT:
            yield f"its {what} is quantized to {dtype.name.lower()}; integer kernels take 8 bits: use uint8 or int8"
        axis, scale = attribute(dequantize, "axis", 1), constant(dequantize.inputs[1])
        channels = scale is not None and scale.ndim == 1 and scale.size > 1
        if channels and what == "weight" and node.op_type == "Conv" and axis != 0:
            yield f"its weight is quantized along axis {axis}; a Conv needs one scale an output channel, axis 0"
        if channels and what == "activation":
            yield "its activation is quantized per channel; integer kernels need one scale for the tensor"


def _between(node: ir.Node) -> Iterator[str]:
    """Moved by onnxruntime, a DequantizeLinear goes downstream through some ops only."""
    producer = None if node.inputs[0] is None else node.inputs[0].producer()
    while producer is not None and producer.op_type in _MOVING:
        if producer.op_type not in _MOVED_THROUGH:
            what = f"{producer.op_type} {producer.name!r}"
            yield f"{what} stands between DequantizeLinear and it; put a Q/DQ pair of the same parameters behind that"
        producer = None if producer.inputs[0] is None else producer.inputs[0].producer()


def _output(node: ir.Node) -> Iterator[str]:
    output = node.outputs[0]
    bias = _bias_add(node)
    if bias is not None:
        output = bias.outputs[0]
    readers = users(output)
    quantizers = [u for u in readers if u.op_type == "QuantizeLinear"]
    if output.is_graph_output() and (quantizers or node.op_type == "Conv"):
        yield f"its float output {output.name!r} is a graph output; quantize it and put out the DequantizeLinear"
    if quantizers and len(readers) > 1:
        others = [u.name for u in readers if u is not quantizers[0]]
        yield f"its float output is read by {others} besides a QuantizeLinear; let them read the DequantizeLinear"
    if quantizers:
        return
    follower = readers[0] if len(readers) == 1 else None
    quantizer = None if follower is None else _quantizer(follower)
    if follower is not None and quantizer is not None and follower.op_type in {"Relu", "Clip"}:
        yield from _fused_activation(follower, quantizer)
    elif node.op_type == "Conv":
        if follower is not None and follower.op_type == "BatchNormalization":
            yield f"BatchNormalization {follower.name!r} follows it; fold that into the weight first"
        if follower is not None and quantizer is not None:
            between = f"{follower.op_type} {follower.name!r}"
            yield f"{between} stands between it and QuantizeLinear; put a Q/DQ pair directly behind it"
        yield "no QuantizeLinear follows its output; put a Q/DQ pair directly behind it"


def _fused_activation(follower: ir.Node, quantizer: ir.Node) -> Iterator[str]:
    """A Relu or Clip is dropped if the QuantizeLinear after it saturates at the same bounds, else fused in float."""
    what = f"{follower.op_type} {follower.name!r}"
    scale = constant(quantizer.inputs[1])
    zero_point = constant(quantizer.inputs[2]) if len(quantizer.inputs) > 2 else None
    range_ = np.iinfo(np.uint8 if zero_point is None else zero_point.dtype)
    if zero_point is not None and zero_point.size == 1 and int(zero_point.item()) != range_.min:
        yield (
            f"{what} behind it is fused in float, as the QuantizeLinear after that has zero point "
            f"{int(zero_point.item())}; make it {range_.min}, or put a Q/DQ pair before {follower.op_type}"
        )
    top = constant(follower.inputs[2]) if follower.op_type == "Clip" and len(follower.inputs) > 2 else None
    if top is not None and scale is not None and float(scale.max()) * (range_.max - range_.min) > float(top.max()):
        yield (
            f"{what} behind it cuts off more than the QuantizeLinear after that does; lower the scale there to at most "
            f"{float(top.max()) / (range_.max - range_.min):.6g}, or put a Q/DQ pair before the Clip"
        )


def _bias(node: ir.Node, executed_as: str) -> Iterator[str]:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    what = "its bias"
    add = _bias_add(node)
    if add is not None:
        bias = next((v for v in add.inputs if v is not node.outputs[0]), None)
        what = f"the other input of Add {add.name!r}, which became the bias of {executed_as} before Q/DQ was looked at,"
    if bias is None:
        return
    dequantize = bias.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        if constant(bias) is not None:
            yield f"{what} is float; store it as int32 with a DequantizeLinear of scale s_x * s_w"
        else:
            yield f"{what} is not constant; put a Q/DQ pair, or an Add of an int32 bias, behind the {node.op_type}"
        return
    dtype = _integer_type(bias)
    if dtype not in {None, ir.DataType.INT32}:
        yield f"{what} is not int32; put a Q/DQ pair directly behind the {node.op_type}, or store it as int32"
    producers = [_dequantizer(v) for v in node.inputs[:2]]
    scales = [None if d is None else constant(d.inputs[1]) for d in (*producers, dequantize)]
    if all(s is not None for s in scales):
        x, w, b = (np.asarray(s, np.float64) for s in scales)
        if (x * w).size != b.size or not np.allclose(b, x * w, rtol=0.01):
            yield f"{what} has another scale than s_x * s_w; quantize it with that scale"


def _bias_add(node: ir.Node) -> ir.Node | None:
    """The Add behind a MatMul, which onnxruntime fuses to a Gemm."""
    readers = users(node.outputs[0])
    if node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type != "Add":
        return None
    return readers[0]


def _quantizer(node: ir.Node) -> ir.Node | None:
    return next((u for u in users(node.outputs[0]) if u.op_type == "QuantizeLinear"), None)


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    found = source(value, "DequantizeLinear")
    return None if found is None else found.producer()


def _integer_type(value: ir.Value | None) -> ir.DataType | None:
    """Type that `value` is dequantized from, also where shape inference did not get through."""
    dequantize = _dequantizer(value)
    if dequantize is None or dequantize.inputs[0] is None:
        return None
    zero_point = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    for given in (dequantize.inputs[0], zero_point):
        if given is not None and given.dtype is not None:
            return given.dtype
        if given is not None and given.const_value is not None:
            return given.const_value.dtype
    return None
