"""Turns a float16 model whose quantization is float16 as well to float32, which integer kernels are fused from."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, bypass, replace_output
from onnxcomp.model import all_nodes, infer_shapes
from onnxcomp.passes._legalize.graph import STANDARD, Work, is_op, operand, stored
from onnxcomp.skeleton import release

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_TYPES = frozenset({"dtype", "output_datatype", "output_dtype", "to"})
"""Attributes that name the type of an output."""


def whole_floats(work: Work) -> None:
    """Computes everything in float32 if scales are float16; inputs and outputs of the model stay what they are.

    Integers may then differ where float16 rounded a value to the other side of a step, so that it is not exact.
    """
    model = work.model
    scaled = [n for n in model.graph if is_op(n, "QuantizeLinear", "DequantizeLinear") and _has_half_scale(n)]
    if not scaled or work.exact:
        return
    if reason := _obstacle(work):
        for node in scaled:
            work.refuse(node, f"its scale is float16, and the model cannot be made float32: {reason}")
        return
    infer_shapes(model)
    tensors = [v for v in _values(model) if v.dtype == HALF]
    inputs = [v for v in model.graph.inputs if v.dtype == HALF]
    outputs = [i for i, v in enumerate(model.graph.outputs) if v.dtype == HALF]
    for node in all_nodes(model):
        for name, given in list(node.attributes.items()):
            if given.type == ir.AttributeType.TENSOR and given.as_tensor().dtype == HALF:
                node.attributes[name] = ir.AttrTensor(name, _whole(given.as_tensor()))
            elif name in _TYPES and given.type == ir.AttributeType.INT and given.value == HALF:
                node.attributes[name] = ir.AttrInt64(name, FLOAT)
            elif name == "precision" and given.value == HALF:
                del node.attributes[name]
    for value in tensors:
        if value.const_value is not None:
            value.const_value = _whole(value.const_value)
        value.type = ir.TensorType(FLOAT)
    for node in list(all_nodes(model)):
        if is_op(node, "Cast") and _is_idle(node):
            bypass(node)
    editor = Editor(model)
    for value in inputs:
        value.type = ir.TensorType(HALF)
        readers = list(value.uses())
        cast = editor.after(value, "Cast", [value], name=f"{value.name}_float", attributes={"to": FLOAT}, like=value)
        cast.dtype = FLOAT
        for node, index in readers:
            node.replace_input_with(index, cast)
    for value in dict.fromkeys(model.graph.outputs[i] for i in outputs):
        cast = editor.after(value, "Cast", [value], name=f"{value.name}_half", attributes={"to": HALF}, like=value)
        cast.dtype = HALF
        replace_output(value, cast)
    work.done(scaled[0], "computes in float32 like the rest of the model, which was float16")


def _has_half_scale(node: ir.Node) -> bool:
    tensor = stored(operand(node, 1))
    return tensor is not None and tensor.dtype == HALF


def _obstacle(work: Work) -> str:
    """Why a model cannot be made float32; empty if it can."""
    model = work.model
    if not all(work.where(node) for node in model.graph):
        return "not all of its nodes are selected"
    if model.functions:
        return "it has functions; inline them first"
    for node in all_nodes(model):
        if node.domain not in (*STANDARD, "com.microsoft"):
            return f"nobody knows what {node.domain}::{node.op_type} computes in"
        if any(a.is_ref() for a in node.attributes.values()):
            return f"{node.op_type} node {node.name!r} has a reference for an attribute"
    for value in _values(model):
        if value.type is not None and not isinstance(value.type, ir.TensorType) and value.dtype == HALF:
            return f"{value.name!r} is no tensor"
    if any(v.is_initializer() and v.dtype == HALF for v in model.graph.inputs):
        return "an input has a default value"
    if any(v.dtype == HALF and v.producer() is None for v in model.graph.outputs):
        return "an output is an input or a weight"
    return ""


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
        for node in graph:
            yield from node.outputs


def _whole(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor in float32, computed when it is read."""

    def read() -> ir.TensorProtocol:
        array = tensor.numpy().astype(np.float32)
        if isinstance(tensor, ir.ExternalTensor):
            release(tensor)
        return ir.tensor(array, name=tensor.name)

    return ir.LazyTensor(read, FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _is_idle(cast: ir.Node) -> bool:
    """Whether a Cast reads float32 and writes float32, and may go."""
    source, output = cast.inputs[0], cast.outputs[0]
    if source is None or source.dtype != FLOAT or cast.attributes["to"].value != FLOAT:
        return False
    producer = source.producer()
    here = producer is not None and producer.graph is cast.graph and not source.is_graph_output()
    return here or not output.is_graph_output()
