"""Rules for ops that move channels about without changing them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.passes._permutation_flow import Flow, Rule
from onnxcomp.passes._permutation_indices import common_indices
from onnxcomp.passes._permutation_part import Part
from onnxcomp.passes._permutation_relations import Place, Relation, Symbols, axes_of
from onnxcomp.passes._permutation_tie import Tie


def _transpose(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes = flow.sizes(node.inputs[0])
    if sizes is None:
        return None
    axes = list(axes_of(len(sizes)))
    turned = tuple(axes[i] for i in attribute(node, "perm", range(len(sizes))[::-1]))
    return [_pair(flow, node, tuple(axes), turned)]


def _reshape(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    old, new = flow.sizes(node.inputs[0]), flow.sizes(node.outputs[0])
    if old is None or new is None:
        return None
    before, after, sizes, apart = common_indices(old, new)
    return [_pair(flow, node, before, after, sizes, apart)]


def _tile(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes, repeats = flow.sizes(node.inputs[0]), constant(node.inputs[1])
    if sizes is None or repeats is None:
        return None
    times = [int(r) for r in repeats]
    before = tuple((f"{i}",) for i in range(len(sizes)))
    after = tuple((f"{i}",) if r == 1 else (f"r{i}", f"{i}") for i, r in enumerate(times))
    known = {f"r{i}": r for i, r in enumerate(times)} | {f"{i}": s for i, s in enumerate(sizes) if isinstance(s, int)}
    return [_pair(flow, node, before, after, known)]


def _pair(
    flow: Flow, node: ir.Node, before: Symbols, after: Symbols, sizes: Mapping[str, int] | None = None,
    apart: frozenset[str] = frozenset(),
) -> Tie:  # fmt: skip
    tensors: list[tuple[Place | None, Symbols]] = [(flow.place(node, 0), before)]
    tensors += [(output, after) for output in node.outputs[:1]]
    return Tie(tensors=tuple(tensors), sizes=sizes or {}, told_apart=apart, what=_words(node))


def _words(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}"


def _axis(flow: Flow, node: ir.Node, value: ir.Value | None, default: int | None) -> int | None:
    axis, sizes = attribute(node, "axis", default), flow.sizes(value)
    return None if axis is None or sizes is None else int(axis) % max(len(sizes), 1)


def _split(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    axis, whole = _axis(flow, node, node.inputs[0], 0), flow.place(node, 0)
    return None if axis is None or whole is None else list(_cuts(flow, node, whole, list(node.outputs), axis))


def _concat(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    axis = _axis(flow, node, node.outputs[0], None)
    parts = [flow.place(node, i) for i in range(len(node.inputs))]
    return None if axis is None else list(_cuts(flow, node, node.outputs[0], parts, axis))


def _cuts(flow: Flow, node: ir.Node, whole: Place, parts: Sequence[Place | None], axis: int) -> Iterator[Relation]:
    """Parts one behind the other; where their sizes are not known, positions along the axis are alike."""
    values = node.outputs if node.op_type == "Split" else node.inputs
    rank = max(len(flow.sizes(v) or ()) for v in values)
    lengths = [s[axis] if (s := flow.sizes(v)) else None for v in values]
    total = sum(n for n in lengths if isinstance(n, int))
    known = all(isinstance(n, int) for n in lengths)
    start = 0
    for part, length in zip(parts, lengths, strict=True):
        if part is None:
            continue
        if known and isinstance(length, int):
            yield Part(part=part, whole=whole, axis=axis, index=np.arange(start, start + length), size=total)
            start += length
        else:
            yield _alike(node, part, whole, axis, rank)


def _alike(node: ir.Node, part: Place, whole: Place, axis: int, rank: int) -> Tie:
    """A part of which the places are not known: labels may not lie along the axis."""
    axes, cut = ([(f"{i}",) if i != axis else (name,) for i in range(rank)] for name in ("whole", "part"))
    apart = frozenset({"whole", "part"})
    return Tie(tensors=((part, tuple(cut)), (whole, tuple(axes))), told_apart=apart, what=_words(node))


def _slice(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes, whole = flow.sizes(node.inputs[0]), flow.place(node, 0)
    given = [constant(v) for v in node.inputs[1:]]
    if sizes is None or whole is None or len(node.inputs) < 3:
        return None
    axes = [int(a) % len(sizes) for a in given[2]] if len(given) > 2 and given[2] is not None else None
    if axes is None and len(given) < 3 and given[0] is not None:
        axes = list(range(len(given[0])))
    if axes is None:
        return None
    size = sizes[axes[0]]
    if len(axes) == 1 and isinstance(size, int) and all(g is not None for g in given):
        start, stop, *_ = (int(g[0]) for g in given if g is not None)
        step = int(given[3][0]) if len(given) > 3 and given[3] is not None else 1
        index = np.arange(size)[slice(start, None if step < 0 and stop < -size else stop, step)]
        return [Part(part=node.outputs[0], whole=whole, axis=axes[0], index=index, size=size)]
    names = tuple((f"{i}",) for i in range(len(sizes)))
    cut = tuple((f"c{i}",) if i in axes else (f"{i}",) for i in range(len(sizes)))
    apart = frozenset({f"{c}{i}" for i in axes for c in ("", "c")})
    return [_pair(flow, node, names, cut, apart=apart)]


def _gather(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    sizes, places = flow.sizes(node.inputs[1]), constant(node.inputs[1])
    axis, whole = _axis(flow, node, node.inputs[0], 0), flow.place(node, 0)
    given = flow.sizes(node.inputs[0])
    if axis is None or whole is None or given is None or sizes is None:
        return None
    size = given[axis]
    if places is not None and places.ndim <= 1 and isinstance(size, int):
        index = np.atleast_1d(places) % size
        dropped = places.ndim == 0
        return [Part(part=node.outputs[0], whole=whole, axis=axis, index=index, size=size, dropped=dropped)]
    axes = list(axes_of(len(given)))
    cut = (*axes[:axis], *axes_of(len(sizes), "i"), *axes[axis + 1 :])
    apart = frozenset({f"{axis}", *(f"i{i}" for i in range(len(sizes)))})
    return [_pair(flow, node, tuple(axes), cut, apart=apart)]


LAYOUT_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "Transpose"): _transpose,
    ("", "Tile"): _tile,
    ("", "Gather"): _gather,
    ("", "Slice"): _slice,
    ("", "Concat"): _concat,
    ("", "Split"): _split,
    **{("", op): _reshape for op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten")},
}
