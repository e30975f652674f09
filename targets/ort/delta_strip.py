"""Takes streaming ops away again, with the state that they carry, wherever they stand."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import bodies, redirect, users
from onnxcomp.ops import DELTA_OPS, DOMAIN
from onnxcomp.rewrite import IrPassAdapter
from onnxcomp.state import model_state, write_state
from onnxcomp.targets.ort.delta_cells import CELLS, restore_cell

_BEFORE_CARRIED = 2  # a Loop's inputs are the trip count and the condition, then what it carries


def strip(model: ir.Model) -> list[ir.Node]:
    """Makes every streaming op of a model what it was before: a GRU or LSTM, or nothing.

    Returns:
        The ops that were taken away.
    """
    found = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in DELTA_OPS]
    carried = _Carried(model)
    started: set[ir.Value] = set()
    for node in found:
        for value in node.outputs[-2:] if node.op_type in CELLS else node.outputs:
            carried.drop(value)
        if node.op_type in CELLS:
            restore_cell(model, node)
            continue
        source, flag = node.inputs[0], node.inputs[2]
        assert source is not None
        if flag is not None:
            started.add(flag)
        redirect(node.outputs[0], source, users(node.outputs[0]))
        _remove(node)
    for flag in started:
        if not users(flag):
            carried.forget(flag)
    carried.write()
    if found:
        IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
    called = {n.op_identifier() for n in model.graph.all_nodes()}
    for key in [k for k in model.functions if k[0] == DOMAIN and k[1] in DELTA_OPS and k not in called]:
        del model.functions[key]
    return found


class _Carried:
    """The state of a model, on its way through branches and bodies."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._owners = {g: n for n in model.graph.all_nodes() for g in bodies(n)}
        self._specs = {s.input: s for s in model_state(model)}

    def drop(self, value: ir.Value) -> None:
        """Takes the state off that `value` is the next value of."""
        graph = value.graph
        assert isinstance(graph, ir.Graph)
        out = value if value.is_graph_output() else _copy_of(value)
        if out is None:
            return
        if graph is self._model.graph:
            spec = next(s for s in self._specs.values() if s.output == out.name)
            self.forget(next(i for i in graph.inputs if i.name == spec.input))
            return
        owner = self._owners[graph]
        slot = next(i for i, o in enumerate(graph.outputs) if o is out)
        if owner.op_type == "If":
            for branch in bodies(owner):
                del branch.outputs[slot]
        else:
            del graph.outputs[slot]
            slot -= 1  # the condition comes first
            _cut(graph.inputs[_BEFORE_CARRIED + slot])
            del graph.inputs[_BEFORE_CARRIED + slot]
            _close_input(owner, _BEFORE_CARRIED + slot)
        self.drop(owner.outputs[slot])  # its own level first, then the slot goes
        _close_output(owner, slot)

    def forget(self, read: ir.Value) -> None:
        """Takes a state off the main graph."""
        graph = self._model.graph
        spec = self._specs.pop(str(read.name))
        graph.outputs.remove(next(o for o in graph.outputs if o.name == spec.output))
        _cut(read)
        graph.inputs.remove(read)

    def write(self) -> None:
        """Lists what is left."""
        write_state(self._model, self._specs.values())


def _cut(value: ir.Value) -> None:
    """Takes a value from those who read it, which are about to go."""
    for user in users(value):
        for place, given in enumerate(user.inputs):
            if given is value:
                user.replace_input_with(place, None)


def _copy_of(value: ir.Value) -> ir.Value | None:
    """The Identity of a value that its graph puts out."""
    for user in users(value):
        if user.op_type == "Identity" and user.outputs[0].is_graph_output() and user.graph is value.graph:
            return user.outputs[0]
    return None


def _close_output(node: ir.Node, slot: int) -> None:
    """Takes an unused output of a node away; those behind it move up."""
    outputs = node.outputs
    for index in range(slot, len(outputs) - 1):
        here, behind = outputs[index], outputs[index + 1]
        name = behind.name
        ir.convenience.replace_all_uses_with(behind, here, replace_graph_outputs=True)
        behind.name = None
        here.name, here.type, here.shape = name, behind.type, behind.shape
    node.resize_outputs(len(outputs) - 1)


def _close_input(node: ir.Node, slot: int) -> None:
    """Takes an input of a node away; those behind it move up."""
    for index in range(slot, len(node.inputs) - 1):
        node.replace_input_with(index, node.inputs[index + 1])
    node.resize_inputs(len(node.inputs) - 1)


def _remove(node: ir.Node) -> None:
    assert node.graph is not None
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
    node.graph.remove(node)
