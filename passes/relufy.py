"""Replaces smooth activations by ReLU, so that a network can be trained to put out exact zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import Editor, redirect, replace_output, users
from onnxcomp.passes._activations import RECTIFIED
from onnxcomp.passes._feed_forward import FeedForward, find_feed_forward
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused


@dataclass(frozen=True, kw_only=True)
class Relufy(Pass):
    """Replaces the activation of feed-forward blocks, SiLU or a GELU in any form, by ReLU or ThresholdedRelu.

    The first step of ReLU Strikes Back (Mirzadeh et al., arXiv 2310.04564) and of ProSparse (Song et al.,
    arXiv 2402.13516). *The outputs change a lot*: without training afterwards, a language model is of little use.

    Attributes:
        activations: Activations to replace.
        threshold: Outputs of at most this become zero as well (FATReLU); 0 gives a plain ReLU.
    """

    name: ClassVar[str] = "relufy"
    summary: ClassVar[str] = "SiLU and GELU to ReLU; changes the outputs, so train afterwards"
    min_opset: ClassVar[int] = 10  # ThresholdedRelu

    activations: tuple[Literal["silu", "gelu", "gelu_tanh", "quick_gelu"], ...] = (
        "silu",
        "gelu",
        "gelu_tanh",
        "quick_gelu",
    )
    threshold: Annotated[float, Ge(0.0)] = 0.0

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        found = find_feed_forward(model)
        edits = [refused(node, reason) for node, reason in found.reasons.items() if self.where(node)]
        editor = Editor(model)
        edits += [self._replace(editor, block) for block in found.blocks if self.where(block.down.node)]
        if any(e.action == "applied" for e in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _replace(self, editor: Editor, block: FeedForward) -> Edit:
        node = block.down.node
        if block.activation in RECTIFIED:
            return refused(node, f"its activation is {block.activation} already")
        if block.activation not in self.activations:
            return refused(node, f"its activation is {block.activation}, which is not to be replaced")
        source, output = (block.gate or block.up).value, block.activated
        if source.shape != output.shape and any(n.op_type in ("Reshape", "Flatten", "Squeeze") for n in block.ops):
            return refused(node, "its activation changes the layout")
        if any(n.op_type in ("BiasGelu", "FastGelu") and len(n.inputs) > 1 for n in block.ops):
            return refused(node, "its activation adds a bias; the pass cleanup may write it out")
        op_type = "ThresholdedRelu" if self.threshold else "Relu"
        attributes = {"alpha": self.threshold} if self.threshold else None
        readers, is_output = users(output), output.is_graph_output()
        rectified = editor.after(
            source, op_type, [source], name=f"{output.name}_relu", attributes=attributes, like=output
        )
        redirect(output, rectified, readers)
        if is_output:
            replace_output(output, rectified)
        return applied(node, f"{block.activation} became {op_type}; the outputs change: train before use")
