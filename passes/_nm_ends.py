"""Where a model begins and ends: convolutions that see its inputs, and linear layers behind which none comes."""

from __future__ import annotations

import onnx_ir as ir

_LAYERS = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits", "MatMulInteger", "ConvInteger", "LSTM", "GRU", "RNN"}
)
_PRODUCTS = frozenset({"MatMul", "MatMulInteger"})  # which need not have a weight


def ends(model: ir.Model) -> dict[ir.Node, str]:
    """The first convolutions and the last linear layers of the main graph, each with what makes it one."""
    nodes = list(model.graph)
    layers = {node for node in nodes if any(_has_weight(inner) for inner in (node, *_inside(node)))}
    found: dict[ir.Node, str] = {}
    seen: set[ir.Value] = set()  # values that come from a layer
    for node in nodes:
        before = any(value in seen for value in _read(node))
        if node.op_type == "Conv" and not before:
            found[node] = "is the first convolution"
        if before or node in layers:
            seen.update(node.outputs)
    needed: set[ir.Value] = set()  # values that a layer needs
    for node in reversed(nodes):
        behind = any(value in needed for value in node.outputs)
        if node in layers and not behind:
            found[node] = "is the last layer, whose output no other layer reads"
        if behind or node in layers:
            needed.update(_read(node))
    return found


def _read(node: ir.Node) -> list[ir.Value]:
    """What a node reads, its subgraphs included."""
    return [value for reader in (node, *_inside(node)) for value in reader.inputs if value is not None]


def _inside(node: ir.Node) -> list[ir.Node]:
    """Nodes of the subgraphs of a node."""
    graphs: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            graphs.append(attribute.value)
        elif attribute.type == ir.AttributeType.GRAPHS:
            graphs += attribute.value
    return [inner for graph in graphs for inner in graph.all_nodes()]


def _has_weight(node: ir.Node) -> bool:
    if node.op_type not in _LAYERS:
        return False
    return node.op_type not in _PRODUCTS or any(_is_constant(value) for value in node.inputs[:2])


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value is a constant, or a constant transposed or dequantized."""
    for _ in range(3):
        if value is None:
            return False
        if ir.convenience.get_const_tensor(value) is not None:
            return True
        producer = value.producer()
        if producer is None or producer.op_type not in ("Transpose", "DequantizeLinear"):
            return False
        value = producer.inputs[0]
    return False
