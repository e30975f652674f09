"""Removes neurons that never fire: rows and columns of weights that no calibration token needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, constant, users
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._feed_forward import FeedForward, find_feed_forward
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.sparsity import Firing
from onnxcomp.stats import Observer
from onnxcomp.target import Array

_SIZED = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})  # may hold the number of neurons
_FIRST, _LAST = 1, 0  # axis of the neurons in a weight (inputs, outputs)


@dataclass(frozen=True, kw_only=True)
class PruneDead(Pass):
    """Removes neurons of feed-forward blocks whose value is zero for every calibration token.

    Their rows in the last layer and their columns in the first (gate and up) go. Outputs on the calibration data stay
    what they were; other data may have made the neurons fire, so give much of it. Networks with ReLU have such neurons
    (Li et al., arXiv 2210.06313), those with smooth activations do not.

    Attributes:
        magnitude: A value of at most this counts as zero.
        max_rate: Neurons that fire for at most this share of the tokens go as well; then outputs change.
        multiple: Number of neurons that stay is rounded up to a multiple of this, which kernels like.
    """

    name: ClassVar[str] = "prune_dead"
    summary: ClassVar[str] = "removes neurons that never fire on the calibration data; smaller weights, same outputs"

    magnitude: Annotated[float, Ge(0.0)] = 0.0
    max_rate: Annotated[float, Ge(0.0)] = 0.0
    multiple: Annotated[int, Ge(1)] = 1

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return {
            block.down.source.name or "": Firing(self.magnitude)
            for block in find_feed_forward(model).blocks
            if self.where(block.down.node) and not _objection(block)
        }

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        found = find_feed_forward(model)
        edits = [refused(node, reason) for node, reason in found.reasons.items() if self.where(node)]
        editor = Editor(model)
        for block in found.blocks:
            if self.where(block.down.node):
                reason = _objection(block)
                edits.append(refused(block.down.node, reason) if reason else self._prune(editor, block, context))
        if any(e.action == "applied" for e in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _prune(self, editor: Editor, block: FeedForward, context: Context) -> Edit:
        rates = context.statistic(block.down.source.name or "", Firing).rates
        alive = int(np.count_nonzero(rates > self.max_rate))
        count = min(len(rates), max(1, -(-alive // self.multiple)) * self.multiple)
        if count == len(rates):
            return refused(block.down.node, f"{alive} of its {len(rates)} neurons fire, so none can go")
        kept = np.sort(np.argsort(-rates, kind="stable")[:count])
        for part in (block.up, *(() if block.gate is None else (block.gate,))):
            _take(editor, part.dense, kept, _FIRST)
        _take(editor, block.down, kept, _LAST)
        for value in _inside(block):
            if value.shape is not None and len(value.shape):
                value.shape = ir.Shape([*value.shape[:-1], count])
        return applied(block.down.node, f"{len(rates) - count} of {len(rates)} neurons removed, which fire for no token"
                       if not self.max_rate else f"{len(rates) - count} of {len(rates)} neurons removed")  # fmt: skip


def _objection(block: FeedForward) -> str:
    """Why neurons cannot be taken out of a block; empty if they can."""
    parts = [block.up, *(() if block.gate is None else (block.gate,))]
    for dense in (block.down, *(p.dense for p in parts)):
        if dense.quantized:
            return f"the weight of {dense.node.name} is quantized; prune before"
        weight = dense.node.inputs[1]
        if weight is None or constant(weight) is None:
            return f"the weight of {dense.node.name} is computed; the pass cleanup may fold it"
        if len(users(weight)) > 1:
            return f"the weight of {dense.node.name} is shared with another op"
    if any(p.merged for p in parts):
        return "gate and up are one product, whose split would have to change"
    if any(n.op_type in _SIZED for n in _ops(block)):
        return "a Reshape inside may hold the number of neurons"
    inside = set(_inside(block))
    own = {*_ops(block), block.down.node}
    for value in inside:
        if value.is_graph_output() or any(reader not in own for reader in users(value)):
            return f"{value.name} is read outside the block as well"
    biases = [p.dense.bias for p in parts]
    for node in _ops(block):
        if any(v not in inside and v not in biases and _is_vector(v) for v in node.inputs):
            return f"{node.op_type} {node.name} has a constant for each neuron"
    return ""


def _ops(block: FeedForward) -> list[ir.Node]:
    """Nodes between the first products and the last, biases included."""
    nodes: dict[ir.Node, None] = {}
    first = [block.up.dense.node, *(() if block.gate is None else (block.gate.dense.node,))]
    pending = [v for n in first for v in n.outputs]
    while pending:
        for node in users(pending.pop()):
            if node is not block.down.node and node not in nodes and len(nodes) < 64:
                nodes[node] = None
                pending += node.outputs
    return list(nodes)


def _inside(block: FeedForward) -> list[ir.Value]:
    """Values that have one channel a neuron."""
    first = [block.up.dense.node, *(() if block.gate is None else (block.gate.dense.node,))]
    return [v for n in (*first, *_ops(block)) for v in n.outputs]


def _is_vector(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size > 1


def _take(editor: Editor, dense: Dense, kept: Array, axis: int) -> None:
    node = dense.node
    turned = node.op_type == "Gemm" and attribute(node, "transB", 0)
    weight = constant(node.inputs[1])
    assert weight is not None
    taken = np.ascontiguousarray(np.take(weight, kept, axis=axis ^ 1 if turned else axis))
    node.replace_input_with(1, editor.weight(f"{node.inputs[1].name}_alive", taken))  # type: ignore[union-attr]
    if axis == _FIRST and dense.bias is not None:
        bias = constant(dense.bias)
        assert bias is not None
        fewer = editor.weight(f"{dense.bias.name}_alive", np.ascontiguousarray(bias[kept]))
        for reader in users(dense.bias):
            if reader is node or dense.output in reader.outputs:
                for index, value in enumerate(reader.inputs):
                    if value is dense.bias:
                        reader.replace_input_with(index, fewer)
