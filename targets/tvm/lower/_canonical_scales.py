"""Puts a constant factor a channel behind a product into its weight and bias, as the layer scale of transformers is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, sole_reader
from onnxcomp.target import Array
from onnxcomp.targets.tvm.nodes import packed


def fold(editor: Editor, node: ir.Node) -> ir.Value | None:
    """Folds `Mul(Add(MatMul(x, weight), bias), factor)` and shorter forms.

    Args:
        editor: Of the graph.
        node: The Mul.

    Returns:
        What holds the product now; None if it is not of this form.
    """
    if node.domain or node.op_type != "Mul":
        return None
    for index in (0, 1):
        value, given = node.inputs[index], node.inputs[1 - index]
        factor = constant(given) if given is not None and given.dtype == ir.DataType.FLOAT else None
        if value is None or factor is None or factor.ndim == 0 or factor.size != factor.shape[-1]:
            continue
        if sole_reader(value) is node and _fold_into(editor, value, factor.reshape(-1)):
            return value
    return None


def _fold_into(editor: Editor, value: ir.Value, factor: Array) -> bool:
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Add", "MatMul", "Gemm"):
        return False
    if node.op_type != "Add":
        return _scale_product(editor, node, factor)
    for index in (0, 1):
        product, bias = node.inputs[index], constant(node.inputs[1 - index])
        if product is None or bias is None or bias.size != factor.size or bias.shape[-1:] != factor.shape:
            continue
        if sole_reader(product) is not node:
            continue
        inner = product.producer()
        if inner is None or inner.op_type not in ("MatMul", "Gemm") or not _scale_product(editor, inner, factor):
            continue
        node.replace_input_with(1 - index, editor.weight(f"{node.name}_scaled", bias * factor))
        return True
    return False


def _scale_product(editor: Editor, node: ir.Node, factor: Array) -> bool:
    weight = node.inputs[1]
    tensor = None if weight is None else ir.convenience.get_const_tensor(weight)
    if weight is None or tensor is None or weight.dtype != ir.DataType.FLOAT:
        return False
    turned = node.op_type == "Gemm" and attribute(node, "transB", 0) == 1
    shape = weight.shape
    if shape is None or shape.rank() != 2 or shape[0 if turned else 1] != factor.size:
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        given = constant(bias)
        if given is None:
            return False
        node.replace_input_with(2, editor.weight(f"{node.name}_scaled", (given * factor).astype(np.float32)))

    def scaled() -> Array:
        return tensor.numpy() * (factor[:, None] if turned else factor)

    name = f"{weight.name}_scaled"
    node.replace_input_with(1, packed(editor, name, shape.numpy(), np.dtype(np.float32), scaled))
    return True
