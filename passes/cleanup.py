"""Removes what an exporter left behind, without changing the function of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp._onnxscript import FoldConstants, Simplify
from onnxcomp.model import all_nodes, name_nodes
from onnxcomp.passes._affine import fold_affine
from onnxcomp.passes._patches import patches_to_matmul
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass

_PORTABLE_DOMAIN = "onnxcomp"
_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class Cleanup(Pass):
    """Folds constants, inlines functions, removes dead nodes and exporter junk, folds BatchNorm and scales into Conv.

    A patch embedding (Conv whose kernel equals its stride, in front of tokens) is written as the MatMul that it is.
    Functions of the portable domain `onnxcomp` stay. Edits are reported by op type, since whole subgraphs vanish.

    Attributes:
        max_constant: Largest constant in elements that folding may create from a computation.
    """

    name: ClassVar[str] = "cleanup"
    summary: ClassVar[str] = "constant folding, dead nodes, exporter junk, BatchNorm and channel scales into Conv"

    selective: ClassVar[bool] = False  # `where` is about what is folded into a Conv, the rest concerns the graph

    max_constant: Annotated[int, Ge(1)] = 1 << 18

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        before = Counter(n.op_type for n in all_nodes(model))
        IrPassAdapter(common_passes.InlinePass(criteria=lambda function: function.domain != _PORTABLE_DOMAIN))(model)
        edits: list[Edit] = []
        after = before
        for _ in range(_ROUNDS):  # what one round removed may have stood between two ops that now fuse
            edits += self._round(model)
            last, after = after, Counter(n.op_type for n in all_nodes(model))
            if after == last:
                break
        name_nodes(model)
        for op_type in sorted(before | after):
            if (change := after[op_type] - before[op_type]) != 0:
                detail = f"{-change} removed" if change < 0 else f"{change} added"
                detail += f" ({before[op_type]} -> {after[op_type]})"
                edits.append(Edit(action="applied", node="", op_type=op_type, detail=detail))
        return edits

    def _round(self, model: ir.Model) -> list[Edit]:
        IrPassAdapter(
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            FoldConstants(self.max_constant),
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            Simplify(),
            common_passes.DeduplicateInitializersPass(),  # first: equal weights make equal expressions
            common_passes.CommonSubexpressionEliminationPass(),
        )(model)
        edits = [*fold_affine(model, self.where), *patches_to_matmul(model, self.where)]
        IrPassAdapter(
            common_passes.RemoveUnusedNodesPass(),
            common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common_passes.RemoveUnusedOpsetsPass(),
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        )(model)
        return edits
