"""Streaming state of values wherever they stand: in the main graph, in branches of an If, in the body of a Loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, bodies
from onnxcomp.errors import PassError
from onnxcomp.state import StateSpec, model_state, write_state

_BEFORE_CARRIED = 2  # a Loop's inputs are the trip count and the condition, then what it carries


@dataclass
class Slot:
    """One tensor of state: read in a graph, and set there.

    Attributes:
        read: The value that holds it in the graph it was asked for.
        spec: How it is listed.
        levels: The way from the main graph inwards: a node that owns a graph, that graph, what holds the state there,
            and for a Loop how many values it carries up to this one.
    """

    read: ir.Value
    spec: StateSpec
    levels: list[tuple[ir.Node, ir.Graph, ir.Value, int]] = field(default_factory=list)


class States:
    """Adds streaming state to a model.

    A branch of an If sees the values around it, so that state is read there as it is, and handed out of both branches;
    the branch that does not run keeps it. A Loop carries it from one iteration to the next.

    Args:
        model: The model.

    Attributes:
        all: Everything that is carried so far.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._owners = {graph: node for node in model.graph.all_nodes() for graph in bodies(node)}
        self._names = Editor(model)
        self.all = model_state(model)

    def is_main(self, graph: ir.Graph) -> bool:
        """Whether a graph is the main one."""
        return graph is self._model.graph

    def why_not(self, graph: ir.Graph) -> str:
        """Why values of a graph cannot have state; empty if they can."""
        while graph is not self._model.graph:
            owner = self._owners.get(graph)
            if owner is None:
                return "it stands in a function; the pass cleanup may write functions out"
            if owner.op_type not in ("If", "Loop") or owner.domain not in ("", "ai.onnx"):
                return f"it stands in the body of a {owner.op_type}, which takes no state"
            assert isinstance(owner.graph, ir.Graph)
            graph = owner.graph
        return ""

    def add(self, graph: ir.Graph, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> Slot:
        """Adds a graph input for state that is read in `graph`; `put` has to follow, for several in the same order."""
        kind = ir.TensorType(dtype)
        value = ir.Value(name=self._names.free(f"{name}_in"), type=kind, shape=ir.Shape(shape))
        self._model.graph.inputs.append(value)
        output = self._names.free(f"{name}_out")
        spec = StateSpec(input=str(value.name), output=output, shape=list(shape), dtype=str(dtype.numpy()))
        slot = Slot(value, spec)
        for owner, inner in reversed(self._path(graph)):
            if owner.op_type == "Loop":
                owner.resize_inputs(len(owner.inputs) + 1)
                owner.replace_input_with(len(owner.inputs) - 1, slot.read)
                slot.read = ir.Value(name=self._names.free(f"{name}_carried"), type=kind, shape=ir.Shape(shape))
                inner.inputs.append(slot.read)
            slot.levels.append((owner, inner, slot.read, len(owner.inputs) - _BEFORE_CARRIED))
        return slot

    def put(self, slot: Slot, value: ir.Value) -> None:
        """Makes `value`, of the graph that the slot is read in, the state's next value."""
        for owner, inner, read, carried in reversed(slot.levels):
            value = self._hand_out(owner, inner, read, value, carried)
        graph = self._model.graph
        if value.producer() is None or value.is_graph_output():
            value = self._copy(graph, value)
        value.name = slot.spec.output
        graph.outputs.append(value)
        self.all = (*self.all, slot.spec)
        write_state(self._model, self.all)

    def show(self, graph: ir.Graph, value: ir.Value) -> tuple[str, int]:
        """Makes a value of any graph an output of the model, to look at it.

        Returns:
            Name of the output, and how many axes were put before it, each for the iterations of a Loop.
        """
        stacked = 0
        for owner, inner in self._path(graph):
            if value.producer() is None or value.is_graph_output():
                value = self._copy(inner, value)
            owner.resize_outputs(len(owner.outputs) + 1)
            out = owner.outputs[-1]
            out.name = self._names.free(f"{value.name}_of_{owner.op_type}")
            inner.outputs.append(value)
            if owner.op_type == "Loop":
                stacked += 1
            else:
                for branch in bodies(owner):
                    if branch is not inner:
                        branch.outputs.append(self._nothing(branch, value.dtype))
            value = out
        if value.is_graph_output() or value.producer() is None:
            value = self._copy(self._model.graph, value)
        self._model.graph.outputs.append(value)
        return str(value.name), stacked

    def _nothing(self, graph: ir.Graph, dtype: ir.DataType | None) -> ir.Value:
        dtype = ir.DataType.FLOAT if dtype is None else dtype
        output = ir.Value(name=self._names.free("nothing"), type=ir.TensorType(dtype), shape=ir.Shape([0]))
        empty = ir.tensor(np.zeros(0, dtype.numpy()))
        node = ir.node("Constant", [], {"value": empty}, outputs=[output], name=self._names.free_node("nothing"))
        graph.append(node)
        return output

    def _hand_out(self, owner: ir.Node, inner: ir.Graph, read: ir.Value, value: ir.Value, carried: int) -> ir.Value:
        """Puts a value out of a branch or body; returns the owner's output."""
        if value.producer() is None or value.is_graph_output():
            value = self._copy(inner, value)
        count = len(owner.outputs)
        owner.resize_outputs(count + 1)
        out = owner.outputs[count]
        out.name = self._names.free(f"{value.name}_of_{owner.op_type}")
        if owner.op_type == "If":
            inner.outputs.append(value)
            for branch in bodies(owner):
                if branch is not inner:
                    branch.outputs.append(self._copy(branch, read))
        else:
            inner.outputs.insert(carried, value)  # behind the condition and the others that are carried
            out = _move_before_scans(owner, carried - 1)
        out.shape, out.type = value.shape, value.type
        return out

    def _copy(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        output = ir.Value(name=self._names.free(f"{value.name}_kept"), type=value.type, shape=value.shape)
        graph.append(ir.node("Identity", [value], outputs=[output], name=self._names.free_node("keep_state")))
        return output

    def _path(self, graph: ir.Graph) -> list[tuple[ir.Node, ir.Graph]]:
        """Owners and their graphs from `graph` outwards."""
        found: list[tuple[ir.Node, ir.Graph]] = []
        while graph is not self._model.graph:
            if reason := self.why_not(graph):
                raise PassError(reason)
            owner = self._owners[graph]
            found.append((owner, graph))
            assert isinstance(owner.graph, ir.Graph)
            graph = owner.graph
        return found


def _move_before_scans(loop: ir.Node, place: int) -> ir.Value:
    """Moves the last output of a Loop to `place`, those from there on back by one; returns the value there."""
    outputs = loop.outputs
    spare = outputs[-1]
    name = spare.name
    for index in range(len(outputs) - 1, place, -1):
        before, after = outputs[index - 1], outputs[index]
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
        after.name, after.type, after.shape = before.name, before.type, before.shape
    outputs[place].name = name
    return outputs[place]
