"""Writes the bias behind a matrix product as the vector that it is."""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxcomp.edit import Editor, constant
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select


def biases_to_vectors(model: ir.Model, where: Select) -> list[Edit]:
    """A constant of shape `(1, channels)` that is added to a product becomes `(channels,)`.

    Some exporters, such as that of scikit-learn, write the former; integer kernels are found for the latter only.
    """
    editor = Editor(model)
    edits = []
    for node in list(model.graph):
        if node.op_type != "Add" or node.domain not in ("", "ai.onnx") or not where(node):
            continue
        for index, (bias, other) in enumerate((tuple(node.inputs), tuple(node.inputs[::-1]))):
            rank = _rank_of_row(bias)
            if bias is not None and rank and _rank_behind_product(other) >= rank:
                array = constant(bias)
                assert array is not None
                node.replace_input_with(index, editor.weight(f"{bias.name}_vector", array.reshape(-1)))
                edits.append(applied(node, "bias written as a vector"))
    return edits


def _rank_of_row(value: ir.Value | None) -> int:
    """Rank of a constant all of whose sizes but the last are 1; 0 for a vector, a scalar, and any other value."""
    if value is None or (value.is_graph_input() and value.is_initializer()):
        return 0
    tensor = ir.convenience.get_const_tensor(value)
    shape = () if tensor is None else tensor.shape.numpy()
    return len(shape) if len(shape) > 1 and math.prod(shape[:-1]) == 1 else 0


def _rank_behind_product(value: ir.Value | None) -> int:
    """Rank of a value if a MatMul computes it and it is known, else 0."""
    producer = None if value is None else value.producer()
    if value is None or producer is None or producer.op_type != "MatMul" or value.shape is None:
        return 0
    return len(value.shape)
