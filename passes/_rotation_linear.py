"""Rules for linear ops, which end a rotation, and for attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxcomp.edit import attribute, users
from onnxcomp.passes._rotation_flow import Flow, Rule
from onnxcomp.passes._turns import Sizes, Turn, constant_shape, is_constant, transposed_constant
from onnxcomp.target import Array

# Attention ops: inputs that hold the values and the cache of values, and the output that is the new cache.
_ATTENTIONS = {
    ("", "Attention"): (2, 5, 2),
    ("com.microsoft", "MultiHeadAttention"): (2, 7, 2),
    ("com.microsoft", "GroupQueryAttention"): (2, 4, 2),
}


def attention_values(node: ir.Node) -> ir.Value | None:
    """What `node` weighs by attention, or None."""
    found = _ATTENTIONS.get(_kind(node))
    if found is not None:
        return node.inputs[found[0]] if len(node.inputs) > found[0] else None
    if node.op_type != "MatMul" or node.inputs[0] is None:
        return None
    before = node.inputs[0].producer()
    while before is not None and before.op_type in ("Reshape", "Cast", "Dropout", "Identity", "Where"):
        source = before.inputs[2 if before.op_type == "Where" else 0]
        before = None if source is None else source.producer()
    return node.inputs[1] if before is not None and before.op_type == "Softmax" else None


def head_width(node: ir.Node, sizes: Sizes) -> int | None:
    """Channels of one head of the values of shape `sizes` that `node` weighs; None if that is not known."""
    width = sizes[-1] if sizes else None
    if _kind(node) not in _ATTENTIONS or len(sizes) != 3:
        return width if isinstance(width, int) else None
    heads = attribute(node, "num_heads" if node.op_type == "MultiHeadAttention" else "kv_num_heads", 0)
    return width // heads if isinstance(width, int) and heads and width % heads == 0 else None


def _kind(node: ir.Node) -> tuple[str, str]:
    return node.domain.removeprefix("ai.onnx"), node.op_type


def _matmul(flow: Flow, node: ir.Node) -> bool:
    data, weight = node.inputs[0], node.inputs[1]
    if data is None or weight is None:
        return False
    if not is_constant(weight):
        return _weighted_sum(flow, node, data, weight)
    if len(constant_shape(weight) or ()) != 2:
        return False
    swapped = int(bool(node.op_type == "Gemm" and attribute(node, "transB", 0)))
    turn, out = flow.of(data), flow.of(node.outputs[0])
    if turn is not None and out is not None:
        flow.object(node, "it both reads and writes the channels")
        return True
    if turn is not None:
        if turn.after or turn.window is not None or turn.before is not None:
            return False
        flow.readers[node] = turn
        _use_weight(flow, node, weight, 0 ^ swapped, turn.gain, None)
    elif out is not None:
        if out.after or out.open:
            return False
        flow.writers[node] = out
        _use_weight(flow, node, weight, 1 ^ swapped, out.before, out.window)
    return True


def _gemm(flow: Flow, node: ir.Node) -> bool:
    if any(attribute(node, key, usual) != usual for key, usual in (("alpha", 1.0), ("beta", 1.0), ("transA", 0))):
        return False
    if not is_constant(node.inputs[1]) or not _matmul(flow, node):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and node in flow.writers:
        if not is_constant(bias):
            return False
        flow.turn(bias, flow.writers[node], node)
    return True


def _conv(flow: Flow, node: ir.Node) -> bool:
    turn, shape = flow.of(node.outputs[0]), constant_shape(node.inputs[1])
    if turn is None or shape is None or turn.after != len(shape) - 2 or flow.of(node.inputs[0]) is not None:
        return False
    if attribute(node, "group", 1) != 1 or turn.open:
        return False
    flow.writers[node] = turn
    flow.use(node, 1, 0, turn.before, turn.window)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        if not is_constant(node.inputs[2]):
            return False
        flow.turn(node.inputs[2], replace(turn, after=0), node)
    return True


def _use_weight(
    flow: Flow, node: ir.Node, weight: ir.Value, axis: int, gain: Array | None, window: tuple[int, int] | None
) -> None:
    """The weight, or the constant that a Transpose makes it of."""
    transpose = weight.producer()
    if transpose is None or transposed_constant(weight) is None:
        flow.use(node, 1, axis, gain, window)
        return
    flow.use(transpose, 0, 1 - axis, gain, window)
    if len(users(weight)) > 1 or weight.is_graph_output():
        flow.object(node, f"its transposed weight {weight.name!r} is shared")


def _weighted_sum(flow: Flow, node: ir.Node, weights: ir.Value, data: ir.Value) -> bool:
    """Sums over another axis than that of the channels: attention, pooling. Or else products of two that turn alike."""
    first, second = flow.of(weights), flow.of(data)
    if (first is not None and not first.after) or (second is not None and second.after == 1):
        if flow.of(node.outputs[0]) is not None or is_constant(weights):
            return False
        if first is not None and not first.plain:
            flow.object(node, f"the weight of {node.name!r} is computed")
            return True
        flow.turn(weights, Turn(), node)  # queries and keys: what they multiply to stays what it was
        flow.turn(data, Turn(after=1), node)
        return True
    known = second or flow.of(node.outputs[0])
    if known is None or first is not None or known.after or known.shift is not None:
        return False
    return flow.pass_on(node, data)


def _attention(flow: Flow, node: ir.Node) -> bool:
    values, past, present = _ATTENTIONS[_kind(node)]
    turned = [i for i, v in enumerate(node.inputs) if flow.of(v) is not None]
    if any(i not in (values, past) for i in turned) or len(node.inputs) <= values or node.inputs[values] is None:
        return False
    if node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and node.inputs[3] is not None:
        return False  # its bias is that of queries, keys and values in one
    if head_width(node, flow.shapes.sizes(node.inputs[values])) != flow.block:
        return False
    for value in (
        node.inputs[values],
        node.outputs[0],
        *node.inputs[past : past + 1],
        *node.outputs[present : present + 1],
    ):
        flow.turn(value, Turn(), node)
    return True


LINEAR_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    **dict.fromkeys(_ATTENTIONS, _attention),
}
