"""Takes one token out before the last layers compute all of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, users
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select

_UNARY = frozenset(
    {
        "Abs",
        "Cast",
        "Clip",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Neg",
        "Reciprocal",
        "Relu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Sqrt",
        "Tanh",
    }
)
_BINARY = frozenset({"Add", "Div", "Mul", "Pow", "Sub"})
_NORMS = frozenset({"LayerNormalization", "RMSNormalization"})


def take_rows_early(model: ir.Model, where: Select) -> list[Edit]:
    """Moves a Gather of one position, such as a class token, up through the ops that treat positions apart.

    What the last layers of a vision transformer compute of all other tokens is not used. Ops whose outputs anything
    else reads stay as they are.
    """
    editor = Editor(model)
    gathers = [n for n in model.graph if n.op_type == "Gather" and n.domain == "" and where(n)]
    return [edit for node in gathers if (edit := _move(editor, node)) is not None]


def _move(editor: Editor, gather: ir.Node) -> Edit | None:
    source, index = gather.inputs[0], constant(gather.inputs[1])
    if source is None or source.shape is None or not len(source.shape) or index is None or index.size != 1:
        return None
    axis = int(attribute(gather, "axis", 0)) % len(source.shape)
    if source.shape[axis] == 1:
        return None
    passed = _passed(gather, source, axis)
    if not any(node.op_type == "MatMul" or node.op_type in _NORMS for node in passed):
        return None
    position = editor.weight(f"{gather.name}_position", index.reshape(1).astype(np.int64))
    taken: dict[ir.Value, ir.Value] = {}
    for node in [n for n in editor.graph if n in passed]:
        for place, value in enumerate(node.inputs):
            if value is None or value.producer() in passed or not _has_positions(node, place, axis):
                continue
            if value not in taken:
                at = axis - len(node.outputs[0].shape or ()) + len(value.shape or ())
                taken[value] = editor.before(
                    node, "Gather", [value, position], name=f"{value.name}_taken", attributes={"axis": at}
                )
                _one_position(taken[value], value, at)
            node.replace_input_with(place, taken[value])
        _one_position(node.outputs[0], node.outputs[0], axis)
    gather.replace_input_with(1, editor.weight(f"{gather.name}_only", np.zeros(index.shape, np.int64)))
    return applied(gather, f"one position is taken before {len(passed)} ops instead of after")


def _passed(gather: ir.Node, source: ir.Value, axis: int) -> set[ir.Node]:
    """Ops between which and the Gather nothing reads more than the one position, from the Gather up.

    Their outputs have as many dimensions as what the Gather reads: in one that is broadcast the axis is another.
    """
    passed: set[ir.Node] = set()
    waiting = [source]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if (
            node is None
            or node in passed
            or value is not node.outputs[0]
            or value.shape is None
            or len(value.shape) != len(source.shape or ())
            or node.graph is not gather.graph
            or any(output.is_graph_output() or (users(output) and output is not value) for output in node.outputs)
            or any(user is not gather and user not in passed for user in users(value))
            or not _treats_positions_apart(node, axis)
        ):
            continue
        passed.add(node)
        waiting += [v for v in node.inputs if v is not None]
    return passed


def _treats_positions_apart(node: ir.Node, axis: int) -> bool:
    output, first = node.outputs[0].shape, None if node.inputs[0] is None else node.inputs[0].shape
    if node.domain != "" or output is None or first is None:
        return False
    rank = len(output)
    if node.op_type in _BINARY:
        shapes = [None if value is None else value.shape for value in node.inputs]
        return all(
            shape is not None and (axis < rank - len(shape) or shape[axis - rank + len(shape)] in (1, output[axis]))
            for shape in shapes
        ) and _known(output[axis])
    if len(first) != rank:
        return False
    if node.op_type in _NORMS:
        return int(attribute(node, "axis", -1)) % rank > axis
    if node.op_type == "MatMul":
        matrix = node.inputs[1]
        return axis < rank - 1 and matrix is not None and matrix.shape is not None and len(matrix.shape) == 2
    return node.op_type in _UNARY


def _known(size: int | ir.SymbolicDim) -> bool:
    return isinstance(size, int) or size.value is not None


def _has_positions(node: ir.Node, place: int, axis: int) -> bool:
    """Whether an input of the op has the axis, in more than one position."""
    if node.op_type not in _BINARY:
        return place == 0
    value, output = node.inputs[place], node.outputs[0]
    assert value is not None
    assert value.shape is not None
    assert output.shape is not None
    at = axis - len(output.shape) + len(value.shape)
    return at >= 0 and value.shape[at] != 1


def _one_position(value: ir.Value, like: ir.Value, axis: int) -> None:
    assert like.shape is not None
    value.type = like.type
    value.shape = ir.Shape([1 if i == axis else size for i, size in enumerate(like.shape)])
