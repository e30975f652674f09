"""Decides which tensors of a model get a Q/DQ pair, from the placements that a target asks for.

Four rules:

1. A linear op with a constant weight is quantized: its input is *demanded*; its output is *forced* when the target
   needs it quantized.
2. An elementwise op is quantized when all its inputs are available as integers anyway; its output is then forced.
3. An op that only moves values is quantized when its input is available and its output is needed by another quantized
   op, or read in a subgraph; its output shares the input's grid.
4. A ReLU or Clip that alone reads an op's output, in front of a quantizer, is folded into that quantizer.

A forced tensor is read quantized by everyone, since integer kernels need `QuantizeLinear` to be the only reader. A
demanded tensor is read quantized by quantized ops only; everyone else keeps the exact value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, in_main_graph, sole_reader, users
from onnxcomp.model import all_nodes
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select
from onnxcomp.target import Capabilities


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear op to quantize.

    Attributes:
        node: Conv, MatMul or Gemm.
        input: Its activation.
        weight: Its constant weight.
        channel_axis: Axis of the output channels in the weight.
        bias: Constant bias, None if there is none.
        bias_user: Node that reads the bias: `node` itself, or an Add behind a MatMul.
        output: Output, bias included.
    """

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    channel_axis: int
    bias: ir.Value | None
    bias_user: ir.Node | None
    output: ir.Value


@dataclass(kw_only=True)
class Pair:
    """A Q/DQ pair to put behind a tensor.

    Attributes:
        observed: Name of the value whose statistics give the grid.
        readers: Nodes that read the pair; None for everyone.
        folded: ReLU or Clip that the quantizer stands for, to be dropped.
    """

    observed: str
    readers: list[ir.Node] | None
    folded: ir.Node | None = None


@dataclass(kw_only=True)
class Plan:
    """Everything to quantize.

    Attributes:
        linears: Linear ops in order.
        elementwise: Elementwise ops in order.
        pairs: Tensor, before any folded activation, to its Q/DQ pair, in graph order.
        refusals: Linear ops that stay in float, with the reason.
    """

    linears: list[Linear] = field(default_factory=list)
    elementwise: list[ir.Node] = field(default_factory=list)
    pairs: dict[ir.Value, Pair] = field(default_factory=dict)
    refusals: list[Edit] = field(default_factory=list)


def plan(model: ir.Model, capabilities: Capabilities, where: Select) -> Plan:
    """Decides what to quantize; looks at the graph only."""
    result = Plan()
    for node in all_nodes(model):
        placement = capabilities.placements.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if placement is None or placement.kind != "linear" or not where(node):
            continue
        found = _linear(model, node)
        if isinstance(found, str):
            result.refusals.append(refused(node, found))
        else:
            result.linears.append(found)
    _Planner(model, capabilities, where, result).run()
    return result


class _Planner:
    """State of one planning: the sets that the module's rules speak of."""

    def __init__(self, model: ir.Model, capabilities: Capabilities, where: Select, result: Plan) -> None:
        self.graph = model.graph
        self.placements = capabilities.placements
        self.where = where
        self.result = result
        self.demanded = {linear.input for linear in result.linears}
        self.forced: set[ir.Value] = set()
        self.quantized: set[ir.Node] = {linear.node for linear in result.linears}
        self.folds: dict[ir.Value, ir.Node] = {}  # output of an op -> the activation that reads it

    def run(self) -> None:
        outputs = {linear.output: linear.node for linear in self.result.linears}
        moving: list[ir.Node] = []
        available = set(self.demanded)
        for node in self.graph:
            for value in node.outputs:
                owner = outputs.get(value)
                if owner is not None and self.placements[owner.op_type].output:
                    available |= self._force(value)
            kind = self._kind(node)
            if kind == "elementwise" and self._takes_part(node, available):
                self.quantized.add(node)
                self.result.elementwise.append(node)
                available |= self._force(node.outputs[0])
            elif kind == "passthrough" and len(node.outputs) == 1 and node.inputs[0] in available:
                moving.append(node)
                available.add(node.outputs[0])
        shares = self._needed(moving)
        self._fold_demanded(outputs)
        self._make_pairs(shares)

    def _kind(self, node: ir.Node) -> str:
        placement = self.placements.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        return placement.kind if placement is not None and self.where(node) else ""

    def _takes_part(self, node: ir.Node, available: set[ir.Value]) -> bool:
        inputs = [v for v in node.inputs if v is not None]
        return bool(inputs) and len(node.outputs) == 1 and all(v in available for v in inputs)

    def _force(self, value: ir.Value) -> set[ir.Value]:
        """Forces the output of an op, or that of the activation which alone reads it."""
        activation = _foldable_reader(value)
        if activation is not None:
            self.folds[value] = activation
            value = activation.outputs[0]
        self.forced.add(value)
        return {value}

    def _needed(self, moving: list[ir.Node]) -> dict[ir.Value, ir.Value]:
        """Keeps the moving ops whose output a quantized op or a subgraph reads; returns output to input of these."""
        shares: dict[ir.Value, ir.Value] = {}
        for node in reversed(moving):
            output, source = node.outputs[0], node.inputs[0]
            assert source is not None
            quantized = output in self.demanded or any(n in self.quantized for n in users(output))
            if quantized or self._is_read_inside(output):
                self.quantized.add(node)
                shares[output] = source
        return shares

    def _is_read_inside(self, value: ir.Value) -> bool:
        """Whether a body of If, Loop or Scan reads it.

        onnxruntime 1.32 aborts where such a reader stands behind a DequantizeLinear and an op that only moves values.
        """
        return any(reader.graph is not self.graph for reader in users(value))

    def _fold_demanded(self, outputs: dict[ir.Value, ir.Node]) -> None:
        """Folds a ReLU between an op whose output need not be quantized and a tensor that is quantized anyway.

        So, too, one that onnxruntime would fuse into the op, which then runs in float.
        """
        for value in outputs:
            activation = _foldable_reader(value)
            if activation is None or value in self.folds:
                continue
            after = activation.outputs[0]
            quantized_only = all(n in self.quantized for n in users(after)) and not after.is_graph_output()
            if (after in self.demanded and quantized_only) or _would_be_fused_in_float(value, activation):
                self.folds[value] = activation
                self.forced.add(after)

    def _make_pairs(self, shares: dict[ir.Value, ir.Value]) -> None:
        before = {activation.outputs[0]: value for value, activation in self.folds.items()}
        wanted = self.forced | self.demanded | set(shares)
        wanted |= {v for n in self.quantized for v in self._data_inputs(n)}
        for value in _in_order(self.graph):
            if value not in wanted:
                continue
            origin = value
            while origin in shares:
                origin = shares[origin]
            everyone = value in self.forced or (value in shares and self._is_read_inside(value))
            readers = None if everyone else [n for n in users(value) if n in self.quantized]
            place = before.get(value, value)
            folded = self.folds.get(place) if place is not value else None
            self.result.pairs[place] = Pair(observed=origin.name or "", readers=readers, folded=folded)

    def _data_inputs(self, node: ir.Node) -> list[ir.Value]:
        placement = self.placements[node.op_type]
        if placement.kind == "elementwise":
            return [v for v in node.inputs if v is not None]
        return [node.inputs[0]] if node.inputs[0] is not None else []


def _in_order(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _linear(model: ir.Model, node: ir.Node) -> Linear | str:
    """The op's parts, or the reason why it cannot be quantized."""
    if not in_main_graph(model, node):
        return "it stands in a subgraph or function, whose values calibration cannot observe"
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None:
        return "an input is missing"
    array_type = weight.dtype if weight.dtype is not None else None
    array = constant(weight)
    if array is None:
        if _is_dequantized(weight):
            return "it is quantized already"
        return "its second input is not a constant weight but another activation"
    if array.dtype != np.float32:
        return f"its weight is {array_type or array.dtype}, not float32"
    if constant(activation) is not None:
        return "its first input is constant"
    if not np.isfinite(array).all():
        return "its weight holds NaN or infinity"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op_type == "MatMul":
        return _matmul(node, activation, weight, array.ndim)
    if node.op_type == "Gemm":
        if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0 or attribute(node, "transA", 0):
            return "Gemm with alpha, beta or transA has no integer kernel"
        axis = 0 if attribute(node, "transB", 0) else 1
    else:
        axis = 0
    channels = array.shape[axis]
    bias_array = constant(bias)
    if bias is not None and (bias_array is None or bias_array.size != channels):
        return "its bias is not a constant vector of one value a channel"
    return Linear(
        node=node,
        input=activation,
        weight=weight,
        channel_axis=axis,
        bias=bias,
        bias_user=None if bias is None else node,
        output=node.outputs[0],
    )


def _matmul(node: ir.Node, activation: ir.Value, weight: ir.Value, rank: int) -> Linear | str:
    if rank != 2:
        return f"its weight has {rank} dimensions; integer kernels take 2"
    channels = _channels(weight)
    output, reader = node.outputs[0], sole_reader(node.outputs[0])
    bias, user = None, None
    if reader is not None and reader.op_type == "Add":
        other = next((v for v in reader.inputs if v is not output), None)
        array = constant(other)
        if array is not None and array.size == channels == array.shape[-1] and array.ndim == 1:
            bias, user, output = other, reader, reader.outputs[0]
    return Linear(node=node, input=activation, weight=weight, channel_axis=1, bias=bias, bias_user=user, output=output)


def _channels(weight: ir.Value) -> int:
    array = constant(weight)
    assert array is not None
    return int(array.shape[1])


def _is_dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _would_be_fused_in_float(value: ir.Value, activation: ir.Node) -> bool:
    """Whether `value` is two-dimensional and goes through a ReLU that is no output: a Gemm with float output then."""
    two_dimensional = value.shape is None or value.shape.rank() == 2
    return activation.op_type == "Relu" and two_dimensional and not activation.outputs[0].is_graph_output()


def _foldable_reader(value: ir.Value) -> ir.Node | None:
    """The ReLU or Clip that alone reads `value` and keeps zero, or None."""
    node = sole_reader(value)
    if node is None:
        return None
    if node.op_type == "Relu" and node.domain in ("", "ai.onnx"):
        return node
    if node.op_type != "Clip" or node.inputs[0] is not value:
        return None
    limits = [constant(v) if v is not None else None for v in (*node.inputs[1:], None, None)[:2]]
    given = [v for v in node.inputs[1:] if v is not None]
    if len(given) != sum(limit is not None for limit in limits):
        return None  # a limit is computed
    low, high = (None if limit is None else float(limit) for limit in limits)
    return node if (low is None or low <= 0.0) and (high is None or high > 0.0) else None
