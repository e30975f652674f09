"""Finds the weights that can be packed, each with all products that read it, and says why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, in_main_graph
from onnxcomp.model import all_nodes
from onnxcomp.ops import DOMAIN
from onnxcomp.passes._nm_layers import form_of, is_table, read_layer, readers_of
from onnxcomp.passes._nm_weights import Layer, Reader
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select
from onnxcomp.skeleton import release
from onnxcomp.target import Array

_STANDARD = ("", "ai.onnx")
_ZEROS = {ir.DataType.INT8: 0, ir.DataType.UINT8: 128}
"""Integers that can be packed, with the zero point that they have to have."""
_MOVING = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def find_packable(model: ir.Model, where: Select) -> tuple[list[Layer], list[Edit]]:
    """Weights of products in the order in which they are first read, and refusals of the others.

    What they hold is not looked at.

    Args:
        model: The model.
        where: Nodes that may be touched; a weight is found only if it takes all nodes that multiply by it.
    """
    layers: dict[ir.Value, Layer] = {}
    edits: list[Edit] = []
    own = {node for key, function in model.functions.items() if key[0] == DOMAIN for node in function.all_nodes()}
    for node in all_nodes(model):
        if node in own:
            continue
        found = _read(model, node)
        if isinstance(found, str):
            edits += [refused(node, found)] if found and where(node) else []
            continue
        layer = layers.setdefault(found.value, found)
        layer.readers.append(Reader(node=node, cut=None))
        if form_of(layer) != form_of(found):
            layer.reason = "nodes read its weight along different axes, so no groups serve all of them"
    for layer in layers.values():
        layer.reason = layer.reason or _objection(layer, where)
        edits += [refused(node, layer.reason) for node in layer.nodes if layer.reason and where(node)]
    return [layer for layer in layers.values() if not layer.reason], edits


@contextmanager
def matrix(layer: Layer) -> Iterator[Array]:
    """The weight as it is stored but for its axes, `(K, N)`; in a file, only what is looked at is read.

    Integers are int8 whose zero point is 0.
    """
    tensor = tensor_of(layer)
    array = tensor.numpy()
    if tensor.dtype == ir.DataType.UINT8:
        array = (array ^ 128).view(np.int8)
    try:
        yield array.T if layer.outputs_first else array
    finally:
        del array
        if isinstance(tensor, ir.ExternalTensor):
            release(tensor)


def tensor_of(layer: Layer) -> ir.TensorProtocol:
    """The weight as it is stored, not read from disk."""
    tensor = ir.convenience.get_const_tensor(layer.value)
    assert tensor is not None
    return tensor


def alpha_of(layer: Layer) -> float:
    """What a Gemm multiplies the product by, the same for all readers."""
    return _alpha(layer.nodes[0])


def _alpha(node: ir.Node) -> float:
    return float(attribute(node, "alpha", 1.0)) if node.op_type == "Gemm" else 1.0


def _read(model: ir.Model, node: ir.Node) -> Layer | str:
    """The weight of a product, or why there is none of use; empty for a node that has no weight at all."""
    if (node.op_type, node.domain) == ("MatMulNBits", "com.microsoft"):
        return "its weight is packed in blocks already, zeros included"
    if node.domain not in _STANDARD:
        return ""
    if node.op_type == "Gather" and is_table(node):
        return "it looks up rows of an embedding, which cannot be found in packed form"
    if node.op_type == "Conv":
        return "no packed form of a convolution's weight is known"
    if node.op_type not in ("Gemm", "MatMul"):
        return ""
    if not in_main_graph(model, node):
        return "it stands in a subgraph or function; only weights of the main graph are packed"
    return read_layer(model, node)


def _objection(layer: Layer, where: Select) -> str:
    """Why a weight has to stay as it is, whatever it holds; empty if it need not."""
    if not np.prod(layer.shape):
        return "its weight is empty"
    for reader in readers_of(layer.value):
        other = f"{reader.op_type} {reader.name!r}"
        if reader not in layer.nodes:
            what = "looks up rows of its weight" if reader.op_type == "Gather" else "reads its weight, too,"
            return f"{other} {what} and needs it as it is"
        if not where(reader):
            return f"{other} reads its weight, too, and is not selected"
    if any(list(node.inputs).count(node.inputs[1]) > 1 for node in layer.nodes):
        return "its weight is another of its inputs as well"
    if layer.value.is_graph_output():
        return "its weight is an output of the model"
    if len({_alpha(node) for node in layer.nodes}) > 1:
        return "nodes scale its weight by different alpha"
    if layer.dequantize is None:
        return ""
    if any(_is_dequantized(node.inputs[0]) for node in layer.nodes):
        return "its input is quantized as well: with a packed weight it would no longer be computed in integers"
    return _grid_objection(layer, layer.dequantize)


def _grid_objection(layer: Layer, dequantize: ir.Node) -> str:
    """What keeps integers from being packed."""
    dtype = tensor_of(layer).dtype
    if dtype not in _ZEROS:
        return f"its weight is {dtype.name.lower()}; of integers, those of 8 bits are packed"
    scale = constant(dequantize.inputs[1])
    zero = constant(dequantize.inputs[2]) if len(dequantize.inputs) > 2 else None
    if scale is None or attribute(dequantize, "block_size", 0):
        return "its weight has a scale for every block; a packed one has one a column"
    axis = 0 if layer.outputs_first else 1
    if scale.size > 1 and int(attribute(dequantize, "axis", 1)) % 2 != axis:
        return "its weight has a scale for every input; a packed one has one for every output"
    if (np.asarray(0 if zero is None else zero, np.int16) != _ZEROS[dtype]).any():
        return "the zero point of its weight is not the middle of its integers"
    return ""


def _is_dequantized(value: ir.Value | None) -> bool:
    """Whether an activation comes from DequantizeLinear, moved at most."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type == "DequantizeLinear":
            return True
        if producer.op_type not in _MOVING:
            return False
        value = producer.inputs[0]
    return False
