"""Finds out how far a rotation of one activation's channels reaches: all values that turn with it, and where it ends.

An activation is turned when it becomes `x @ Q` along its channels. Ops that mix no channels pass that on to the values
before and behind them, linear layers and constants take it into their weights, means and sums of squares end it. There
is one rule for each op type, applied to every node that a turned value touches until nothing changes any more. What no
rule covers is an objection, and then nothing may be turned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import onnx_ir as ir

from onnxcomp.edit import in_main_graph, users
from onnxcomp.passes._turns import Shapes, Turn, Use, agree, constant_shape, is_constant
from onnxcomp.target import Array


@dataclass(kw_only=True)
class Flow:
    """All that turns with one activation.

    Attributes:
        model: The model; it is not changed.
        shapes: Shapes of its values.
        rules: Rule by domain and op type.
        block: Channels that are turned together.
        cache: Graph inputs and outputs may turn: the caller feeds the one back into the other.
        turns: Turned values.
        uses: Constants that have to be turned, by reader and index of its input.
        readers: Linear ops that take turned inputs.
        writers: Linear ops that put turned outputs out.
        norms: Nodes whose constants go into the readers: input indices by node.
        scales: Mul nodes whose constant goes into the linear op before them: what they scale by node.
        keeps_mean: The rotation has to leave means over the channels alone.
        objections: What cannot turn, with the reason.
    """

    model: ir.Model
    shapes: Shapes
    rules: Mapping[tuple[str, str], Rule]
    block: int
    cache: bool = False
    turns: dict[ir.Value, Turn] = field(default_factory=dict)
    uses: dict[tuple[ir.Node, int], Use] = field(default_factory=dict)
    readers: dict[ir.Node, Turn] = field(default_factory=dict)
    writers: dict[ir.Node, Turn] = field(default_factory=dict)
    norms: dict[ir.Node, tuple[int, ...]] = field(default_factory=dict)
    scales: dict[ir.Node, ir.Value] = field(default_factory=dict)
    keeps_mean: bool = False
    objections: list[tuple[ir.Node, str]] = field(default_factory=list)
    _pending: list[ir.Node] = field(default_factory=list)

    def spread(self, seed: ir.Value, node: ir.Node) -> None:
        """Turns `seed`, which `node` reads along its last axis, and everything that has to turn with it."""
        self.turn(seed, Turn(), node)
        while self._pending:
            self._visit(self._pending.pop())

    @property
    def nodes(self) -> list[ir.Node]:
        """Nodes whose constants change."""
        using = (node for node, _ in self.uses)
        return list(dict.fromkeys([*self.readers, *self.writers, *self.norms, *self.scales, *using]))

    def object(self, node: ir.Node, reason: str) -> None:
        """Notes that `node` stands against the rotation."""
        if (node, reason) not in self.objections:
            self.objections.append((node, reason))

    def turn(self, value: ir.Value | None, turn: Turn, node: ir.Node) -> None:
        """Marks what `node` reads or puts out as turned."""
        if value is None or not value.name:
            return
        old = self.turns.get(value)
        if old is not None:
            if not agree(old, turn):
                self.object(node, f"{value.name!r} would have to turn in two different ways")
            return
        sizes = self.shapes.sizes(value)
        size = sizes[-1 - turn.after] if len(sizes) > turn.after else None
        if not isinstance(size, int) or size % self.block:
            self.object(node, f"the channels of {value.name!r} are not known to be a multiple of {self.block}")
        elif not turn.plain and size != self.block:  # factors are one a channel of a single block
            self.object(node, f"the channels of {value.name!r} are several times those that a norm scales")
        elif is_constant(value):
            self._turn_constant(value, turn, node)
        elif (value.is_graph_input() or value.is_graph_output()) and not self.cache:
            self.object(node, f"{value.name!r} is an {'input' if value.is_graph_input() else 'output'} of the graph")
        else:
            self.turns[value] = turn
            producer = value.producer()
            self._pending += users(value) if producer is None else [producer, *users(value)]

    def _turn_constant(self, value: ir.Value, turn: Turn, node: ir.Node) -> None:
        shape = constant_shape(value)
        if turn.open or shape is None:
            self.object(node, f"constant {value.name!r} joins the channels behind a gain")
            return
        for index, given in enumerate(node.inputs):
            if given is value:
                self.use(node, index, len(shape) - 1 - turn.after, turn.before, turn.window)

    def use(self, node: ir.Node, index: int, axis: int, gain: Array | None, window: tuple[int, int] | None) -> None:
        """Notes that constant input `index` of `node` has to turn along `axis`."""
        value = node.inputs[index]
        assert value is not None
        self.uses[node, index] = Use(node=node, index=index, value=value, axis=axis, gain=gain, window=window)

    def of(self, value: ir.Value | None) -> Turn | None:
        """How a value turns, or None."""
        return None if value is None else self.turns.get(value)

    def pass_on(self, node: ir.Node, source: ir.Value | None) -> bool:
        """The output turns as `source` does, and the other way round."""
        assert source is not None
        turn, out = self.turns.get(source), self.turns.get(node.outputs[0])
        if turn is not None:
            self.turn(node.outputs[0], turn, node)
        elif out is not None:
            self.turn(source, out, node)
        return turn is not None or out is not None

    def _visit(self, node: ir.Node) -> None:
        if not in_main_graph(self.model, node):
            self.object(node, f"{node.op_type} {node.name!r} in a subgraph reads the channels")
            return
        if node.op_type == "Shape":
            return
        rule = self.rules.get((node.domain.removeprefix("ai.onnx"), node.op_type))
        if rule is not None and rule(self, node):
            return
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"):
            self.object(node, "it is quantized already; rotate goes before quantization")
            return
        at = next((v.name for v in (*node.inputs, *node.outputs) if v is not None and v in self.turns), "")
        self.object(node, f"{node.op_type} {node.name!r} does not commute with a rotation of {at!r}")


Rule: TypeAlias = Callable[[Flow, ir.Node], bool]
"""Marks what has to turn with the turned values of a node; False if the node does not commute with a rotation."""
