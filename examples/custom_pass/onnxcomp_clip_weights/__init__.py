"""A pass that lives outside onnxcomp: clips the outliers of weights, so that a quantizer's step gets smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.target import Array

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True, kw_only=True)
class ClipWeights(Pass):
    """Clips the weights of Conv, Gemm and MatMul to `median +- sigmas * sigma` in every output channel.

    Sigma comes from the median absolute deviation, which does not change when outliers are clipped. So a second
    application finds nothing left to do, as the contract for passes demands.

    Attributes:
        sigmas: How far from the median a weight may lie.
    """

    name: ClassVar[str] = "clip_weights"
    summary: ClassVar[str] = "clips outliers of weights in every output channel"

    sigmas: Annotated[float, Ge(2.0)] = 4.0

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        editor = Editor(model)
        nodes = [n for n in model.graph if n.op_type in ("Conv", "Gemm", "MatMul") and n.domain == "" and self.where(n)]
        edits = [self._clip(editor, node) for node in nodes]
        if any(edit.action == "applied" for edit in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _clip(self, editor: Editor, node: ir.Node) -> Edit:
        value = node.inputs[1]
        weight = constant(value)
        if value is None or weight is None or weight.dtype != np.float32 or weight.ndim < 2:
            return refused(node, "its second input is not a constant float32 weight")
        if len(value.uses()) > 1:
            return refused(node, "its weight is shared with another op")
        clipped = clip_outliers(weight, _channel_axis(node, weight), self.sigmas)
        changed = int((clipped != weight).sum())
        if not changed:
            return refused(node, f"no weight lies more than {self.sigmas:g} sigmas from the median of its channel")
        node.replace_input_with(1, editor.weight(f"{value.name}_clipped", clipped))
        return applied(node, f"{changed} of {weight.size} weights clipped")


def clip_outliers(weight: Array, axis: int, sigmas: float) -> Array:
    """Clips every channel to its median plus and minus `sigmas` robust standard deviations.

    Args:
        weight: Any floating-point array.
        axis: Channel axis.
        sigmas: At least 2. A channel of which more than half the weights are equal has no spread and stays as it is.

    Returns:
        An array of the same shape and dtype.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    median = np.median(weight, axis=others, keepdims=True)
    spread = np.median(np.abs(weight - median), axis=others, keepdims=True)
    reach = np.where(spread > 0, sigmas * _MAD_TO_SIGMA * spread, np.inf)
    return np.asarray(np.clip(weight, median - reach, median + reach), weight.dtype)


def _channel_axis(node: ir.Node, weight: Array) -> int:
    if node.op_type == "MatMul":
        return weight.ndim - 1
    return 1 if node.op_type == "Gemm" and not attribute(node, "transB", 0) else 0
