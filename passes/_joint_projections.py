"""Splits the joint projection of queries, keys and values of a vision transformer into one product for each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, sole_reader, users
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class _Joint:
    """A product whose output is reshaped to `(..., parts, heads, size)`, transposed, and taken apart along `parts`.

    Attributes:
        product: The MatMul; its weight is `(inputs, parts * heads * size)`.
        reshape: The Reshape, at which all that is needed has been computed.
        matrix: The weight.
        vector: The bias.
        sizes: What Reshape gives, `parts` included: numbers, and vectors of length 1 that the graph computes.
        order: What Transpose does, as it is left without `parts`.
        taken: Values that hold one part each, and which.
    """

    product: ir.Node
    reshape: ir.Node
    matrix: Array
    vector: Array | None
    sizes: tuple[int | ir.Value, ...]
    order: tuple[int, ...]
    taken: tuple[tuple[ir.Value, int], ...]

    @property
    def axis(self) -> int:
        """Of `parts` in the sizes."""
        return len(self.sizes) - 3


def split_joint_projections(model: ir.Model, where: Select) -> list[Edit]:
    """Rewrites every such product of the main graph.

    Taken apart behind the product, queries, keys and values are copied three times; one product for each costs no more
    than the joint one and leaves nothing to take apart. Each can be quantized by itself as well.
    """
    editor = Editor(model)
    return [
        _split(editor, joint)
        for node in list(model.graph)
        if node.op_type == "MatMul" and node.domain == "" and where(node) and (joint := _find(node)) is not None
    ]


def _find(product: ir.Node) -> _Joint | None:
    columns = _columns(product.inputs[1])
    last, bias, vector = product, _only_reader(product, "Add"), None
    if bias is not None:
        vector = constant(next((v for v in bias.inputs if v is not product.outputs[0]), None))
        last = bias
    reshape = _only_reader(last, "Reshape")
    transpose = None if reshape is None else _only_reader(reshape, "Transpose")
    if reshape is None or transpose is None or columns is None:
        return None
    if bias is not None and (vector is None or vector.ndim != 1 or len(vector) != columns):
        return None
    sizes, order = _sizes(reshape.inputs[1]), tuple(attribute(transpose, "perm", ()))
    if (
        sizes is None
        or len(sizes) < 4
        or len(order) != len(sizes)
        or (attribute(reshape, "allowzero", 0) and 0 in sizes)
    ):
        return None
    axis = len(sizes) - 3
    known = [size for size in sizes[axis:] if isinstance(size, int)]
    if order[0] != axis or len(known) < 3 or min(known) < 2 or math.prod(known) != columns:
        return None
    taken = _taken(transpose.outputs[0], known[0])
    if not taken:
        return None
    matrix = constant(product.inputs[1])  # not read before all else is right: it may be large
    if matrix is None:
        return None
    return _Joint(
        product=product,
        reshape=reshape,
        matrix=matrix,
        vector=vector,
        sizes=sizes,
        order=tuple(a - (a > axis) for a in order[1:]),
        taken=taken,
    )


def _columns(value: ir.Value | None) -> int | None:
    """Columns of a constant matrix, which is not read from disk; None if it is no such thing."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None or len(tensor.shape) != 2 else int(tensor.shape.numpy()[1])


def _sizes(shape: ir.Value | None) -> tuple[int | ir.Value, ...] | None:
    """The sizes in a shape that is constant, or put together of constants and single computed sizes."""
    array = constant(shape)
    if array is not None:
        return tuple(int(size) for size in array)
    concat = None if shape is None else shape.producer()
    if concat is None or concat.op_type != "Concat" or concat.domain != "":
        return None
    found: list[int | ir.Value] = []
    for part in concat.inputs:
        array = constant(part)
        if array is not None:
            found += [int(size) for size in array]
        elif part is not None and part.shape is not None and part.shape == (1,):
            found.append(part)
        else:
            return None
    return tuple(found)


def _only_reader(node: ir.Node, op_type: str) -> ir.Node | None:
    return _only_reader_of(node.outputs[0], op_type)


def _only_reader_of(output: ir.Value, op_type: str) -> ir.Node | None:
    reader = sole_reader(output)
    if reader is None or reader.op_type != op_type or reader.domain != "":
        return None
    return reader if output in reader.inputs[: 2 if op_type == "Add" else 1] else None


def _taken(value: ir.Value, parts: int) -> tuple[tuple[ir.Value, int], ...] | None:
    """The values that each hold one part of the first axis; None if anything else is done with the value."""
    if value.is_graph_output():
        return None
    found: list[tuple[ir.Value, int]] = []
    for node in users(value):
        index = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if node.op_type == "Gather" and node.domain == "" and attribute(node, "axis", 0) == 0:
            if index is None or index.ndim != 0 or not -parts <= int(index) < parts:
                return None
            found.append((node.outputs[0], int(index) % parts))
        elif node.op_type == "Split" and node.domain == "" and attribute(node, "axis", 0) == 0:
            squeezes = [_only_reader_of(output, "Squeeze") for output in node.outputs]
            if len(squeezes) != parts or any(s is None or not _squeezes_first(s) for s in squeezes):
                return None
            found += [(s.outputs[0], part) for part, s in enumerate(squeezes) if s is not None]
        else:
            return None
    return None if any(value.is_graph_output() for value, _ in found) else tuple(found)


def _squeezes_first(node: ir.Node) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(attribute(node, "axes", ()))
    return axes is not None and axes.tolist() == [0]


def _split(editor: Editor, joint: _Joint) -> Edit:
    product = joint.product
    name = product.name or "projection"
    heads, size = joint.sizes[joint.axis + 1 :]
    assert isinstance(heads, int)
    assert isinstance(size, int)
    width = heads * size
    anchor = joint.reshape
    shape = _shape(editor, anchor, f"{name}_heads", joint.sizes[: joint.axis] + joint.sizes[joint.axis + 1 :])
    made: dict[int, ir.Value] = {}
    for value, part in joint.taken:
        if part not in made:
            cut = slice(part * width, (part + 1) * width)
            weight = editor.weight(f"{name}_weight_{part}", np.ascontiguousarray(joint.matrix[:, cut]))
            output = editor.before(anchor, "MatMul", [product.inputs[0], weight], name=f"{name}_{part}")
            _typed(output, product.outputs[0], width)
            if joint.vector is not None:
                bias = editor.weight(f"{name}_bias_{part}", joint.vector[cut])
                output = editor.before(anchor, "Add", [output, bias], name=f"{name}_add_{part}", like=output)
            output = editor.before(anchor, "Reshape", [output, shape], name=f"{name}_reshape_{part}")
            perm = {"perm": list(joint.order)}
            made[part] = editor.before(
                anchor, "Transpose", [output], name=f"{name}_order_{part}", attributes=perm, like=value
            )
        ir.convenience.replace_all_uses_with(value, made[part])
    return applied(product, f"joint projection split into {len(made)} products")


def _shape(editor: Editor, anchor: ir.Node, name: str, sizes: Sequence[int | ir.Value]) -> ir.Value:
    if all(isinstance(size, int) for size in sizes):
        return editor.weight(name, np.array(sizes, np.int64))
    parts = [
        editor.weight(f"{name}_{i}", np.array([size], np.int64)) if isinstance(size, int) else size
        for i, size in enumerate(sizes)
    ]
    shape = editor.before(anchor, "Concat", parts, name=name, attributes={"axis": 0}, dtype=ir.DataType.INT64)
    shape.shape = ir.Shape([len(sizes)])
    return shape


def _typed(value: ir.Value, like: ir.Value, width: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape[:-1], width])
