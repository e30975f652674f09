"""Products of two activations become nodes of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import attribute
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.lower.canonical import scaled_by
from onnxcomp.targets.tvm.nodes import replace


@dataclass(frozen=True, kw_only=True)
class MatMuls(Pass):
    """MatMul of what is no constant matrix; a transposition of the second operand and constant factors go into it."""

    name: ClassVar[str] = "tvm_matmuls"
    summary: ClassVar[str] = "Products of two activations to kernels."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        for node in list(model.graph):
            if node.domain or node.op_type != "MatMul":
                continue
            x, w = node.inputs
            if x is None or w is None or _rank(x) < 2 or _rank(w) < 2 or x.dtype != ir.DataType.FLOAT:
                continue
            if ir.convenience.get_const_tensor(w) is not None and _rank(w) == 2:
                continue
            w, turned = _unturned(w)
            alpha = 1.0
            if (scaled := scaled_by(x)) is not None:
                x, alpha = scaled
            edits.append(applied(node, "runs as a product of activations"))
            replace(node, "MatMul", [x, w], {"turned": int(turned), "alpha": alpha})
        if edits:
            common_passes.RemoveUnusedNodesPass()(model)
        return edits


def _unturned(value: ir.Value) -> tuple[ir.Value, bool]:
    """What `value` is the transpose of, and whether it is."""
    node = value.producer()
    if node is None or node.op_type != "Transpose" or node.domain or node.inputs[0] is None:
        return value, False
    rank = _rank(value)
    turn = [*range(rank - 2), rank - 1, rank - 2]
    return (
        (node.inputs[0], True) if list(attribute(node, "perm", turn if rank == 2 else [])) == turn else (value, False)
    )


def _rank(value: ir.Value) -> int:
    return -1 if value.shape is None else value.shape.rank()
