"""Finds the weights that can be made sparse, each with all ops that multiply by it, and says why others cannot."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, in_main_graph, users
from onnxcomp.model import all_nodes
from onnxcomp.passes._gram import window
from onnxcomp.passes._nm_ends import ends
from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.passes._nm_weights import Layer, Reader
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select

_STANDARD = ("", "ai.onnx")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_INTEGERS = (ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT8, ir.DataType.UINT8,
             ir.DataType.INT16, ir.DataType.UINT16)  # fmt: skip


def find_layers(
    model: ir.Model, where: Select, pattern: Pattern, *, include_ends: bool
) -> tuple[list[Layer], list[Edit]]:
    """Weights that can be made sparse, in the order in which they are first read, and refusals of the others.

    Args:
        model: The model.
        where: Nodes that may be touched; a weight is found only if it takes all nodes that multiply by it.
        pattern: Of which groups are made.
        include_ends: Do not refuse first convolutions, last layers and tables that are looked up as well.
    """
    layers: dict[ir.Value, Layer] = {}
    edits: list[Edit] = []
    for node in all_nodes(model):
        if (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft") and where(node):
            edits.append(refused(node, "its weight is packed in blocks already; nm_mask goes before weight_only"))
        elif node.op_type == "Gather" and where(node) and is_table(node):
            edits.append(refused(node, "it looks up rows of an embedding, along which nothing is summed"))
        elif node.op_type in ("Conv", "Gemm", "MatMul") and node.domain in _STANDARD:
            found = read_layer(model, node)
            if isinstance(found, str):
                edits += [refused(node, found)] if where(node) else []
                continue
            layer = layers.setdefault(found.value, found)
            layer.readers += [Reader(node=node, cut=window(node, found.shape[2:]))]
            if form_of(layer) != form_of(found):
                layer.reason = "nodes read its weight along different axes, so no groups serve all of them"
    special = {} if include_ends else ends(model)
    for layer in layers.values():
        layer.reason = layer.reason or _objection(layer, where, pattern, special, include_ends=include_ends)
        if layer.reason:
            edits += [refused(node, layer.reason) for node in layer.nodes if where(node)]
    return [layer for layer in layers.values() if not layer.reason], edits


def form_of(layer: Layer) -> tuple[object, ...]:
    return layer.outputs_first, layer.groups, layer.dequantize


def read_layer(model: ir.Model, node: ir.Node) -> Layer | str:
    """The constant that an op multiplies by, or why there is none of use."""
    if not in_main_graph(model, node):
        return "it stands in a subgraph or function; only layers of the main graph are made sparse"
    if len(node.inputs) < 2 or node.inputs[0] is None or node.inputs[1] is None:
        return "an input is missing"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "Gemm with transA, whose inputs are columns"
    outputs_first = node.op_type == "Conv" or bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    value, dequantize = node.inputs[1], None
    producer = value.producer()
    if producer is not None and _is_transpose(producer) and node.op_type != "Conv" and producer.inputs[0] is not None:
        value, outputs_first = producer.inputs[0], not outputs_first
        producer = value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear" and producer.inputs[0] is not None:
        value, dequantize = producer.inputs[0], producer
        if any(v is not None and _tensor(v) is None for v in producer.inputs[1:]):
            return "the scale or zero point of its weight is no constant"
    tensor = _tensor(value)
    if tensor is None:
        if _tensor(node.inputs[0]) is not None:
            return "its weight is the first operand, which no kernel takes in N:M form"
        return "its second input is not a constant weight but another activation"
    if tensor.dtype not in (_FLOATS if dequantize is None else _INTEGERS):
        return f"its weight is {tensor.dtype.name.lower()}, not float32, float16 or an integer that is dequantized"
    shape = tuple(tensor.shape.numpy())
    if node.op_type != "Conv" and len(shape) != 2:
        return f"its weight has {len(shape)} dimensions; a matrix has 2"
    groups = int(attribute(node, "group", 1)) if node.op_type == "Conv" else 1
    return Layer(value=value, dequantize=dequantize, outputs_first=outputs_first, shape=shape, groups=groups)


def _objection(
    layer: Layer, where: Select, pattern: Pattern, special: dict[ir.Node, str], *, include_ends: bool
) -> str:
    """Why a weight has to stay as it is; empty if it need not."""
    if not np.prod(layer.shape):
        return "its weight is empty"
    if layer.nodes[0].op_type == "Conv":
        if layer.channels == 1:
            return "a depthwise convolution sums over the kernel only, so there are no channels to make groups of"
        if layer.channels % pattern.size:
            return f"{layer.channels} channels of a group do not divide into groups of {pattern.size}"
    for node, what in special.items():
        if node in layer.nodes:
            who = "it" if len(layer.readers) == 1 else f"{node.op_type} {node.name!r}, which reads its weight, too,"
            return f"{who} {what}; include_ends = true makes it sparse, too"
    for reader in readers_of(layer.value):
        other = f"{reader.op_type} {reader.name!r}"
        if reader.op_type == "Gather" and reader not in layer.nodes:
            if not include_ends:
                return f"{other} looks up rows of its weight; include_ends = true makes it sparse all the same"
        elif reader not in layer.nodes:
            return f"{other} reads its weight, too, and is not made sparse"
        elif not where(reader):
            return f"{other} reads its weight, too, and is not selected"
    if layer.value.is_graph_output():
        return "its weight is an output of the model"
    return ""


def readers_of(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a constant, itself or transposed or dequantized."""
    for node in users(value):
        hidden = node.op_type == "DequantizeLinear" or _is_transpose(node)
        if hidden and not node.outputs[0].is_graph_output():
            yield from readers_of(node.outputs[0])
        else:
            yield node


def is_table(node: ir.Node) -> bool:
    """Whether a Gather looks up rows of a float matrix."""
    tensor = None if node.inputs[0] is None else _tensor(node.inputs[0])
    return tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) == 2


def _is_transpose(node: ir.Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    if node.op_type != "Transpose" or node.domain not in _STANDARD or node.inputs[0] is None:
        return False
    shape = node.inputs[0].shape
    perm = attribute(node, "perm")
    return list(perm) == [1, 0] if perm is not None else shape is not None and len(shape) == 2


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant, not read from disk; an initializer that the caller may override is no constant."""
    if value.is_graph_input() and value.is_initializer():
        return None
    return ir.convenience.get_const_tensor(value)
