"""Concatenations of long runs become nodes of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.nodes import replace


@dataclass(frozen=True, kw_only=True)
class Concats(Pass):
    """Concat of two tensors before their last axis, as caches of keys and values grow: TVM asks at each value which."""

    name: ClassVar[str] = "tvm_concats"
    summary: ClassVar[str] = "Concatenations to kernels."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        for node in list(model.graph):
            if node.domain or node.op_type != "Concat" or len(node.inputs) != 2:
                continue
            first = node.inputs[0]
            rank = None if first is None or first.shape is None else first.shape.rank()
            if rank is None or any(
                v is None or v.dtype != ir.DataType.FLOAT or constant(v) is not None for v in node.inputs
            ):
                continue
            axis = attribute(node, "axis")
            axis = axis + rank if axis < 0 else axis
            if axis == rank - 1:
                continue
            edits.append(applied(node, "a concatenation by whole runs"))
            replace(node, "Concat", node.inputs, {"axis": axis})
        return edits
