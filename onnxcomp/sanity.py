"""Brings a graph that was just read into the form that everything else relies on, or refuses it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxcomp.errors import GraphError
from onnxcomp.skeleton import skeleton

_CONSTANTS = frozenset(
    {"value", "value_float", "value_floats", "value_int", "value_ints", "value_string", "value_strings", "sparse_value"}
)
_IR_WITH_DEFAULTS = 4
"""IR version from which on a weight need not be an input, and one that is an input is a default value."""


def make_sane(model: ir.Model, where: str) -> None:
    """Modernises and sorts a model in place.

    Weights that old files list as inputs as well are no inputs any more; sizes of -1 become unknown; the domain
    `ai.onnx` gets its usual, empty name; nodes stand behind those that they read from.

    Args:
        model: As it was read.
        where: What messages call it.

    Raises:
        GraphError: If the graph has no outputs, nodes form a cycle or read what nobody computes, a tensor has no type
            or not the data of its shape, a Constant has no value, or something in it cannot be written again.
    """
    if not model.graph.outputs:
        raise GraphError(f"{where} is not an ONNX model: it has no graph with outputs (an empty or foreign file?)")
    _modernise(model)
    _check_defined(model.graph, (), where)
    for function in model.functions.values():
        _check_defined(function, (), where)
    _sort(model, where)
    for tensor in _tensors(model):
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise GraphError(f"{where} is not a valid ONNX model: tensor {tensor.name!r} has no element type")
        if isinstance(tensor, ir.TensorProtoTensor):
            _check_size(tensor, where)
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and not node.domain and not _CONSTANTS & set(node.attributes):
            name = node.name or (node.outputs[0].name if node.outputs else "")
            raise GraphError(f"{where} is not a valid ONNX model: the Constant {name!r} has no value")
    try:
        skeleton(model)
    except Exception as error:  # onnx_ir raises many kinds for malformed graphs
        raise GraphError(f"{where} is not a valid ONNX model: {_reason(error)}") from error


def _modernise(model: ir.Model) -> None:
    imports = model.opset_imports
    if "ai.onnx" in imports:
        imports[""] = max(imports.pop("ai.onnx"), imports.get("", 1))
    if model.ir_version < _IR_WITH_DEFAULTS:
        inputs = [v for v in model.graph.inputs if not v.is_initializer()]
        model.graph.inputs.clear()
        model.graph.inputs.extend(inputs)
        model.ir_version = _IR_WITH_DEFAULTS
    for value in (*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)):
        if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
            value.shape = ir.Shape([None if isinstance(d, int) and d < 0 else d for d in value.shape])


def _check_defined(graph: ir.Graph | ir.Function, outer: Sequence[set[ir.Value]], where: str) -> None:
    """Every value that is read is an input, a weight or an output of a node, here or in a graph around this one."""
    own = set(graph.inputs)
    if isinstance(graph, ir.Graph):
        own.update(graph.initializers.values())
    own.update(v for node in graph for v in node.outputs)
    scopes = (*outer, own)

    def check(value: ir.Value | None, reader: str) -> None:
        if value is not None and not any(value in scope for scope in scopes):
            raise GraphError(
                f"{where} is not a valid ONNX model: {reader} reads {value.name!r}, which is no input, weight "
                "or output of a node"
            )

    for node in graph:
        for value in node.inputs:
            check(value, f"{node.op_type} node {node.name or node.outputs[0].name!r}" if node.outputs else node.op_type)
        for body in _bodies(node):
            _check_defined(body, scopes, where)
    for value in graph.outputs:
        check(value, "an output of the graph")


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (v.const_value for v in graph.initializers.values() if v.const_value is not None)
    nodes = (n for function in model.functions.values() for n in function.all_nodes())
    for node in (*model.graph.all_nodes(), *nodes):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.value


def _check_size(tensor: ir.TensorProtoTensor, where: str) -> None:
    """There is as much data as the shape says; a damaged file has less, which only a read of the array would tell."""
    message = f"{where} is not a valid ONNX model: tensor {tensor.name!r} cannot be read: "
    found = len(tensor.raw.raw_data) if tensor.raw.HasField("raw_data") else None
    try:
        if found is None:
            tensor.numpy()
        needed = tensor.nbytes
    except (ValueError, TypeError) as error:
        raise GraphError(message + _reason(error)) from error
    if found not in (None, needed):
        raise GraphError(f"{message}its shape {list(tensor.shape)} takes {needed} bytes, not {found}")


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _sort(model: ir.Model, where: str) -> None:
    """Runtimes load nodes in any order, and some tools write one."""
    if all(_is_sorted(graph) for graph in (model.graph, *model.graph.subgraphs())):
        return
    try:
        model.graph.sort()
    except ValueError as error:
        raise GraphError(f"{where} is not a valid ONNX model: its nodes form a cycle") from error


def _is_sorted(graph: ir.Graph) -> bool:
    seen: set[ir.Node] = set()
    for node in graph:
        producers = [
            v.producer() for body in _bodies(node) for n in body.all_nodes() for v in n.inputs if v is not None
        ]
        producers += [v.producer() for v in node.inputs if v is not None]
        if any(p is not None and p.graph is graph and p not in seen for p in producers):
            return False
        seen.add(node)
    return True


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
