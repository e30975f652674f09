"""QuaRot and SpinQuant: random Hadamard rotations that spread outlier channels, folded into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.passes._hadamard import rotation
from onnxcomp.passes._rotation_flow import Flow
from onnxcomp.passes._rotation_linear import head_width
from onnxcomp.passes._rotations import (
    Seed,
    find_flow,
    fold,
    in_subgraph,
    is_turned,
    norm_seeds,
    turn_online,
    value_seeds,
)
from onnxcomp.passes._turns import Shapes
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused


@dataclass(frozen=True, kw_only=True)
class Rotate(Pass):
    """Turns the channels of a transformer so that none of them is an outlier; the float function stays what it was.

    The residual stream `x` becomes `x @ Q` (R1 of SpinQuant, Liu et al., arXiv 2405.16406; QuaRot, Ashkboos et al.,
    arXiv 2404.00456). The embedding and all linear ops that add to the stream take Q into their outputs, those that
    read a norm of it take Q.T and the gamma and beta of the norm into their inputs. RMSNorm commutes with any
    rotation; where there is LayerNorm, Q keeps the mean. The values of each attention head are turned as well (R2).

    Nodes are added in three cases, which are reported: a head that is tied to the embedding takes no gamma in, so a
    MatMul by `Q.T * gamma @ Q` stands before it; a MatMul without bias that takes a beta in gets an Add; and `online`.
    Keep MatMuls that were added in float: `skip = ["*_rotation"]` in the selector of quantizing passes.

    Attributes:
        stream: Turn the residual stream.
        heads: Turn the values of attention heads.
        cache: A cache that is an input and an output of the graph may hold turned values: the caller only ever feeds
            the one back into the other.
        online: Turn the inputs of the other linear ops that write to the stream, behind a gate or GELU, when it runs,
            by a MatMul of blocks (R4). It costs `online_block` multiplications an element and two Reshapes.
        online_block: Largest block that is turned at run time; a smaller power of two where it does not divide.
    """

    name: ClassVar[str] = "rotate"
    summary: ClassVar[str] = "Hadamard rotations of residual stream and attention values, folded into the weights"

    stream: bool = True
    heads: bool = True
    cache: bool = False
    online: bool = False
    online_block: Literal[16, 32, 64, 128, 256] = 128

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = [
            refused(node, "it stands in a subgraph or function") for node in in_subgraph(model) if self.where(node)
        ]
        shapes = Shapes(model)
        writers: dict[ir.Node, None] = {}
        if self.stream or self.online:
            for start, flow in self._flows(model, shapes, list(norm_seeds(model)), "stream", edits):
                writers.update(dict.fromkeys(flow.writers))
                edits += self._turn(model, flow, start, context.seed, "stream") if self.stream else []
        if self.heads:
            shapes = Shapes(model)  # there may be more nodes by now
            for start, flow in self._flows(model, shapes, list(value_seeds(model)), "values", edits):
                edits += self._turn(model, flow, start, context.seed, "values")
        if self.online:
            edits += self._turn_online(model, shapes, list(writers), context.seed)
        if any(edit.action == "applied" for edit in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _flows(
        self, model: ir.Model, shapes: Shapes, seeds: list[Seed], label: str, edits: list[Edit]
    ) -> Iterator[tuple[Seed, Flow]]:
        """What turns with each seed that no flow before reached."""
        seen: set[ir.Value] = set()
        for start in seeds:
            if start.value in seen or not self.where(start.node):
                continue
            sizes = shapes.sizes(start.value)
            block = head_width(start.node, sizes) if label == "values" else next(iter(sizes[-1:]), None)
            if not isinstance(block, int) or block < 2:
                edits.append(refused(start.node, f"the number of channels of {start.value.name!r} is not known"))
                continue
            flow = find_flow(model, shapes, start, block, label, cache=label == "values" and self.cache)
            seen.update(flow.turns)
            yield start, flow

    def _turn(self, model: ir.Model, flow: Flow, start: Seed, seed: int, label: str) -> list[Edit]:
        reasons = [reason for _, reason in flow.objections]
        reasons += [f"{n.op_type} {n.name!r} is not selected" for n in flow.nodes if not self.where(n)]
        if reasons:
            return [refused(start.node, f"the {label} cannot turn: {reasons[0]}")]
        matrix = rotation(flow.block, seed, keeps_mean=flow.keeps_mean)
        added = fold(Editor(model), flow, matrix, label)
        detail = f"{label} of {flow.block} channels turned together"
        edits = [applied(node, f"{detail}, input side") for node in flow.readers]
        edits += [applied(node, f"{detail}, output side") for node in flow.writers]
        return edits + [applied(start.node, f"added {what}") for what in added]

    def _turn_online(self, model: ir.Model, shapes: Shapes, writers: list[ir.Node], seed: int) -> list[Edit]:
        edits = []
        for node in writers:
            if not self.where(node) or node.op_type == "Conv" or is_turned(node, "values"):
                continue
            done = is_turned(node, "online")
            reason = (
                "it is turned already" if done else turn_online(Editor(model), shapes, node, self.online_block, seed)
            )
            detail = f"input turned at run time, in blocks of {self.online_block} at most"
            edits.append(refused(node, reason) if reason else applied(node, detail))
        return edits
