"""GRU and LSTM nodes of one step as cells that multiply only what changed."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, hand_over, users
from onnxcomp.ops import DELTA_OPS, DOMAIN
from onnxcomp.passes._delta_holds import Holds, Place
from onnxcomp.passes._delta_shapes import Shapes
from onnxcomp.passes._delta_sites import is_constant

_ACTIVATIONS = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
_GATES = {"GRU": 3, "LSTM": 4}
_PEEPHOLES, _LENGTHS, _INITIAL_H, _INITIAL_C = 7, 4, 5, 6


def cell_values(node: ir.Node) -> list[ir.Value]:
    """The input of a cell, and its hidden values as it puts them out."""
    hidden = next((v for v in (*node.outputs[1:2], *node.outputs[:1]) if v.name), None)
    return [v for v in (node.inputs[0], hidden) if v is not None]


def cell_inputs(node: ir.Node) -> list[ir.Value]:
    """Values whose shapes `stream_cell` has to be told."""
    return [v for v in (node.inputs[0], _given(node, _INITIAL_H)) if v is not None]


def why_not_cell(node: ir.Node, shapes: Shapes) -> str:
    """Why a recurrent node cannot become a cell; empty if it can."""
    x, h = node.inputs[0], _given(node, _INITIAL_H)
    if x is None or x not in shapes:
        return "the shape of its input is not known; give --data, or fix the shapes of the model's inputs"
    shape = shapes[x][0]
    if attribute(node, "direction", "forward") != "forward" or attribute(node, "layout", 0):
        return "it runs backwards or puts the batch first"
    if shape[0] != 1:
        return f"it runs {shape[0]} steps at once; a stream gives it one at a time"
    if h is None or (node.op_type == "LSTM" and _given(node, _INITIAL_C) is None):
        return "it starts anew in every step, without hidden values from the last one"
    if node.op_type == "GRU" and not attribute(node, "linear_before_reset", 0):
        return "it resets hidden values before they are multiplied (linear_before_reset = 0), so that all may change"
    names = list(attribute(node, "activations", _ACTIVATIONS[node.op_type]))
    if names != _ACTIVATIONS[node.op_type] or attribute(node, "clip") is not None or attribute(node, "input_forget", 0):
        return "it has other activations than sigmoid and tanh"
    if _given(node, _PEEPHOLES) is not None or _given(node, _LENGTHS) is not None:
        return "it has peepholes or sequence lengths"
    if not all(is_constant(v) for v in node.inputs[1:4] if v is not None):
        return "its weights are computed"
    return ""


def stream_cell(node: ir.Node, holds: Holds, shapes: Shapes, level: float) -> None:
    """Replaces a recurrent node that `why_not_cell` has nothing against.

    Args:
        node: The node.
        holds: Where held values are added.
        shapes: Of its inputs.
        level: Threshold of its inputs and hidden values.
    """
    graph, model = node.graph, holds.model
    assert isinstance(graph, ir.Graph)
    x, w, r = node.inputs[0], node.inputs[1], node.inputs[2]
    h, c = _given(node, _INITIAL_H), _given(node, _INITIAL_C)
    assert x is not None and h is not None  # noqa: PT018
    shape, dtype = shapes[x]
    hidden = (1, shape[1], int(attribute(node, "hidden_size")))
    name = node.name or node.op_type
    bias = _given(node, 3)
    if bias is None:
        bias = holds.editor.weight(f"{name}_bias", np.zeros((1, 2 * _GATES[node.op_type] * hidden[2]), dtype.numpy()))
    sources = [v.name for v in cell_values(node)]
    op = DELTA_OPS[f"Delta{node.op_type}"]
    op.install(model)
    slots = [
        holds.states.add(graph, f"{name}_{side}_sent", size, dtype) for side, size in (("x", shape), ("h", hidden))
    ]
    limits = [holds.threshold(f"{name}_{side}_threshold", level, dtype) for side in "xh"]
    cells = [] if c is None else [c]
    new = [("h", hidden), *[("c", hidden)] * len(cells), ("x_held", shape), ("h_held", hidden)]
    outputs = [_value(holds, f"{name}_{what}", size, dtype) for what, size in new]
    inputs = [x, h, *cells, *(s.read for s in slots), *limits, w, r, bias]
    cell = ir.node(op.name, inputs, domain=DOMAIN, outputs=outputs, name=holds.editor.free_node(f"{name}_delta"))
    cell.metadata_props.update(node.metadata_props)
    graph.insert_after(node, cell)
    _replace(holds, node, cell)
    for slot, held, limit, source, weight in zip(slots, outputs[-2:], limits, sources, (w, r), strict=True):
        holds.states.put(slot, held)
        cost = 0 if weight is None or weight.shape is None else math.prod(weight.shape.numpy())
        holds.places.append(
            Place(node=cell, reader=cell, slot=slot, threshold=limit, pixels=False, source=source, cost=cost)
        )


def _replace(holds: Holds, node: ir.Node, cell: ir.Node) -> None:
    """Hands what the cell puts out to those who read the node."""
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    editor = holds.editor if graph is holds.model.graph else Editor(holds.model, graph)
    every = node.outputs[0]
    if users(every) or every.is_graph_output():  # of all steps, which here is one: [1, 1, B, H]
        axis = holds.editor.weight(f"{node.name}_axis", np.array([0], np.int64))
        steps = editor.after(cell.outputs[0], "Unsqueeze", [cell.outputs[0], axis], name=f"{node.name}_all")
        steps.type, steps.shape = cell.outputs[0].type, ir.Shape([1, *(cell.outputs[0].shape or ())])
        hand_over(every, steps)
    for old, new in zip(node.outputs[1:], cell.outputs, strict=False):
        hand_over(old, new)
    graph.remove(node, safe=True)


def _value(holds: Holds, name: str, shape: tuple[int, ...], dtype: ir.DataType) -> ir.Value:
    value = ir.Value(name=holds.editor.free(name))
    value.shape, value.dtype = ir.Shape(shape), dtype
    return value


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
