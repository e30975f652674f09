"""Values of a model that streaming pays to hold: what convolutions and products with constant weights read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users
from onnxcomp.select import Select

_STANDARD = ("", "ai.onnx")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# Data input of an op whose other operands have to be constant for a change of the data to be all that can happen.
_PRODUCTS = {"MatMul": 0, "Gemm": 0}
_MAPS = ("Conv",)
_MOST = 200  # values that a weight may be computed from
_FUSED = {("MatMulNBits", "com.microsoft")}


@dataclass
class Site:
    """A value to hold.

    Attributes:
        value: The value.
        readers: Convolutions and products that read it.
        pixels: It is a map whose places are held as a whole.
    """

    value: ir.Value
    readers: list[ir.Node] = field(default_factory=list)
    pixels: bool = False

    @property
    def graph(self) -> ir.Graph:
        """The graph that the value stands in."""
        graph = self.value.graph
        assert isinstance(graph, ir.Graph)
        return graph


def find_sites(model: ir.Model, where: Select) -> tuple[list[Site], list[tuple[ir.Node, str]]]:
    """Values to hold in the order in which they are computed, and nodes that cannot be streamed, with the reason."""
    sites: dict[ir.Value, Site] = {}
    reasons: list[tuple[ir.Node, str]] = []
    for node in model.graph.all_nodes():
        if not _is_linear(node) or not where(node):
            continue
        value = node.inputs[0]
        if value is None or constant(value) is not None or value.is_initializer():
            continue  # folded away sooner or later
        if reason := _why_not(node, value):
            reasons.append((node, reason))
            continue
        site = sites.setdefault(value, Site(value))
        site.readers.append(node)
        site.pixels |= node.op_type in _MAPS
    return list(sites.values()), reasons


def rnn_nodes(model: ir.Model, where: Select) -> Iterator[ir.Node]:
    """GRU and LSTM nodes."""
    for node in list(model.graph.all_nodes()):
        if node.op_type in ("GRU", "LSTM") and node.domain in _STANDARD and where(node):
            yield node


def _is_linear(node: ir.Node) -> bool:
    if (node.op_type, node.domain) in _FUSED:
        return True
    return node.domain in _STANDARD and (node.op_type in _MAPS or node.op_type in _PRODUCTS)


def _why_not(node: ir.Node, value: ir.Value) -> str:
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    if weight is None or not is_constant(weight):
        return "its weight is computed, so that all of it may change in every step"
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return "it turns its input"
    if value.dtype is not None and value.dtype not in _FLOATS:
        return f"its input is {value.dtype.name.lower()}; values are held as floats"
    if value.graph is None:
        return "its input stands in a function; the pass cleanup may write functions out"
    return ""


def is_constant(value: ir.Value) -> bool:
    """Whether a value is constant, or computed from constants alone, as quantized weights are."""
    waiting, seen = [value], {value}
    while waiting:
        current = waiting.pop()
        if current.is_initializer() and not current.is_graph_input():
            continue
        producer = current.producer()
        if producer is None or len(seen) > _MOST or _has_graphs(producer):
            return False
        for source in producer.inputs:
            if source is not None and source not in seen:
                seen.add(source)
                waiting.append(source)
    return True


def _has_graphs(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def taken(value: ir.Value) -> bool:
    """Whether a value is held already."""
    producer = value.producer()
    return (producer is not None and producer.op_type.startswith("DeltaHold")) or any(
        user.op_type.startswith("DeltaHold") for user in users(value)
    )
