"""Rules for sums, factors, and the norms that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users
from onnxcomp.passes._rotation_flow import Flow, Rule
from onnxcomp.passes._turns import Turn, constant_shape, is_constant, is_row_scalar, reduced_axes
from onnxcomp.target import Array

# Op type to the inputs that hold gamma and beta; None where there is no beta. Some add first, maybe a bias as well.
_NORMS: dict[str, tuple[int, int | None]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2, None),
}
_SKIP_BIAS = {"SkipLayerNormalization": 4, "SkipSimplifiedLayerNormalization": 3}
_MEANS = frozenset({"ReduceMean", "ReduceSum"})


def is_norm(node: ir.Node) -> bool:
    """Whether `node` is a norm over channels in one op."""
    return node.op_type in _NORMS


def betas(node: ir.Node) -> int | None:
    """Index of the input that `node` adds behind a gain."""
    if node.op_type == "Add":
        return next(i for i, v in enumerate(node.inputs) if is_constant(v))
    return _NORMS[node.op_type][1] if node.op_type in _NORMS else None


def _operands(flow: Flow, node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The operand that turns or may turn, and the other one."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return None
    fixed = is_constant(first) or is_row_scalar(first, flow.shapes)
    return (second, first) if first not in flow.turns and (fixed or second in flow.turns) else (first, second)


def _add(flow: Flow, node: ir.Node) -> bool:
    operands = _operands(flow, node)
    if operands is None:
        return False
    data, other = operands
    turn, out = flow.of(data), flow.of(node.outputs[0])
    known = turn or flow.of(other) or out
    if known is None:
        return False
    if is_constant(other):
        if turn is not None and turn.open:
            return node.op_type == "Add" and _beta(flow, node, turn, other)
        if known.open or not flow.pass_on(node, data):
            return False
        flow.turn(other, known, node)
        return True
    if other not in flow.turns and is_row_scalar(other, flow.shapes):  # it adds the same to all channels
        flow.keeps_mean = True
        return known.plain and known.after == 0 and flow.pass_on(node, data)
    if known.open:
        return False
    for value in (data, other, node.outputs[0]):
        flow.turn(value, known, node)
    return True


def _beta(flow: Flow, node: ir.Node, turn: Turn, beta: ir.Value) -> bool:
    vector = _vector(flow, beta, turn)
    if vector is None:
        return False
    flow.norms[node] = (list(node.inputs).index(beta),)
    flow.turn(node.outputs[0], replace(turn, shift=vector if turn.shift is None else turn.shift + vector), node)
    return True


def _mul(flow: Flow, node: ir.Node) -> bool:
    if node.inputs[0] is node.inputs[1]:
        return node.op_type == "Mul" and _square(flow, node)
    operands = _operands(flow, node)
    if operands is None or (node.op_type == "Div" and operands[0] is not node.inputs[0]):
        return False
    data, other = operands
    turn, out = flow.of(data), flow.of(node.outputs[0])
    known = turn or out
    if known is None or other in flow.turns:
        return False
    if prod(constant_shape(other) or (0,)) == 1 or (is_row_scalar(other, flow.shapes) and known.after == 0):
        return known.shift is None and flow.pass_on(node, data)
    vector = _vector(flow, other, known)
    if vector is not None and (vector == 1.0).all():
        return known.shift is None and flow.pass_on(node, data)
    if vector is None or known.window is not None or node.op_type == "Div":
        return False
    if out is not None and not out.open and (turn is None or turn.before is not None):
        return _scale_before(flow, node, data, vector, out)
    if turn is None or turn.before is not None:
        return False
    flow.norms[node] = (list(node.inputs).index(other),)
    gain = vector if turn.gain is None else turn.gain * vector
    flow.turn(
        node.outputs[0], replace(turn, gain=gain, shift=None if turn.shift is None else turn.shift * vector), node
    )
    return True


def _scale_before(flow: Flow, node: ir.Node, data: ir.Value, vector: Array, out: Turn) -> bool:
    """A Mul on the way from a linear op into the stream, which that op takes in: LayerScale."""
    if sum(n.op_type != "Shape" for n in users(data)) != 1 or data.producer() is None:
        return False
    flow.scales[node] = data
    flow.turn(data, replace(out, before=vector if out.before is None else out.before * vector), node)
    return True


def _vector(flow: Flow, value: ir.Value, turn: Turn) -> Array | None:
    """A constant with one finite value a channel, and nothing else, in float64."""
    shape = constant_shape(value)
    if shape is None or len(shape) <= turn.after or not shape[-1 - turn.after] == prod(shape) == flow.block:
        return None
    array = constant(value)
    if array is None:
        return None
    vector = array.reshape(-1).astype(np.float64)
    return vector if np.isfinite(vector).all() else None


def _power(flow: Flow, node: ir.Node) -> bool:
    exponent = constant(node.inputs[1])
    return exponent is not None and exponent.size == 1 and float(exponent.reshape(())) == 2.0 and _square(flow, node)


def _square(flow: Flow, node: ir.Node) -> bool:
    """Squares, as long as nothing but their sum over all channels is read."""
    turn, squares = flow.of(node.inputs[0]), node.outputs[0]
    if turn is None or squares.is_graph_output():
        return False
    return all(n.op_type in _MEANS and _over_channels(flow, n, turn, node.inputs[0]) for n in users(squares))


def _reduce(flow: Flow, node: ir.Node) -> bool:
    turn = flow.of(node.inputs[0])
    if turn is None or not _over_channels(flow, node, turn, node.inputs[0]):
        return _pool(flow, node)
    flow.keeps_mean |= node.op_type in _MEANS
    return True


def _over_channels(flow: Flow, node: ir.Node, turn: Turn, value: ir.Value | None) -> bool:
    """Whether a reduction goes over all channels of `value`, which are one block, and over nothing else."""
    sizes = flow.shapes.sizes(value)
    whole = turn.plain and turn.window is None and len(sizes) > turn.after and sizes[-1 - turn.after] == flow.block
    return whole and reduced_axes(node, flow.shapes) == [-1 - turn.after]


def _pool(flow: Flow, node: ir.Node) -> bool:
    """A mean over other axes than that of the channels."""
    axes, source, kept = reduced_axes(node, flow.shapes), node.inputs[0], attribute(node, "keepdims", 1)
    turn, out = flow.of(source), flow.of(node.outputs[0])
    known = turn or out
    if node.op_type != "ReduceMean" or axes is None or known is None or known.after or -1 in axes:
        return False
    return bool(kept or max(axes) < -1) and flow.pass_on(node, source)


def _norm(flow: Flow, node: ir.Node) -> bool:
    skip = _SKIP_BIAS.get(node.op_type)
    sums = [*node.inputs[:2], *node.inputs[skip : skip + 1], *node.outputs[3:4]] if skip else [node.inputs[0]]
    turn = next((t for v in sums if (t := flow.of(v)) is not None), None)
    sizes = flow.shapes.sizes(node.inputs[0])
    if turn is None or not turn.plain or turn.after or turn.window is not None or sizes[-1:] != (flow.block,):
        return False
    if attribute(node, "axis", -1) not in (-1, len(sizes) - 1):
        return False
    for value in sums:
        flow.turn(value, turn, node)
    gamma, beta = _NORMS[node.op_type]
    flow.keeps_mean |= beta is not None
    given = {
        i: v for i in (gamma, beta) if i is not None and i < len(node.inputs) and (v := node.inputs[i]) is not None
    }
    vectors = {i: _vector(flow, v, turn) for i, v in given.items()}
    if any(v is None for v in vectors.values()):
        return False
    gain, shift = vectors.get(gamma), None if beta is None else vectors.get(beta)
    gain = None if gain is None or (gain == 1.0).all() else gain
    shift = None if shift is None or not shift.any() else shift
    flow.norms[node] = tuple(vectors) if gain is not None or shift is not None else ()
    flow.turn(node.outputs[0], replace(turn, gain=gain, shift=shift), node)
    return True


ELEMENTWISE_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "Add"): _add,
    ("", "Sub"): _add,
    ("", "Mul"): _mul,
    ("", "Div"): _mul,
    ("", "Pow"): _power,
    **{("", op): _reduce for op in ("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare")},
    **{(domain, op): _norm for op in _NORMS for domain in ("", "com.microsoft")},
}
