"""Graph surgery on `onnx_ir`. Its sharp edges are handled here and nowhere else.

* `onnx_ir.tape.Tape(graph)` appends at the end of the graph; here nodes are placed where their inputs exist.
* Values have to have unique names, across the graph, for the model to be valid once saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import GraphError
from onnxcomp.select import SCOPES
from onnxcomp.skeleton import release
from onnxcomp.target import Array


class Editor:
    """Adds nodes and weights to one graph under names that are not taken.

    Args:
        model: The model.
        graph: The graph to edit; the main graph by default.
    """

    def __init__(self, model: ir.Model, graph: ir.Graph | None = None) -> None:
        self.model = model
        self.graph = model.graph if graph is None else graph
        self._values = {v.name for v in _values(model.graph)}
        self._nodes = {n.name for n in model.graph.all_nodes()}

    def free(self, name: str) -> str:
        """A name for a value that no other has, taken from now on."""
        return _unique(name, self._values)

    def free_node(self, name: str) -> str:
        """A name for a node that no other has, taken from now on."""
        return _unique(name, self._nodes)

    def weight(self, name: str, array: Array) -> ir.Value:
        """Registers an initializer; its name is made unique."""
        name = _unique(name, self._values)
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        value.shape = ir.Shape(array.shape)
        value.dtype = ir.DataType.from_numpy(array.dtype)
        self.graph.register_initializer(value)
        return value

    def before(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Inserts a node with one output before `anchor`.

        Args:
            anchor: Node of the edited graph.
            op_type: Op type in the default domain.
            inputs: Its inputs.
            name: Wish for the name of the node and its output.
            attributes: Its attributes.
            like: Value whose shape and type the output has.
            dtype: Element type of the output where it is not that of `like`.

        Returns:
            The output.
        """
        node = self._node(op_type, inputs, name, attributes, like, dtype)
        _inherit(node, anchor)
        self.graph.insert_before(anchor, node)
        return node.outputs[0]

    def after(
        self,
        value: ir.Value,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *,
        name: str,
        attributes: Mapping[str, Any] | None = None,
        like: ir.Value | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Inserts a node with one output right after the producer of `value`, or first if it is an input or weight."""
        node = self._node(op_type, inputs, name, attributes, like, dtype)
        producer = value.producer()
        if producer is None:
            first = next(iter(self.graph), None)
            if first is None:
                self.graph.append(node)
            else:
                self.graph.insert_before(first, node)
        else:
            _inherit(node, producer)
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def add_behind(self, output: ir.Value, bias: ir.Value) -> None:
        """Adds `bias` to a value for all who read it; the sum takes over its name."""
        readers, is_output = users(output), output.is_graph_output()
        total = self.after(output, "Add", [output, bias], name=f"{output.name}_biased", like=output)
        redirect(output, total, readers)
        if is_output:
            replace_output(output, total)
        else:
            total.name, output.name = output.name, total.name

    def rename(self, value: ir.Value, suffix: str) -> None:
        """Gives a value that no longer holds what it did a new name, so that nobody compares it with the original."""
        if not value.is_graph_output() and not value.is_graph_input():
            value.name = _unique(f"{value.name}_{suffix}", self._values)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None,
        like: ir.Value | None,
        dtype: ir.DataType | None,
    ) -> ir.Node:
        output = ir.Value(name=_unique(name, self._values))
        if like is not None:
            output.shape = like.shape
            kind = dtype if dtype is not None else like.dtype
            if kind is not None:
                output.dtype = kind
        return ir.node(op_type, inputs, attributes, outputs=[output], name=_unique(name, self._nodes))


def _inherit(node: ir.Node, source: ir.Node) -> None:
    """Keeps the PyTorch module path, so that selectors find the node; other notes would only add bytes."""
    if (scopes := source.metadata_props.get(SCOPES)) is not None:
        node.metadata_props[SCOPES] = scopes


def _unique(name: str, taken: set[str | None]) -> str:
    candidate, number = name, 0
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    taken.add(candidate)
    return candidate


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    for owner in (graph, *graph.subgraphs()):
        yield from owner.inputs
        yield from owner.initializers.values()
        for node in owner:
            yield from node.outputs


def redirect(value: ir.Value, replacement: ir.Value, users: Sequence[ir.Node]) -> None:
    """Makes the given users of `value` read `replacement`."""
    for user in users:
        for index, given in enumerate(user.inputs):
            if given is value:
                user.replace_input_with(index, replacement)


def bypass(node: ir.Node, source: ir.Value | None = None, *, rename: bool = False) -> None:
    """Removes a node with one output by wiring one of its inputs to its users; a graph output keeps its name.

    Args:
        node: The node.
        source: The input to wire through, the first one by default.
        rename: Gives `source` the name of the output, since from now on it holds what the output held.

    Raises:
        GraphError: If the node's output is a graph output and its input a graph input or weight, or another output.
    """
    source = node.inputs[0] if source is None else source
    output = node.outputs[0]
    if source is None:
        raise GraphError(f"node {node.name!r} has no input to wire through")
    is_output = output.is_graph_output()
    if is_output and (source.producer() is None or source.is_graph_output()):
        raise GraphError(f"node {node.name!r} stands between an input and an output of the graph")
    name = output.name
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=is_output)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
    if is_output or rename:
        source.name = name
        source.type = output.type if source.type is None else source.type  # a graph output has to have one
        source.shape = output.shape if source.shape is None else source.shape


def replace_output(value: ir.Value, replacement: ir.Value) -> None:
    """Makes `replacement` the graph output in place of `value`; it takes over the name, which users rely on."""
    graph = value.graph
    assert isinstance(graph, ir.Graph)
    name = value.name
    taken = {v.name for v in _values(graph)}
    value.name, replacement.name = _unique(f"{name}_float", taken), name
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = replacement


def hand_over(value: ir.Value, replacement: ir.Value) -> None:
    """Gives all who read a value a replacement, the graph's outputs included; one of these keeps its name."""
    is_output, name = value.is_graph_output(), value.name
    ir.convenience.replace_all_uses_with(value, replacement, replace_graph_outputs=is_output)
    if is_output:
        value.name, replacement.name = None, name


def bodies(node: ir.Node) -> list[ir.Graph]:
    """Graphs that a node holds: the branches of an If, the body of a Loop."""
    return [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]


def become(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int] | None = None,
    domain: str = "",
) -> None:
    """Makes `node` another op in place: its name, its outputs and what is noted at them stay, its attributes go."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node.op_type, node.domain = op_type, domain
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for name, number in (attributes or {}).items():
        node.attributes[name] = ir.AttrInt64(name, number)


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node, or None if `value` is not constant.

    An external weight is read from disk and its mapping released, so that memory stays flat over a sweep of weights.
    """
    if value is None or (value.is_graph_input() and value.is_initializer()):
        return None  # an initializer that is an input too may be overridden by the caller
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    array = tensor.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        array = np.array(array)
        release(tensor)
    return array


@contextmanager
def defaults_hidden(model: ir.Model) -> Iterator[None]:
    """Takes the default values of graph inputs away meanwhile: a caller may override them, so they are no constants."""
    graph = model.graph
    defaults = [(v, v.const_value) for v in graph.inputs if v.is_initializer() and v.const_value is not None]
    try:
        for value, _ in defaults:
            graph.initializers.pop(str(value.name))
            value.const_value = None
        yield
    finally:
        for value, tensor in defaults:
            value.const_value = tensor
            graph.register_initializer(value)


def users(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once, those in subgraphs included."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def sole_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, in the same graph; None if there are more or the graph puts it out."""
    readers = users(value)
    if len(readers) != 1 or value.is_graph_output() or readers[0].graph is not value.graph:
        return None
    return readers[0]


def in_main_graph(model: ir.Model, node: ir.Node) -> bool:
    """Whether `node` stands in the main graph and not in a subgraph or function."""
    return node.graph is model.graph


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of an attribute, or `default` if it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value
