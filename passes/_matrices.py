"""Finds the constant matrices of a model, each with all nodes that multiply by it or look up its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from onnxcomp.edit import attribute, users
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select

_PRODUCTS = ("MatMul", "Gemm")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)

Embeddings = Literal["tied", "all"]


@dataclass(kw_only=True)
class Matrix:
    """A constant matrix.

    Attributes:
        value: Initializer or output of a Constant node.
        transposed: It is stored as (N, K), output channels first.
        products: MatMul and Gemm nodes that multiply by it.
        lookups: Gather nodes that take rows of it.
        reason: Why it cannot be stored in another form; empty if it can.
    """

    value: ir.Value
    transposed: bool
    products: list[ir.Node] = field(default_factory=list)
    lookups: list[ir.Node] = field(default_factory=list)
    reason: str = ""

    @property
    def nodes(self) -> list[ir.Node]:
        """Products and lookups."""
        return [*self.products, *self.lookups]

    @property
    def columns(self) -> int:
        """K, the length of what it is multiplied with."""
        tensor = _tensor(self.value)
        assert tensor is not None
        return int(tensor.shape.numpy()[1 if self.transposed else 0])

    @property
    def graph(self) -> ir.Graph:
        """The graph that owns it."""
        producer = self.value.producer()
        graph = self.value.graph if producer is None else producer.graph
        assert isinstance(graph, ir.Graph)
        return graph


def find_matrices(
    model: ir.Model, where: Select, *, min_weights: int, embeddings: Embeddings
) -> tuple[list[Matrix], list[Edit]]:
    """Constant matrices that selected nodes read, in graph order; weights on disk are not touched.

    Args:
        model: The model.
        where: Takes nodes.
        min_weights: Smaller matrices have a reason against them.
        embeddings: Whether a table that is only looked up counts (`all`), or has a reason against it (`tied`).

    Returns:
        The matrices, and refusals for products that have none.
    """
    found: dict[ir.Value, Matrix] = {}
    refusals: list[Edit] = []
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx") or not where(node):
            continue
        if node.op_type in _PRODUCTS:
            weight = _weight(node)
            if isinstance(weight, str):
                refusals.append(refused(node, weight))
                continue
            value, transposed = weight
            matrix = found.setdefault(value, Matrix(value=value, transposed=transposed))
            if matrix.transposed != transposed:
                matrix.reason = "nodes read its weight along different axes, so no blocks serve all of them"
            matrix.products.append(node)
        elif node.op_type == "Gather" and (table := _table(node, min_weights)) is not None:
            found.setdefault(table, Matrix(value=table, transposed=True)).lookups.append(node)
    for matrix in found.values():
        matrix.reason = matrix.reason or _objection(matrix, min_weights, embeddings)
    refusals += [
        refused(node, "it stands in a function; the pass cleanup writes functions out")
        for function in model.functions.values()
        for node in function.all_nodes()
        if node.op_type in _PRODUCTS and node.domain in ("", "ai.onnx") and where(node)
    ]
    return list(found.values()), refusals


def _weight(node: ir.Node) -> tuple[ir.Value, bool] | str:
    """The constant that a product multiplies by and whether it is (N, K), or why there is none of use."""
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        return "an input is missing"
    value, transposed = _behind_transpose(weight)
    tensor = _tensor(value)
    if tensor is None:
        if _producer_type(weight) == "DequantizeLinear":
            return "it is quantized already"
        if _tensor(_behind_transpose(data)[0]) is not None:
            return "its weight is the first operand; kernels take it as the second"
        return "its second input is not a constant weight but another activation"
    if tensor.dtype not in _FLOATS:
        return f"its weight is {tensor.dtype.name.lower()}, not float32 or float16"
    if len(tensor.shape) != 2:
        return f"its weight has {len(tensor.shape)} dimensions; block-wise kernels take 2"
    if node.op_type == "MatMul":
        if data.shape is not None and len(data.shape) < 2:
            return "its input is a vector"
        return value, transposed
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0 or attribute(node, "transA", 0):
        return "Gemm with alpha, beta or transA has no block-wise kernel"
    transposed ^= bool(attribute(node, "transB", 0))
    channels = tensor.shape.numpy()[0 if transposed else 1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and _sizes(bias) != (channels,):
        return "its bias is not a vector of one value a channel"
    return value, transposed


def _table(node: ir.Node, min_weights: int) -> ir.Value | None:
    """The constant float matrix that a Gather takes rows of, or None if it is too small or no such thing."""
    value = node.inputs[0]
    tensor = None if value is None else _tensor(value)
    if tensor is None or tensor.dtype not in _FLOATS or len(tensor.shape) != 2 or tensor.size < min_weights:
        return None
    return None if attribute(node, "axis", 0) not in (0, -2) else value


def _objection(matrix: Matrix, min_weights: int, embeddings: Embeddings) -> str:
    """Why a matrix has to stay in float; empty if it need not."""
    tensor = _tensor(matrix.value)
    assert tensor is not None
    if tensor.size < max(min_weights, 1):
        return f"its weight has {tensor.size} elements, fewer than min_weights = {min_weights}"
    if matrix.lookups and not matrix.transposed:
        return "its weight is looked up along another axis than the one it is multiplied along"
    for reader in _readers(matrix.value):
        if reader not in matrix.nodes:
            other = f"{reader.op_type} {reader.name!r}"
            return f"{other} reads its weight, too, and is not quantized; the weight would have to be stored twice"
    if matrix.value.is_graph_output():
        return "its weight is an output of the model"
    if not matrix.products and embeddings == "tied":
        return 'no matrix product reads the table that it looks up; embeddings = "all" quantizes it'
    return ""


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read `value`, itself or transposed."""
    for node in users(value):
        if _is_transpose(node) and not node.outputs[0].is_graph_output():
            yield from users(node.outputs[0])
        else:
            yield node


def _behind_transpose(value: ir.Value) -> tuple[ir.Value, bool]:
    """What a matrix is the transpose of, and True; or the matrix itself."""
    producer = value.producer()
    if producer is None or not _is_transpose(producer) or producer.inputs[0] is None:
        return value, False
    return producer.inputs[0], True


def _is_transpose(node: ir.Node) -> bool:
    if node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return False
    perm = attribute(node, "perm")
    return list(perm) == [1, 0] if perm is not None else node.inputs[0] is not None and len(_sizes(node.inputs[0])) == 2


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant, not read from disk; an initializer that the caller may override is no constant."""
    if value.is_graph_input() and value.is_initializer():
        return None
    return ir.convenience.get_const_tensor(value)


def _sizes(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Shape of a value; empty if it is not known."""
    tensor = _tensor(value)
    shape = value.shape if tensor is None else tensor.shape
    return () if shape is None else tuple(shape)  # type: ignore[arg-type]


def _producer_type(value: ir.Value) -> str:
    producer = value.producer()
    return "" if producer is None else producer.op_type
