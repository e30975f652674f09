"""Rules for ops that move channels about without changing them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users
from onnxcomp.passes._rotation_flow import Flow, Rule
from onnxcomp.passes._turns import Sizes, Turn


def _same(flow: Flow, node: ir.Node) -> bool:
    kind = attribute(node, "to") if node.op_type == "Cast" else ir.DataType.FLOAT
    return ir.DataType(kind).is_floating_point() and flow.pass_on(node, node.inputs[0])


def _moved(flow: Flow, node: ir.Node, forth: Callable[[int], int | None], back: Callable[[int], int | None]) -> bool:
    """The channels stand at another axis behind the node."""
    turn, out = flow.of(node.inputs[0]), flow.of(node.outputs[0])
    known = turn or out
    after = None if known is None else (forth if turn is not None else back)(known.after)
    if known is None or after is None:
        return False
    flow.turn(node.outputs[0] if turn is not None else node.inputs[0], replace(known, after=after), node)
    return True


def _transpose(flow: Flow, node: ir.Node) -> bool:
    perm = list(attribute(node, "perm", range(len(flow.shapes.sizes(node.inputs[0])))[::-1]))
    last = len(perm) - 1
    return bool(perm) and _moved(flow, node, lambda a: last - perm.index(last - a), lambda a: last - perm[last - a])


def _reshape(flow: Flow, node: ir.Node) -> bool:
    old, new = flow.shapes.sizes(node.inputs[0]), flow.shapes.sizes(node.outputs[0])
    return _moved(
        flow, node, lambda a: _same_place(old, new, a, flow.block), lambda a: _same_place(new, old, a, flow.block)
    )


def _same_place(old: Sizes, new: Sizes, after: int, block: int) -> int | None:
    """Number of axes behind the channels once a Reshape has made `new` of `old`; None if they are not kept together."""
    if len(old) <= after:
        return None
    size = old[-1 - after]
    for found in range(len(new)):
        here = new[-1 - found]
        if not isinstance(here, int) or here % block:
            continue
        if _equal(old[len(old) - after :], new[len(new) - found :]):
            return found
        if here == size and _equal(old[: -1 - after], new[: -1 - found]):
            return found
    return None


def _equal(one: Sizes, other: Sizes) -> bool:
    """Whether the products of two runs of sizes are the same, whatever the symbolic ones are."""
    numbers = [math.prod(s for s in sizes if isinstance(s, int)) for sizes in (one, other)]
    symbols = [sorted(str(s) for s in sizes if not isinstance(s, int)) for sizes in (one, other)]
    return numbers[0] == numbers[1] and symbols[0] == symbols[1] and "None" not in symbols[0]


def _axis(flow: Flow, node: ir.Node, value: ir.Value | None, default: int | None) -> int | None:
    """The axis that `node` works along, as a number of axes behind it; None if that is not known."""
    axis, rank = attribute(node, "axis", default), len(flow.shapes.sizes(value))
    if axis is None or (axis >= 0 and not rank):
        return None
    return int(-1 - axis if axis < 0 else rank - 1 - axis)


def _gather(flow: Flow, node: ir.Node) -> bool:
    axis, turn = _axis(flow, node, node.inputs[0], 0), flow.of(node.inputs[0]) or flow.of(node.outputs[0])
    if axis is None or turn is None or flow.of(node.inputs[1]) is not None:
        return False
    return axis > turn.after and flow.pass_on(node, node.inputs[0])


def _slice(flow: Flow, node: ir.Node) -> bool:
    rank = len(flow.shapes.sizes(node.inputs[0]))
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    turn = flow.of(node.inputs[0]) or flow.of(node.outputs[0])
    if not rank or axes is None or turn is None:
        return False
    return all(int(a) % rank != rank - 1 - turn.after for a in axes) and flow.pass_on(node, node.inputs[0])


def _concat(flow: Flow, node: ir.Node) -> bool:
    turn = next((t for v in (*node.inputs, *node.outputs) if (t := flow.of(v)) is not None), None)
    axis = _axis(flow, node, node.outputs[0], None)
    if turn is None or axis in (None, turn.after):
        return False
    for value in (*node.inputs, *node.outputs):
        flow.turn(value, turn, node)
    return True


def _split(flow: Flow, node: ir.Node) -> bool:
    source = node.inputs[0]
    turn = flow.of(source) or next((t for v in node.outputs if (t := flow.of(v)) is not None), None)
    axis = _axis(flow, node, source, 0)
    if turn is None or axis is None or source is None:
        return False
    if axis == turn.after:
        return _split_channels(flow, node, source)
    for value in (source, *node.outputs):
        flow.turn(value, turn, node)
    return True


def _split_channels(flow: Flow, node: ir.Node, source: ir.Value) -> bool:
    """One part of the channels turns: the values in one projection of queries, keys and values."""
    turned = [(i, t) for i, v in enumerate(node.outputs) if (t := flow.of(v)) is not None]
    if len(turned) != 1 or [n for n in users(source) if n.op_type != "Shape"] != [node]:
        return False
    (index, turn), *_ = turned
    widths = [s[-1 - turn.after] if (s := flow.shapes.sizes(v)) else None for v in node.outputs]
    known = [w for w in widths if isinstance(w, int)]
    if turn.window is not None or not turn.plain or len(known) != len(widths):
        return False
    first = sum(known[:index])
    flow.turn(source, Turn(after=turn.after, window=(first, first + known[index])), node)
    return True


LAYOUT_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "Transpose"): _transpose,
    ("", "Gather"): _gather,
    ("", "Slice"): _slice,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    **{("", op): _reshape for op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")},
    **{("", op): _same for op in ("Identity", "Cast", "Expand", "Dropout", "Tile")},
}
