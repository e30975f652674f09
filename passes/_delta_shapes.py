"""Shapes of values, found by a run where inference does not tell them, as inside the branches of exported models."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxcomp.errors import OnnxcompError
from onnxcomp.passes._delta_scopes import States
from onnxcomp.rewrite import Context

Shapes = dict[ir.Value, tuple[tuple[int, ...], ir.DataType]]


def find_shapes(model: ir.Model, values: Iterable[ir.Value], context: Context) -> Shapes:
    """Shape and type of every value that inference or the sample feed tells; of branches only those that it takes."""
    found: Shapes = {}
    unknown: list[ir.Value] = []
    for value in values:
        shape = static_shape(value)
        if shape is None or value.dtype is None:
            unknown.append(value)
        else:
            found[value] = shape, value.dtype
    if unknown and context.runner is not None and context.sample is not None:
        found |= _run(model, unknown, context)
    return found


def static_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Shape of a value, None unless all of it is known."""
    if value.shape is None or not all(isinstance(d, int) and d >= 0 for d in value.shape):
        return None
    return tuple(int(d) for d in value.shape if isinstance(d, int))


def show_all(model: ir.Model, values: Iterable[ir.Value]) -> tuple[ir.Model, dict[ir.Value, tuple[str, int]]]:
    """A model that puts values of any of its graphs out.

    Returns:
        The model, a copy unless all values stand in the main graph; and for every value that can be shown its name
        there, and how many axes stand before its own.
    """
    wanted = list(values)
    if all(v.graph is model.graph for v in wanted):
        return model, {v: (str(v.name), 0) for v in wanted}
    probe = model.clone()
    copies = {
        v.name: v
        for graph in (probe.graph, *probe.graph.subgraphs())
        for v in (*graph.inputs, *(o for n in graph for o in n.outputs))
    }
    states = States(probe)
    shown = {}
    for value in wanted:
        copy = copies[value.name]
        graph = copy.graph
        if isinstance(graph, ir.Graph) and not states.why_not(graph):
            shown[value] = states.show(graph, copy)
    return probe, shown


def _run(model: ir.Model, values: list[ir.Value], context: Context) -> Shapes:
    probe, shown = show_all(model, values)
    try:
        results = context.run_sample(probe, [name for name, _ in shown.values()])
    except OnnxcompError:
        return {}
    found: Shapes = {}
    for value, (name, stacked) in shown.items():
        array = results[name]
        shape = tuple(array.shape[stacked:])
        if all(shape) and len(array.shape) > stacked:
            found[value] = shape, ir.DataType.from_numpy(array.dtype)
    return found
