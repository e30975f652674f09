"""Graph forms of a matrix that is quantized block-wise: onnxruntime's MatMulNBits, or standard DequantizeLinear.

`MatMulNBits` takes the matrix as (N, blocks, bytes) and `GatherBlockQuantized` the same bytes as (N, blocks * bytes),
so a table that is looked up and multiplied with is stored once. In the standard form a MatMul reads integers (K, N)
through DequantizeLinear; onnxruntime makes MatMulNBits of the two. A table stays (N, K) there, since its rows are
gathered as integers; the transposed integers that the MatMul needs are made once, when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.blockwise import Blocks, pack
from onnxcomp.edit import Editor, become
from onnxcomp.target import Array

DOMAIN = "com.microsoft"


def to_matmul_nbits(
    editor: Editor,
    blocks: Blocks,
    name: str,
    products: Sequence[ir.Node],
    lookups: Sequence[ir.Node],
    accuracy_level: int,
) -> None:
    """Turns nodes that read one matrix into MatMulNBits and GatherBlockQuantized.

    Args:
        editor: Of the graph that owns the matrix.
        blocks: The matrix.
        name: Its name.
        products: MatMul and Gemm nodes; a Gemm's bias, if any, is a vector (N,).
        lookups: Gather nodes along axis 0 of the matrix (N, K).
        accuracy_level: Attribute of MatMulNBits: 0 computes in the type of the activation, 4 rounds it to 8 bits.
    """
    count = blocks.scale.shape[1]
    codes, scale = editor.weight(f"{name}_q{blocks.bits}", blocks.codes), editor.weight(f"{name}_scale", blocks.scale)
    zero = None
    if blocks.zero_point is not None:
        zero = editor.weight(f"{name}_zero_point", pack(blocks.zero_point, blocks.bits))
    editor.model.opset_imports.setdefault(DOMAIN, 1)
    shared: dict[str, int] = {"bits": blocks.bits, "block_size": blocks.block_size}
    for node in products:
        inputs = [node.inputs[0], codes, scale, zero, None, node.inputs[2] if len(node.inputs) > 2 else None]
        sizes = {"K": blocks.columns, "N": len(blocks.codes), "accuracy_level": accuracy_level}
        become(node, "MatMulNBits", inputs, shared | sizes, DOMAIN)
    if not lookups:
        return
    rows = editor.weight(f"{name}_rows", np.array([len(blocks.codes), -1]))
    table = editor.before(_first(editor, lookups), "Reshape", [codes, rows], name=f"{name}_table")
    _note(table, codes.dtype, (len(blocks.codes), blocks.codes[0].size))
    for node in lookups:
        inputs = [table, node.inputs[1], scale, zero]
        attributes = shared | {"gather_axis": 0, "quantize_axis": 1}
        if blocks.columns == count * blocks.block_size:
            become(node, "GatherBlockQuantized", inputs, attributes, DOMAIN)
            continue
        branch = _beside(editor, node)
        padded = branch.before(node, "GatherBlockQuantized", inputs, name=f"{node.name}_padded", attributes=attributes)
        producer = padded.producer()
        assert producer is not None
        producer.domain = DOMAIN
        _note(padded, scale.dtype)
        ends = [branch.weight(f"{node.name}_{k}", np.array([v])) for k, v in (("from", 0), ("to", blocks.columns))]
        become(node, "Slice", [padded, *ends, branch.weight(f"{node.name}_axis", np.array([-1]))])


def to_dequantize(
    editor: Editor, blocks: Blocks, name: str, products: Sequence[ir.Node], lookups: Sequence[ir.Node]
) -> None:
    """Makes nodes that read one matrix read its integers through DequantizeLinear (opset 21).

    Args:
        editor: Of the graph that owns the matrix.
        blocks: The matrix; of 8 bits if there are lookups, for Gather takes nothing smaller.
        name: Its name.
        products: MatMul and Gemm nodes.
        lookups: Gather nodes along axis 0 of the matrix (N, K).
    """
    turned = not lookups
    attributes = {"block_size": blocks.block_size}
    stored = _stored(editor, blocks, name, turned=turned)
    if products:
        first = _first(editor, products)
        parts = stored
        if not turned:
            parts = [_transpose(editor, first, value) for value in stored]
        whole = editor.before(first, "DequantizeLinear", parts, name=f"{name}_dq", attributes=attributes | {"axis": 0})
        _note(whole, stored[1].dtype, (blocks.columns, len(blocks.codes)))
        for node in products:
            node.replace_input_with(1, whole)
            node.attributes.pop("transB", None)
    for node in lookups:
        branch = _beside(editor, node)
        rows = [
            branch.before(node, "Gather", [value, node.inputs[1]], name=f"{value.name}_rows", attributes={"axis": 0})
            for value in stored
        ]
        for row, value in zip(rows, stored, strict=True):
            _note(row, value.dtype)
        become(node, "DequantizeLinear", rows, attributes | {"axis": -1})


def _stored(editor: Editor, blocks: Blocks, name: str, *, turned: bool) -> list[ir.Value]:
    """Integers, scale and zero point as initializers; the reduction axis comes first if they are `turned`."""
    integers, scale, zero = blocks.integers(), blocks.scale, blocks.zero_point
    if turned:
        integers, scale, zero = integers.T, scale.T, None if zero is None else zero.T
    signed = zero is None
    if signed:  # signed integers have their zero in the middle, and need none stored
        integers = integers ^ np.uint8(1 << (blocks.bits - 1))
    values = [
        _integers(editor, f"{name}_q{blocks.bits}", integers, blocks.bits, signed=signed),
        editor.weight(f"{name}_scale", np.ascontiguousarray(scale)),
    ]
    if zero is not None:
        values.append(_integers(editor, f"{name}_zero_point", zero, blocks.bits, signed=False))
    return values


def _integers(editor: Editor, name: str, array: Array, bits: int, *, signed: bool) -> ir.Value:
    """Registers integers of 4 or 8 bits; `array` holds the bits of one in each uint8."""
    if bits == 8:
        return editor.weight(name, np.ascontiguousarray(array).view(np.int8 if signed else np.uint8))
    dtype = ir.DataType.INT4 if signed else ir.DataType.UINT4
    packed = pack(array.reshape(-1), bits)
    value = editor.weight(name, packed)
    value.const_value = ir.PackedTensor(packed, dtype, shape=ir.Shape(array.shape), name=value.name)
    value.dtype, value.shape = dtype, ir.Shape(array.shape)
    return value


def _transpose(editor: Editor, anchor: ir.Node, value: ir.Value) -> ir.Value:
    turned = editor.before(anchor, "Transpose", [value], name=f"{value.name}_turned", attributes={"perm": [1, 0]})
    _note(turned, value.dtype, () if value.shape is None else tuple(value.shape)[::-1])
    return turned


def _note(value: ir.Value, dtype: ir.DataType | None, shape: Sequence[int | ir.SymbolicDim] = ()) -> None:
    """Notes type and shape of a new value as far as they are known."""
    if dtype is not None:
        value.dtype = dtype
    if shape:
        value.shape = ir.Shape(shape)


def _first(editor: Editor, nodes: Sequence[ir.Node]) -> ir.Node:
    """Node of the edited graph before which all of `nodes` can be served: the first of them, or what it stands in."""
    wanted = set(nodes)
    return next(node for node in editor.graph if not wanted.isdisjoint(_with_inner(node)))


def _with_inner(node: ir.Node) -> Iterator[ir.Node]:
    yield node
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield from attribute.as_graph().all_nodes()
        elif attribute.type == ir.AttributeType.GRAPHS:
            for graph in attribute.as_graphs():
                yield from graph.all_nodes()


def _beside(editor: Editor, node: ir.Node) -> Editor:
    """Editor of the graph that `node` stands in, which may be a branch of the one that owns the matrix."""
    if node.graph is editor.graph or not isinstance(node.graph, ir.Graph):
        return editor
    return Editor(editor.model, node.graph)
