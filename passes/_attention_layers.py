"""Finds the projections around attention: what queries, keys and values come from, and what its output goes into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.edit import users
from onnxcomp.model import all_nodes
from onnxcomp.passes._dense import Dense

_LAYOUT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "Dropout"})
_SCORES = _LAYOUT | {"Mul", "Div", "Add", "Sub", "Where", "Max", "Min", "Tanh"}
_BACK = _LAYOUT | frozenset({
    "Mul", "Div", "Add", "Sub", "Neg", "Concat", "Split", "Slice", "Gather", "Expand", "Tile", "Pow", "ReduceMean",
    "Sqrt", "Reciprocal", "LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "RotaryEmbedding",
    "Where", "ScatterND", "TensorScatter",
})  # fmt: skip
_FUSED = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention", "SparseAttention"})
_MOST = 64


@dataclass(frozen=True, kw_only=True)
class AttentionLayers:
    """The products with constant matrices around one attention; those in one product are the same.

    Attributes:
        query: Makes the queries.
        key: Makes the keys.
        value: Makes the values.
        output: Reads the output of the attention.
    """

    query: Dense
    key: Dense
    value: Dense
    output: Dense

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes of all of them."""
        return tuple(dict.fromkeys(d.node for d in (self.query, self.key, self.value, self.output)))


def find_attention_layers(model: ir.Model, dense: Sequence[Dense]) -> list[AttentionLayers]:
    """The attentions of the main graph whose four projections were all found."""
    outputs = {d.output: d for d in dense} | {d.node.outputs[0]: d for d in dense}
    inputs = {d.node: d for d in dense}
    found: list[AttentionLayers] = []
    for node in all_nodes(model):
        operands = _operands(node)
        if operands is None:
            continue
        *sources, result = operands
        made = [_back(v, outputs) for v in sources]
        read = _forward(result, inputs)
        if all(len(m) == 1 for m in made) and len(read) == 1:
            found.append(AttentionLayers(query=made[0][0], key=made[1][0], value=made[2][0], output=read[0]))
    return found


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value] | None:
    """Queries, keys, values and the output of an attention that is or begins with `node`; None if it is none."""
    if node.op_type in _FUSED:
        given = [v for v in node.inputs[:3] if v is not None]
        if node.op_type == "Attention" and node.domain == "com.microsoft":
            return None  # its projections are inside
        query = given[0]
        key, value = (given[1], given[2]) if len(given) == 3 else (query, query)
        return query, key, value, node.outputs[0]
    if node.op_type != "Softmax":
        return None
    scores = _first(node.inputs[0], lambda n: _is_product(n), _SCORES)
    weighted = _next_product(node.outputs[0])
    if scores is None or weighted is None:
        return None
    (first, second), product = scores.inputs, weighted.inputs[1]
    if first is None or second is None or product is None:
        return None
    return first, second, product, weighted.outputs[0]


def _is_product(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "FusedMatMul", "Einsum") and all(
        v is not None and ir.convenience.get_const_tensor(v) is None for v in node.inputs[:2]
    )


def _first(value: ir.Value | None, wanted: Callable[[ir.Node], bool], through: Iterable[str]) -> ir.Node | None:
    """The nearest node upstream that is `wanted`."""
    front = [value]
    for _ in range(_MOST):
        nodes = [n for v in front if v is not None and (n := v.producer()) is not None]
        if (hit := next((n for n in nodes if wanted(n)), None)) is not None:
            return hit
        front = [v for n in nodes if n.op_type in through for v in n.inputs]
        if not front:
            return None
    return None


def _next_product(value: ir.Value) -> ir.Node | None:
    """The product that weighs values with the softmax `value`."""
    for _ in range(8):
        readers = [n for n in users(value) if n.op_type in _LAYOUT or _is_product(n)]
        if len(readers) != 1:
            return None
        if _is_product(readers[0]):
            return readers[0] if readers[0].inputs[0] is value else None
        value = readers[0].outputs[0]
    return None


def _back(value: ir.Value, outputs: Mapping[ir.Value, Dense]) -> list[Dense]:
    """Products that `value` is computed from, with nothing but layout, norms and rotations between."""
    found: dict[ir.Node, Dense] = {}
    seen: set[ir.Value] = set()
    pending = [value]
    while pending and len(seen) < 4 * _MOST:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if current in outputs:
            found[outputs[current].node] = outputs[current]
            continue
        node = current.producer()
        if node is not None and node.op_type in _BACK:
            pending += [v for v in node.inputs if v is not None]
    return list(found.values())


def _forward(value: ir.Value, inputs: Mapping[ir.Node, Dense]) -> list[Dense]:
    """Products that read `value`, with nothing but layout between."""
    found: dict[ir.Node, Dense] = {}
    pending = [value]
    for _ in range(_MOST):
        if not pending:
            break
        for node in users(pending.pop()):
            if node in inputs:
                found[node] = inputs[node]
            elif node.op_type in _LAYOUT:
                pending.append(node.outputs[0])
    return list(found.values())
