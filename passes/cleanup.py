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

from onnxcomp._onnxscript import FoldConstants, Simplify, hidden
from onnxcomp.edit import defaults_hidden
from onnxcomp.model import all_nodes, initializers, name_nodes
from onnxcomp.passes._affine import fold_affine
from onnxcomp.passes._clips import merge_clips
from onnxcomp.passes._joint_projections import split_joint_projections
from onnxcomp.passes._patches import patches_to_matmul
from onnxcomp.passes._shapes import settle_shapes
from onnxcomp.passes._taken_rows import take_rows_early
from onnxcomp.passes._transposes import transpose_weights
from onnxcomp.passes._vectors import biases_to_vectors
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass

_PORTABLE_DOMAIN = "onnxcomp"
_ROUNDS = 8
_FOLDS = (
    merge_clips,
    fold_affine,
    patches_to_matmul,
    biases_to_vectors,
    split_joint_projections,
    take_rows_early,
)


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
        with defaults_hidden(model):
            return self._apply(model)

    def _apply(self, model: ir.Model) -> Sequence[Edit]:
        before = Counter(n.op_type for n in all_nodes(model))
        IrPassAdapter(common_passes.InlinePass(criteria=lambda function: function.domain != _PORTABLE_DOMAIN))(model)
        _trim_inputs(model)
        edits = settle_shapes(model)
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
        simplify = Simplify()
        IrPassAdapter(
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            FoldConstants(self.max_constant),
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            simplify,
            common_passes.DeduplicateInitializersPass(),  # first: equal weights make equal expressions
        )(model)
        with hidden(model):
            IrPassAdapter(common_passes.CommonSubexpressionEliminationPass())(model)
        transpose_weights(model)
        edits = [Edit(action="refused", node="", op_type="model", detail=text) for text in simplify.failed]
        for fold in _FOLDS:
            edits += fold(model, self.where)
        _forget_removed(model)
        IrPassAdapter(
            common_passes.RemoveUnusedNodesPass(),
            common_passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
            common_passes.RemoveUnusedOpsetsPass(),
            common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        )(model)
        return edits


def _forget_removed(model: ir.Model) -> None:
    """Nodes in the body of a node that is gone still count as readers of what is outside, which keeps that alive."""
    nodes = list(all_nodes(model))
    there = set(nodes)
    for value in (*initializers(model), *model.graph.inputs, *(v for node in nodes for v in node.outputs)):
        for reader, index in tuple(value.uses()):
            if reader not in there:
                reader.replace_input_with(index, None)


def _trim_inputs(model: ir.Model) -> None:
    """Drops empty inputs at the end, which mean the same as none but are written as "" by some exporters."""
    for node in all_nodes(model):
        count = len(node.inputs)
        while count and node.inputs[count - 1] is None:
            count -= 1
        if node.domain == "" and count < len(node.inputs):
            node.resize_inputs(count)
