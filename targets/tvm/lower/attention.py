"""Products of queries and keys, softmax and product with values become one node, transposes around them included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import attribute, redirect, sole_reader, users
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.lower.canonical import scaled_by
from onnxcomp.targets.tvm.nodes import DOMAIN, replace

_SWAP_HEADS = (0, 2, 1, 3)
_TURN = (0, 1, 3, 2)
_TURN_AND_SWAP = (0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True)
class _Found:
    inputs: tuple[ir.Value, ir.Value, ir.Value, ir.Value | None]
    last: ir.Node
    scale: float
    swapped: tuple[bool, bool, bool, bool]
    grouped: bool


@dataclass(frozen=True, kw_only=True)
class Attention(Pass):
    """Makes `Attention` nodes; it comes after `Canonical`, which makes the `Softmax` nodes that it starts from."""

    name: ClassVar[str] = "tvm_attention"
    summary: ClassVar[str] = "Attention as one node."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type != "Softmax" or (found := _find(node)) is None:
                continue
            edits.append(applied(found.last, "attention as one node"))
            flags = {"swapped": list(map(int, found.swapped)), "grouped": int(found.grouped)}
            replace(found.last, "Attention", found.inputs, {"scale": found.scale, **flags})
        if edits:
            common_passes.RemoveUnusedNodesPass()(model)
        return edits


def _find(softmax: ir.Node) -> _Found | None:
    scores, scale = softmax.inputs[0], float(attribute(softmax, "scale", 1.0))
    mask = softmax.inputs[1] if len(softmax.inputs) > 1 else None
    weights = softmax.outputs[0]
    if scores is None or sole_reader(scores) is not softmax:
        return None
    grouped = _rank(weights) == 5
    if grouped:  # heads of queries that share keys were told apart for the mask
        before, after = _regrouped(scores), _read_reshaped(weights)
        if before is None or after is None:
            return None
        scores, weights = before, after
    product, behind = scores.producer(), sole_reader(weights)
    if product is None or behind is None or not _is_matmul(product) or not _is_matmul(behind):
        return None
    q, keys = product.inputs
    v = behind.inputs[1]
    if behind.inputs[0] is not weights or _reader(scores) is None or q is None or keys is None or v is None:
        return None
    turned = _keys(keys)
    if turned is None:
        return None
    k, k_swapped = turned
    if any(_rank(t) != 4 or t.dtype != ir.DataType.FLOAT for t in (q, k, v)):
        return None
    if not _mask_fits(mask, grouped=grouped):
        return None
    if len({_size(t, 0) for t in (q, k, v)}) != 1:
        return None
    v, v_swapped = _unswapped(v)
    heads = {_size(q, 1), _size(k, 2 if k_swapped else 1), _size(v, 2 if v_swapped else 1)}
    if len(heads) != 1 or not all(isinstance(s, int) for s in (*heads, _size(q, 3), _size(k, 3), _size(v, 3))):
        return None
    q, factor = _unscaled(q)
    q, q_swapped = _unswapped(q)
    reader = sole_reader(behind.outputs[0])
    swaps = reader is not None and _permutation(reader) == _SWAP_HEADS
    return _Found(
        inputs=(q, k, v, mask),
        last=reader if reader is not None and swaps else behind,
        scale=scale * factor,
        swapped=(q_swapped, k_swapped, v_swapped, swaps),
        grouped=grouped,
    )


def _reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads more of a value than its shape."""
    readers = [node for node in users(value) if node.op_type != "Shape"]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _keys(value: ir.Value) -> tuple[ir.Value, bool] | None:
    """Keys before they were turned, and whether their axes are (batch, row, head, channel)."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return None
    permutation = _permutation(node)
    if permutation == _TURN_AND_SWAP:
        return node.inputs[0], True
    return _unswapped(node.inputs[0]) if permutation == _TURN else None


def _unswapped(value: ir.Value) -> tuple[ir.Value, bool]:
    node = value.producer()
    if node is None or _permutation(node) != _SWAP_HEADS or node.inputs[0] is None:
        return value, False
    return node.inputs[0], True


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Queries without a constant factor, even if they were reshaped after it."""
    if (found := scaled_by(value)) is not None and found[1] > 0:
        return found
    node = value.producer()
    if node is None or node.op_type != "Reshape" or node.domain or sole_reader(value) is None or node.inputs[0] is None:
        return value, 1.0
    found = scaled_by(node.inputs[0])
    if found is None or found[1] <= 0:
        return value, 1.0
    redirect(node.inputs[0], found[0], [node])
    return value, found[1]


def _regrouped(scores: ir.Value) -> ir.Value | None:
    """(batch, head, row, key) that was reshaped to (batch, head, group, row, key)."""
    node = scores.producer()
    if node is None or node.op_type != "Reshape" or node.domain or sole_reader(scores) is None:
        return None
    source = node.inputs[0]
    if source is None or _rank(source) != 4:
        return None
    return source if _groups(source, scores) else None


def _read_reshaped(weights: ir.Value) -> ir.Value | None:
    node = sole_reader(weights)
    if node is None or node.op_type != "Reshape" or node.domain or _rank(node.outputs[0]) != 4:
        return None
    return node.outputs[0] if _groups(node.outputs[0], weights) else None


def _groups(whole: ir.Value, grouped: ir.Value) -> bool:
    """Whether the third axis of a tensor became two, as far as sizes are known."""
    pairs = [(_size(whole, i), _size(grouped, j)) for i, j in ((0, 0), (1, 1), (3, 4))]
    return isinstance(_size(grouped, 2), int) and not any(
        isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs
    )


def _mask_fits(mask: ir.Value | None, *, grouped: bool) -> bool:
    """Whether a mask is the same for all heads of a group."""
    if mask is None:
        return True
    rank = _rank(mask)
    return rank is not None and (not grouped or rank < 3 or _size(mask, rank - 3) == 1)


def _is_matmul(node: ir.Node) -> bool:
    return node.op_type == "MatMul" and not node.domain


def _permutation(node: ir.Node) -> tuple[int, ...] | None:
    return tuple(attribute(node, "perm", ())) if node.op_type == "Transpose" and not node.domain else None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else value.shape.rank()


def _size(value: ir.Value, axis: int) -> int | str | None:
    if value.shape is None or axis >= value.shape.rank():
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else size.value
