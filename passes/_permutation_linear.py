"""Rules for ops that sum over an axis: linear ops, and attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.edit import attribute
from onnxcomp.passes._permutation_elementwise import words
from onnxcomp.passes._permutation_flow import Flow, Rule
from onnxcomp.passes._permutation_relations import Place, Relation, Symbols
from onnxcomp.passes._permutation_tie import Tie

# Attention ops: inputs of values and their cache, the output that is the new cache.
_ATTENTIONS = {
    ("", "Attention"): (2, 5, 2),
    ("com.microsoft", "MultiHeadAttention"): (2, 7, 2),
    ("com.microsoft", "GroupQueryAttention"): (2, 4, 2),
}


def _matmul(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    first, second = flow.sizes(node.inputs[0]), flow.sizes(node.inputs[1])
    if first is None or second is None or min(len(first), len(second)) < 2:
        return None
    rank = max(len(first), len(second)) - 2

    def axes(sizes: Sequence[object], *names: str) -> Symbols:
        start = rank - (len(sizes) - 2)
        return (*(() if s == 1 else (f"{start + i}",) for i, s in enumerate(sizes[:-2])), *((n,) for n in names))

    both = [() if all(len(s) < rank + 2 - i or s[len(s) - rank - 2 + i] == 1 for s in (first, second)) else (f"{i}",)
            for i in range(rank)]  # fmt: skip
    out = (*both, ("row",), ("column",))
    return [
        Tie(
            tensors=(
                (flow.place(node, 0), axes(first, "row", "inner")),
                (flow.place(node, 1), axes(second, "inner", "column")),
                (node.outputs[0], out),
            ),
            what=words(node),
        )
    ]


def _gemm(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    first, second = (("row",), ("inner",)), (("inner",), ("column",))
    out: Symbols = (("row",), ("column",))
    tensors: list[tuple[Place | None, Symbols]] = [
        (flow.place(node, 0), first[::-1] if attribute(node, "transA", 0) else first),
        (flow.place(node, 1), second[::-1] if attribute(node, "transB", 0) else second),
        (node.outputs[0], out),
    ]
    if (bias := flow.place(node, 2)) is not None:
        sizes = flow.sizes(node.inputs[2])
        if sizes is None:
            return None
        axes = out[2 - len(sizes) :]
        tensors.append((bias, tuple(() if s == 1 else a for s, a in zip(sizes, axes, strict=True))))
    return [Tie(tensors=tuple(tensors), what=words(node))]


def _conv(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    shape = flow.sizes(node.inputs[1])
    if shape is None or not isinstance(shape[0], int) or not isinstance(shape[1], int):
        return None
    groups = int(attribute(node, "group", 1))
    taps = tuple((f"tap{i}",) for i in range(len(shape) - 2))
    before = tuple((f"in{i}",) for i in range(len(shape) - 2))
    after = tuple((f"out{i}",) for i in range(len(shape) - 2))
    names = {"group": groups}
    inputs, outputs = ("channel",), ("filter",)
    if node.op_type == "Conv":
        names |= {"channel": shape[1], "filter": shape[0] // groups}
    else:
        names |= {"channel": shape[0] // groups, "filter": shape[1]}
    grouped = [tuple(s for s in ("group", *n) if names[s] > 1) for n in (inputs, outputs)]
    alone = [tuple(s for s in n if names[s] > 1) for n in (inputs, outputs)]
    weight = (grouped[1], alone[0]) if node.op_type == "Conv" else (grouped[0], alone[1])
    apart = frozenset(s for axes in (taps, before, after) for axis in axes for s in axis)
    tensors = [
        (flow.place(node, 0), (("batch",), grouped[0], *before)),
        (flow.place(node, 1), (*weight, *taps)),
        (flow.place(node, 2), (grouped[1],)),
        (node.outputs[0], (("batch",), grouped[1], *after)),
    ]
    tensors = [t for t in tensors if t[0] is not None]
    return [Tie(tensors=tuple(tensors), sizes=names, told_apart=apart, what=words(node))]


def _attention(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    """Values, their cache and the output; queries and keys have labels that nothing covers."""
    values, past, present = _ATTENTIONS[node.domain.removeprefix("ai.onnx"), node.op_type]
    given = node.inputs[values] if len(node.inputs) > values else None
    sizes, out = flow.sizes(given), flow.sizes(node.outputs[0])
    if given is None or sizes is None or out is None:
        return None
    if node.op_type == "MultiHeadAttention" and len(node.inputs) > 3 and node.inputs[3] is not None:
        return None  # its bias is that of queries, keys and values in one
    heads = attribute(node, {"Attention": "q_num_heads"}.get(node.op_type, "num_heads"))
    shared = heads if node.op_type == "MultiHeadAttention" else attribute(node, "kv_num_heads")
    if len(sizes) == 4:
        shared, heads = sizes[1], out[1] if len(out) == 4 else heads
    width = sizes[-1]
    if not isinstance(heads, int) or not isinstance(shared, int) or not isinstance(width, int) or heads % shared:
        return None
    known = {"head": shared, "copy": heads // shared, "channel": width if len(sizes) == 4 else width // shared}
    split: Symbols = (("batch",), ("head",), ("token",), ("channel",))
    joined: Symbols = (("batch",), ("token",), ("head", "channel"))
    merged: Symbols = (("batch",), ("query",), ("head", "copy", "channel"))
    if len(out) == 4:
        merged = (("batch",), ("head", "copy"), ("query",), ("channel",))
    tensors: list[tuple[Place | None, Symbols]] = [(flow.place(node, values), split if len(sizes) == 4 else joined)]
    cache = tuple(("past",) if axis == ("token",) else axis for axis in split)
    tensors += [(node.outputs[0], merged), (None, (("batch",), ("head",), ("query",), ("token",)))]
    if (place := flow.place(node, past)) is not None:
        tensors.append((place, cache))
    if len(node.outputs) > present:
        tensors.append((node.outputs[present], cache))
    return [Tie(tensors=tuple(tensors), sizes=known, told_apart=frozenset({"past"}), what=words(node))]


def _einsum(flow: Flow, node: ir.Node) -> Sequence[Relation] | None:
    left, arrow, right = attribute(node, "equation").replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow or "." in left or any(len(set(term)) < len(term) for term in (*terms, right)):
        return None
    given = [(flow.place(node, i), tuple((s,) for s in term)) for i, term in enumerate(terms)]
    if any(len(flow.sizes(v) or ()) != len(t) for v, t in zip(node.inputs, terms, strict=True)):
        return None
    return [Tie(tensors=(*given, (node.outputs[0], tuple((s,) for s in right))), what=words(node))]


LINEAR_RULES: Mapping[tuple[str, str], Rule] = {
    ("", "MatMul"): _matmul,
    ("", "Gemm"): _gemm,
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv,
    ("", "Einsum"): _einsum,
    **dict.fromkeys(_ATTENTIONS, _attention),
}
