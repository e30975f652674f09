"""Products of activations that are quantized by their range at run time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, sole_reader, users
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.lower import _integer_reading as reading
from onnxcomp.targets.tvm.lower._integer_nodes import become, insert
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed


@dataclass(frozen=True, kw_only=True)
class _Product:
    """A MatMulInteger and what makes floats of its sums.

    Attributes:
        node: The MatMulInteger.
        last: Puts out the floats.
        weight: Integers of shape (K, N).
        scale: Of the weight, one number or one a column.
        bias: Added to the floats.
    """

    node: ir.Node
    last: ir.Node
    weight: ir.Value
    scale: Array
    bias: Array | None


def products(editor: Editor, node: ir.Node, machine: Machine) -> str | None:
    """Makes nodes of ours of a DynamicQuantizeLinear and all products that read it.

    Returns:
        Why not; None if it was done.
    """
    x, (codes, scale, _) = node.inputs[0], node.outputs
    found = [_product(reader, node) for reader in users(codes)]
    if x is None or x.shape is None or any(v.is_graph_output() for v in node.outputs):
        return "its codes are put out"
    known = [product for product in found if product is not None]
    if len(known) < len(found) or len(users(scale)) > len({p for v in known for p in _scalers(v, scale)}):
        return "something other than products with a constant matrix reads it"
    numbers, floats = ir.Shape([2]), ir.DataType.FLOAT
    own = insert(editor, node, node, "DynamicRange", [x], {}, dtype=floats, shape=numbers)
    quantized = insert(editor, node, node, "DynamicQuantize", [x, own], {}, dtype=ir.DataType.UINT8, shape=x.shape)
    for product in known:
        _replace(editor, product, quantized, own, machine)
    return None


def _replace(editor: Editor, product: _Product, codes: ir.Value, own: ir.Value, machine: Machine) -> None:
    weight, last, name = product.weight, product.last, str(product.node.name)
    integers = constant(weight)
    assert integers is not None
    k, n = integers.shape
    panels = Panels(machine=machine, n=n)

    def pack() -> Array:
        array = constant(weight)
        assert array is not None
        return panels.pack(np.pad(array, ((0, -k % 4), (0, 0))))

    totals = editor.weight(f"{name}_totals", panels.offset(integers.sum(axis=0, dtype=np.int64)))
    table = editor.weight(f"{name}_affine", panels.affine(product.scale, product.bias))
    offset = insert(
        editor, last, product.node, "DynamicOffset", [own, totals], {}, dtype=ir.DataType.INT32, shape=totals.shape
    )
    affine = insert(
        editor, last, product.node, "DynamicAffine", [own, table], {}, dtype=ir.DataType.FLOAT, shape=table.shape
    )
    matrix = packed(editor, f"{name}_weight", panels.shape(k), np.dtype(np.int8), pack)
    become(last, product.node, "QGemm", [codes, matrix, offset, affine], {"n": n, "dtype": "float32"})


def _product(node: ir.Node, quantizer: ir.Node) -> _Product | None:
    codes, scale, zero = quantizer.outputs
    given = [*node.inputs, None, None][:4]
    if node.domain or node.op_type != "MatMulInteger" or given[0] is not codes or given[2] is not zero:
        return None
    weight = given[1]
    integers, centre = constant(weight), constant(given[3])
    if weight is None or integers is None or integers.ndim != 2 or integers.dtype != np.int8:
        return None
    if given[3] is not None and (centre is None or centre.any()):
        return None
    cast = sole_reader(node.outputs[0])
    if cast is None or cast.op_type != "Cast" or attribute(cast, "to") != ir.DataType.FLOAT:
        return None
    times = sole_reader(cast.outputs[0])
    if times is None or times.op_type != "Mul" or (factor := _other(times, cast.outputs[0])) is None:
        return None
    n = integers.shape[1]
    own = _constant_part(factor, scale)
    if own is None or own.dtype != np.float32 or own.size not in (1, n):
        return None
    last, bias = times, None
    reader = sole_reader(times.outputs[0])
    if reader is not None and reader.op_type == "Add" and not reader.domain:
        other = _other(reader, times.outputs[0])
        bias = reading.float_bias(other, n)
        if bias is not None and other is not None and other.shape is not None and len(other.shape) <= 1:
            last = reader
        else:
            bias = None
    return _Product(node=node, last=last, weight=weight, scale=own.reshape(-1), bias=bias)


def _constant_part(factor: ir.Value, scale: ir.Value) -> Array | None:
    """What a product of the activation's scale and a constant has besides the former."""
    if factor is scale:
        return np.ones(1, np.float32)
    node = factor.producer()
    if node is None or node.domain or node.op_type != "Mul" or scale not in node.inputs:
        return None
    return constant(_other(node, scale))


def _scalers(product: _Product, scale: ir.Value) -> list[ir.Node]:
    """Nodes that read the activation's scale on behalf of a product."""
    return [reader for reader in users(scale) if _serves(reader, product)]


def _serves(reader: ir.Node, product: _Product) -> bool:
    times = sole_reader(sole_reader(product.node.outputs[0]).outputs[0])  # type: ignore[union-attr]
    return reader is times or (times is not None and any(v in times.inputs for v in reader.outputs))


def _other(node: ir.Node, value: ir.Value) -> ir.Value | None:
    first, second = node.inputs
    return second if first is value else first
