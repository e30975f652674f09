"""Reads back from the optimised graph what each compute node of a model became.

onnxruntime renames what it fuses, but in few ways. A node is looked for, in this order, by its name followed by a known
decoration; by the value that it computes, or that an activation, Add or QuantizeLinear behind it computes, if that was
fused into it; and by its weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
import onnx_ir as ir

from onnxcomp.macs import count_macs
from onnxcomp.target import Audit, AuditRow
from onnxcomp.targets.ort.dense_forms import MASKS
from onnxcomp.targets.ort.lowering import LOWERED
from onnxcomp.targets.ort.reasons import COMPUTE, source, why_float

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_EXPLICIT = frozenset({
    "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM", "QGemm", "QAttention", "MatMulNBits",
})  # fmt: skip
_FAMILIES: Mapping[str, frozenset[str]] = {
    "Conv": frozenset({"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"}),
    "ConvTranspose": frozenset({"ConvTranspose"}),
    "MatMul": frozenset({
        "MatMul", "FusedMatMul", "FusedMatMulActivation", "Gemm", "FusedGemm", "QGemm", "QLinearMatMul",
        "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits",
        "Attention", "MultiHeadAttention", "QAttention",
    }),
}  # fmt: skip
_INTEGER = _EXPLICIT - {"MatMulNBits"}
_DECORATION = re.compile(r"(_token_\d+|/.*|_(MatMulAddFusion|nchwc|fused)\S*|_transformed)*\Z", re.DOTALL)
_HOPS = 4


def audit(model: ir.Model, optimized: onnx.ModelProto) -> Audit:
    """What each compute node of `model` is executed as.

    Sizes of unknown dimensions count as 1 in the number of multiply-accumulates.

    Args:
        model: The model that was compiled, functions inlined, nodes named, shapes inferred.
        optimized: The optimised graph that onnxruntime saved; its weights are not looked at.
    """
    executed = list(_executed(optimized.graph))
    index = _Index(executed)
    nodes = [n for n in model.graph.all_nodes() if _is_compute(n)]
    index.claim_names([n.name or "" for n in nodes])
    rows = tuple(_row(node, index.find(node)) for node in nodes)
    return Audit(rows=rows, executed_ops=dict(Counter(n.op_type for n in executed).most_common()))


def _is_compute(node: ir.Node) -> bool:
    known = node.op_type in COMPUTE or node.op_type in _EXPLICIT or node.op_type in _RECURRENT
    return known or (node.domain.startswith("onnxcomp") and node.op_type not in MASKS)


def _row(node: ir.Node, found: onnx.NodeProto | None) -> AuditRow:
    quantized = node.op_type in _INTEGER or (
        node.op_type in COMPUTE and all(source(v, "DequantizeLinear") is not None for v in node.inputs[:2])
    )
    integer = found is not None and _on_integers(found)
    reason = node.metadata_props.get(LOWERED, "")
    if quantized and not integer:
        reason = (
            why_float(node, found.op_type)
            if found is not None
            else ("it is not found in the executable: onnxruntime folded it into a constant or merged it with others")
        )
    return AuditRow(
        node=node.name or "",
        op_type=node.op_type,
        executed_as=found.op_type if found is not None else "",
        executed_name=found.name if found is not None else "",
        macs=count_macs(node, 1),
        quantized=quantized,
        integer=integer,
        reason=reason,
    )


def _on_integers(node: onnx.NodeProto) -> bool:
    if node.op_type == "MatMulNBits":
        return any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)
    return node.op_type in _INTEGER


def _executed(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _executed(inner)


class _Index:
    """Finds executed nodes by decorated name, computed value or weight."""

    def __init__(self, executed: Sequence[onnx.NodeProto]) -> None:
        families = frozenset().union(*_FAMILIES.values(), _EXPLICIT, _RECURRENT)
        self._nodes = [n for n in executed if n.op_type in families or n.domain.startswith("onnxcomp")]
        self._by_name: dict[str, onnx.NodeProto] = {}
        self._by_value: dict[str, onnx.NodeProto] = {}
        self._by_weight: dict[str, list[onnx.NodeProto]] = {}
        for node in self._nodes:
            for value in (*node.output, node.name.removesuffix("_nchwc") if node.name.endswith("_nchwc") else ""):
                self._by_value.setdefault(value, node)
            for value in node.input:
                self._by_weight.setdefault(value.removesuffix("_T"), []).append(node)

    def claim_names(self, names: Iterable[str]) -> None:
        """Gives every executed node to the longest of `names` that its own name starts with."""
        wanted = set(names) - {""}
        for node in self._nodes:
            for end in range(len(node.name), 0, -1):
                if node.name[:end] in wanted and _DECORATION.match(node.name, end):
                    self._by_name.setdefault(node.name[:end], node)
                    break

    def find(self, node: ir.Node) -> onnx.NodeProto | None:
        """The executed node that computes `node`, or None."""
        found = self._by_name.get(node.name or "")
        if found is not None and _related(node, found):
            return found
        for value in _computed(node):
            found = self._by_value.get(value)
            if found is not None and _related(node, found):
                return found
        for given in node.inputs[1:2]:
            weight = source(given, None)
            users = self._by_weight.get(weight.name or "", []) if weight is not None else []
            if len(users) == 1 and _related(node, users[0]):
                return users[0]
        return None


def _related(node: ir.Node, found: onnx.NodeProto) -> bool:
    family = {"Gemm": "MatMul", "MatMulInteger": "MatMul", "ConvInteger": "Conv"}.get(node.op_type, node.op_type)
    return found.op_type in _FAMILIES.get(family, frozenset({node.op_type}))


def _computed(node: ir.Node) -> Iterator[str]:
    """Names of the node's output and of what follows it without branching, up to the next compute node."""
    value: ir.Value | None = node.outputs[0]
    for _ in range(_HOPS):
        if value is None or value.name is None:
            return
        yield value.name
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or _is_compute(users[0]) or not users[0].outputs:
            return
        value = users[0].outputs[0]
