"""Sparse products of floats that leave out too little become dense ones of what a mask keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, become
from onnxcomp.macs import count_macs
from onnxcomp.ops import DOMAIN, OPS
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.ort.dense_forms import SparseCall, drop_unused, sparse_call
from onnxcomp.targets.ort.lowering import fixed_rows, why_dense
from onnxcomp.targets.tvm.lower.prepare import MACS
from onnxcomp.targets.tvm.lower.sparse import drop_functions
from onnxcomp.targets.tvm.nodes import INSTEAD


@dataclass(frozen=True, kw_only=True)
class DenseProducts(Pass):
    """`ThresholdMatMul` and `GatedMLP` with float weights, where the calibrated sparsity does not pay on the target.

    Weights of integers have no dense kernel that computes the same. Where rows are not fixed, the sparse kernels
    themselves multiply densely from some number of rows on.
    """

    name: ClassVar[str] = "tvm_dense_products"
    summary: ClassVar[str] = "Sparse products that do not pay to dense ones."

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in OPS:
                continue
            call = sparse_call(node)
            if call is None or call.format.suffix or call.op not in ("ThresholdMatMul", "GatedMLP"):
                continue
            if reason := why_dense(call, context.capabilities.break_even, fixed_rows(node)):
                for product in _replace(editor, call):
                    product.metadata_props.update({INSTEAD: reason, MACS: str(count_macs(product, 1))})
                edits.append(applied(node, f"runs as a dense product: {reason}"))
        if edits:
            drop_unused(model)
            drop_functions(model, OPS)
        return edits


def _replace(editor: Editor, call: SparseCall) -> list[ir.Node]:
    """Makes a sparse op a dense one, and returns its products."""
    node, name = call.node, call.node.name or call.op
    first, *rest = node.inputs
    threshold = node.inputs[-1]
    assert first is not None
    size = first
    if not attribute(node, "one_sided", 0):
        size = editor.before(node, "Abs", [first], name=f"{name}_size", like=first)
    # A NaN is never small, and stays.
    small = editor.before(
        node, "LessOrEqual", [size, threshold], name=f"{name}_small", like=first, dtype=ir.DataType.BOOL
    )
    zero = editor.weight(f"{name}_zero", np.zeros((), np.float32))
    kept = editor.before(node, "Where", [small, zero, first], name=f"{name}_kept", like=first)
    weight, products = rest[0], [node]
    if call.op == "GatedMLP":
        x, up, weight = rest[:3]
        assert x is not None
        neurons = editor.before(node, "MatMul", [x, up], name=f"{name}_up", like=kept)
        producer = neurons.producer()
        assert producer is not None
        products.append(producer)
        kept = editor.before(node, "Mul", [kept, neurons], name=f"{name}_hidden", like=kept)
    become(node, "MatMul", [kept, weight])
    return products
