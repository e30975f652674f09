"""Float32 products with a constant matrix become nodes of ours.

A table that is looked up as well, as language models tie embedding and head, is stored once: as the product needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, users
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import gemm
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import DOMAIN, packed, replace


@dataclass(frozen=True)
class _Operands:
    """What a product reads: `scale * x @ weight + bias_scale * bias`, the weight transposed if `turned`."""

    x: ir.Value
    weight: ir.Value
    turned: bool = False
    scale: float = 1.0
    bias: ir.Value | None = None
    bias_scale: float = 1.0

    @property
    def n(self) -> int:
        """Outputs."""
        assert self.weight.shape is not None
        return int(self.weight.shape[0 if self.turned else 1])  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Products(Pass):
    """MatMul and Gemm with a constant second matrix, in the main graph.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_products"
    summary: ClassVar[str] = "Products with a constant matrix to kernels."
    machine: Machine

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            operands = _operands(node)
            if operands is None:
                continue
            # Before the product is replaced: the table may be its weight.
            lookups = self._lookups(node, operands)
            self._replace(editor, node, operands)
            edits.append(applied(node, "runs as a packed product"))
            for lookup in lookups:
                replace(lookup, "TableRows", [node.inputs[1], lookup.inputs[1]], {"n": operands.n})
                edits.append(applied(lookup, "reads the weight of a product"))
        return edits

    def _lookups(self, product: ir.Node, operands: _Operands) -> list[ir.Node]:
        """Nodes that look columns of a product's weight up, if nothing else reads their table."""
        if self.machine.kernels != Machine.kernels or operands.scale != 1:
            return []
        tables = [operands.weight] if operands.turned else _turned_copies(product, operands.weight)
        for table in tables:
            others = [node for node in users(table) if node is not product]
            if not table.is_graph_output() and all(n.graph is product.graph and _looks_up(n, table) for n in others):
                return others
        return []

    def _replace(self, editor: Editor, node: ir.Node, operands: _Operands) -> None:
        weight, turned, n = operands.weight, operands.turned, operands.n
        assert weight.shape is not None
        k = int(weight.shape[1 if turned else 0])  # type: ignore[arg-type]
        tensor = ir.convenience.get_const_tensor(weight)  # another reader may keep the value, and it becomes an input
        assert tensor is not None

        def values() -> Array:
            array = tensor.numpy()
            return gemm.pack(self.machine, (array.T if turned else array) * np.float32(operands.scale))

        shape = gemm.packed_shape(self.machine, k, n)
        found = constant(operands.bias)
        given = None if found is None else np.broadcast_to(found * np.float32(operands.bias_scale), (1, n))[0]
        inputs = [
            operands.x,
            packed(editor, f"{weight.name}_packed", shape, np.dtype(np.float32), values),
            editor.weight(f"{node.name}_bias", gemm.pack_bias(self.machine, given, n)),
        ]
        replace(node, "Gemm", inputs, {"n": n})


def _operands(node: ir.Node) -> _Operands | None:
    """Those of a product with a constant matrix; a transposition may have gone into it, see `MatMuls`."""
    ours = (node.domain, node.op_type) == (DOMAIN, "MatMul")
    if not ours and (node.domain or node.op_type not in ("MatMul", "Gemm")):
        return None
    x, weight = node.inputs[:2]
    if x is None or weight is None or weight.dtype != ir.DataType.FLOAT or not _constant_matrix(weight):
        return None
    if node.op_type == "MatMul":
        return _Operands(x, weight, turned=bool(attribute(node, "turned", 0)), scale=attribute(node, "alpha", 1.0))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    found = _Operands(
        x,
        weight,
        turned=bool(attribute(node, "transB", 0)),
        scale=attribute(node, "alpha", 1.0),
        bias=bias,
        bias_scale=attribute(node, "beta", 1.0),
    )
    added = constant(bias)
    wrong = bias is not None and (added is None or added.size not in (1, found.n))
    return None if wrong or attribute(node, "transA", 0) else found


def _turned_copies(product: ir.Node, weight: ir.Value) -> list[ir.Value]:
    """Tables that are the transpose of a weight, as constant folding leaves behind."""
    assert product.graph is not None
    tables = dict.fromkeys(n.inputs[0] for n in product.graph if n.op_type == "Gather" and not n.domain)
    return [table for table in tables if table is not None and _turns(table, weight)]


def _turns(table: ir.Value, weight: ir.Value) -> bool:
    one, other = ir.convenience.get_const_tensor(table), ir.convenience.get_const_tensor(weight)
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape[::-1] or not one.size:
        return False
    rows, columns = one.numpy(), other.numpy()
    return bool((rows[0] == columns[:, 0]).all()) and np.array_equal(rows, columns.T)


def _looks_up(node: ir.Node, table: ir.Value) -> bool:
    return node.op_type == "Gather" and not node.domain and not attribute(node, "axis", 0) and node.inputs[0] is table


def _constant_matrix(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None and value.shape is not None and len(value.shape) == 2
