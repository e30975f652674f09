"""Rules for ops that treat all channels alike: elementwise ones, norms, reductions, softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.opset import opset
from onnxcomp.passes._permutation_flow import Flow, Rule
from onnxcomp.passes._permutation_relations import Place, Relation, Symbols, axes_of
from onnxcomp.passes._permutation_tie import Tie
from onnxcomp.passes._turns import reduced_axes

_ALONE = (
    "Abs", "Add", "And", "Cast", "Ceil", "Celu", "Clip", "Cos", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp",
    "Expand", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsNaN",
    "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or",
    "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt",
    "Sub", "Sum", "Swish", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
_FUSED_ALONE = ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
_REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
# Norms over the last axes, maybe of a sum: indices of the inputs that are as large as the first.
_NORMS = {
    "LayerNormalization": (0,),
    "RMSNormalization": (0,),
    "SimplifiedLayerNormalization": (0,),
    "SkipLayerNormalization": (0, 1),
    "SkipSimplifiedLayerNormalization": (0, 1),
}


def words(node: ir.Node) -> str:
    """A node as messages name it."""
    return f"{node.op_type} {node.name!r}"


def _aligned(flow: Flow, node: ir.Node, rank: int, inputs: Sequence[int]) -> list[tuple[Place | None, Symbols]] | None:
    """Inputs with the indices of the last `rank` axes, as broadcasting aligns them."""
    found: list[tuple[Place | None, Symbols]] = []
    for index in inputs:
        place = flow.place(node, index)
        if place is None:
            continue
        sizes = flow.sizes(node.inputs[index])
        if sizes is None or len(sizes) > rank:
            return None
        first = rank - len(sizes)
        found.append((place, tuple(() if s == 1 else (f"{first + i}",) for i, s in enumerate(sizes))))
    return found


def _alone(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    inputs = [0] if node.op_type in ("Expand", "Dropout") else range(len(node.inputs))
    ranks = [len(s) for i in inputs if (s := flow.sizes(node.inputs[i])) is not None]
    out = flow.sizes(node.outputs[0])
    rank = max(ranks) if out is None else len(out)
    tensors = _aligned(flow, node, rank, inputs)
    if tensors is None or out is None:
        return None
    axes = tuple(() if s == 1 else (f"{i}",) for i, s in enumerate(out))
    return [Tie(tensors=(*tensors, *((v, axes) for v in node.outputs)), what=words(node))]


def _norm(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes = flow.sizes(node.inputs[0])
    if sizes is None:
        return None
    rank = len(sizes)
    first = int(attribute(node, "axis", -1)) % rank
    tensors = _aligned(flow, node, rank, range(len(node.inputs)))
    whole = tuple(axes_of(rank))
    means = (*whole[:first], *(() for _ in range(rank - first)))
    if tensors is None:
        return None
    outputs = [(v, means if i in (1, 2) else whole) for i, v in enumerate(node.outputs) if v.name]
    return [Tie(tensors=(*tensors, *outputs, (None, means)), what=words(node))]


def _channel_norm(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    """One with parameters a channel, along axis 1: BatchNormalization, InstanceNormalization."""
    sizes = flow.sizes(node.inputs[0])
    if sizes is None or len(sizes) < 2 or attribute(node, "training_mode", 0):
        return None
    axes = tuple(axes_of(len(sizes)))
    given = [(flow.place(node, i), (("1",),)) for i in range(1, len(node.inputs))]
    inside = [(None, axes[:2])] if node.op_type == "InstanceNormalization" else []
    return [Tie(tensors=((flow.place(node, 0), axes), *given, *inside, (node.outputs[0], axes)), what=words(node))]


def _softmax(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes, version = flow.sizes(node.inputs[0]), opset(flow.model)
    if sizes is None:
        return None
    axes = tuple(axes_of(len(sizes)))
    axis = int(attribute(node, "axis", -1 if version >= 13 else 1)) % max(len(sizes), 1)
    inside = axes[:axis] + (axes[axis + 1 :] if version >= 13 or node.op_type == "LpNormalization" else ())
    return [Tie(tensors=((flow.place(node, 0), axes), (None, inside), (node.outputs[0], axes)), what=words(node))]


def _reduce(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes = flow.sizes(node.inputs[0])
    if sizes is None:
        return None
    over = reduced_axes(node, flow.shapes.inferred)
    if over is None:
        if (len(node.inputs) > 1 and constant(node.inputs[1]) is None) or attribute(node, "noop_with_empty_axes", 0):
            return None
        over = [-1 - i for i in range(len(sizes))]
    axes, gone = tuple(axes_of(len(sizes))), {a % max(len(sizes), 1) for a in over}
    keep = attribute(node, "keepdims", 1)
    left = tuple(axis if i not in gone else () for i, axis in enumerate(axes) if keep or i not in gone)
    return [Tie(tensors=((flow.place(node, 0), axes), (node.outputs[0], left)), what=words(node))]


def _spatial(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    """Pooling: it tells places apart, not channels."""
    sizes = flow.sizes(node.inputs[0])
    if sizes is None or len(sizes) < 3 or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return None  # indices of maxima count channels
    before = tuple((f"{i}",) for i in range(len(sizes)))
    whole = node.op_type.startswith("Global")
    after = (*before[:2], *(() if whole else (f"out{i}",) for i in range(2, len(sizes))))
    apart = frozenset() if whole else frozenset(s for axis in (*before[2:], *after[2:]) for s in axis)
    return [Tie(tensors=((flow.place(node, 0), before), (node.outputs[0], after)), told_apart=apart, what=words(node))]


def _resized(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    """Pad and Resize: axes that keep their size keep their channels."""
    old, new = flow.sizes(node.inputs[0]), flow.sizes(node.outputs[0])
    if old is None or new is None or len(old) != len(new):
        return None
    same = [o == n and o is not None for o, n in zip(old, new, strict=True)]
    if node.op_type == "Pad":
        pads = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "pads")
        if pads is None or len(pads) != 2 * len(old):
            return None
        same = [not pads[i] and not pads[i + len(old)] for i in range(len(old))]
    else:
        scales = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if scales is not None and len(scales) == len(old):
            same = [bool(s == 1.0) for s in scales]
        if attribute(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
            return None
    before = tuple((f"{i}",) for i in range(len(old)))
    after = tuple((f"{i}",) if s else (f"out{i}",) for i, s in enumerate(same))
    apart = frozenset(name for i, s in enumerate(same) if not s for name in (f"{i}", f"out{i}"))
    tensors = ((flow.place(node, 0), before), (node.outputs[0], after))
    return [Tie(tensors=tensors, told_apart=apart, what=words(node))]


def _quantized(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes, steps = flow.sizes(node.inputs[0]), flow.sizes(node.inputs[1])
    if sizes is None or steps is None:
        return None
    axes = tuple(axes_of(len(sizes)))
    axis = int(attribute(node, "axis", 1))
    apart: frozenset[str] = frozenset()
    by: Symbols = tuple(() for _ in steps)
    if len(steps) == len(sizes) and attribute(node, "block_size", 0):
        axis %= len(sizes)
        by = (*axes[:axis], ("block",), *axes[axis + 1 :])
        apart = frozenset({f"{axis}", "block"})
    elif len(steps) == 1 and steps[0] != 1:
        by = (axes[axis % len(sizes)],)
    elif any(s != 1 for s in steps):
        return None
    given = [(flow.place(node, i), by) for i in range(1, len(node.inputs))]
    tensors = ((flow.place(node, 0), axes), *given, (node.outputs[0], axes))
    return [Tie(tensors=tensors, told_apart=apart, what=words(node))]


ELEMENTWISE_RULES: Mapping[tuple[str, str], Rule] = {
    **{("", op): _alone for op in _ALONE},
    **{("com.microsoft", op): _alone for op in _FUSED_ALONE},
    **{(domain, op): _norm for op in _NORMS for domain in ("", "com.microsoft")},
    **{("", op): _channel_norm for op in ("BatchNormalization", "InstanceNormalization")},
    **{("", op): _softmax for op in ("Softmax", "LogSoftmax", "LpNormalization")},
    **{("", op): _reduce for op in _REDUCTIONS},
    **{("", op): _spatial for op in ("AveragePool", "MaxPool", "LpPool", "GlobalAveragePool", "GlobalMaxPool")},
    **{("", op): _resized for op in ("Pad", "Resize")},
    **{("", op): _quantized for op in ("QuantizeLinear", "DequantizeLinear")},
}
