"""Follows an activation back to the linear layer whose output channels arrive at it, in whatever order or layout.

Which channel arrives where, through splits, reshapes and transposes of any exporter, is read off runs of the model in
which the layer puts out nothing but the numbers of its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, users
from onnxcomp.errors import CalibrationError
from onnxcomp.rewrite import Context
from onnxcomp.target import Array

_LAYOUT = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Tile"})
_PARTS = frozenset({"Split", "Slice", "Gather"})


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear layer whose output channels are the channels of an activation.

    Attributes:
        value: The activation.
        arrival: Value that tells which channel is which: `value`, or one before elementwise ops that lead to it.
        projected: Output of the layer, bias included.
        path: Values that change with the channels in question and with these only, from the activation back.
        attention: Attention weights stand between the two, so that a constant passes unchanged and not only a scale.
        watched: Values that must not change with these channels: what else the layer's output leads to.
    """

    value: ir.Value
    arrival: ir.Value
    projected: ir.Value
    path: tuple[ir.Value, ...]
    attention: bool
    watched: tuple[ir.Value, ...]

    @property
    def size(self) -> int:
        """Number of output channels of the layer."""
        found = _channels(self.projected)
        assert found is not None
        return found


def find_projection(value: ir.Value, through: frozenset[str] = frozenset()) -> Projection | None:
    """The linear layer whose channels arrive at `value`, or None.

    Args:
        value: The activation.
        through: Elementwise ops that the caller can pass, e.g. `Relu` and `Mul` for a positive scale.
    """
    return _trace(value, (), value, through, attention=False, whole=True)


def arriving_channels(model: ir.Model, context: Context, found: Sequence[Projection]) -> list[Array | None]:
    """For each channel of the activations, its number among the output channels of the layer.

    A second run in which only these channels are not zero shows that nothing else depends on them.

    Returns:
        One int64 array `(channels,)` a projection; None where other things depend on these channels, where a channel is
        a mixture of several, or where the model cannot be run.
    """
    if not found:
        return []
    first: dict[ir.Value, Projection] = {}
    for projection in found:
        first.setdefault(projection.projected, projection)
    try:
        numbers = _probe(model, context, found, [np.arange(p.size) for p in found])
        channels = [
            np.arange(p.size) if p.arrival is p.projected else _channel_numbers(numbers[p.arrival.name or ""], p.size)
            for p in found
        ]
        only = [_only(p.size, c) for p, c in zip(found, channels, strict=True)]
        with_channels = _probe(model, context, found, only)
        without = _probe(model, context, found, [np.zeros_like(o) for o in only])
    except CalibrationError:
        return [None] * len(found)
    return [
        c
        if c is not None
        and first[p.projected] is p  # the outputs of a layer were set for its first activation alone
        and all(np.array_equal(with_channels[w.name], without[w.name]) for w in p.watched if w.name)
        else None
        for p, c in zip(found, channels, strict=True)
    ]


def _trace(
    value: ir.Value,
    path: tuple[ir.Value, ...],
    origin: ir.Value,
    through: frozenset[str],
    *,
    attention: bool,
    whole: bool,
) -> Projection | None:
    """Goes back from `value`; `whole` says that no op behind it has taken a part of a tensor."""
    if whole and not read_once(value):
        return None
    start = path[0] if path else value
    node = value.producer()
    layer = _channels(value) is not None
    path = (*path, value) if whole or layer else path
    if node is None or node.domain not in ("", "ai.onnx") or (len(node.outputs) > 1 and node.op_type != "Split"):
        return None
    if layer:
        watched = _watched(value, path)
        return None if watched is None else Projection(
            value=start, arrival=origin, projected=value, path=path, attention=attention, watched=watched
        )  # fmt: skip
    if node.op_type in _LAYOUT:
        return _back(node, 0, path, origin, through, attention=attention, whole=whole)
    if node.op_type in _PARTS:
        return _back(node, 0, path, origin, through, attention=attention, whole=False)
    if not whole or attention:
        return None
    weights = _attention_values(node)
    if weights is not None:
        return _back(node, weights, path, origin, frozenset(), attention=True, whole=True)
    if node.op_type not in through or origin is not value:
        return None
    for index in range(len(node.inputs) if node.op_type == "Mul" else 1):
        source = node.inputs[index]
        if source is None or constant(source) is not None:
            continue
        found = _trace(source, path, source, through, attention=False, whole=True)
        if found is not None:
            return found
    return None


def _back(
    node: ir.Node,
    index: int,
    path: tuple[ir.Value, ...],
    origin: ir.Value,
    through: frozenset[str],
    *,
    attention: bool,
    whole: bool,
) -> Projection | None:
    source = node.inputs[index]
    return None if source is None else _trace(source, path, origin, through, attention=attention, whole=whole)


def _attention_values(node: ir.Node) -> int | None:
    """Index of the input of `node` that is weighted by attention, whose weights sum to one."""
    if node.op_type == "MatMul" and node.inputs[0] is not None:
        softmax = node.inputs[0].producer()
        return 1 if softmax is not None and softmax.op_type == "Softmax" and _over_last_axis(softmax) else None
    return 2 if node.op_type == "Attention" and len(node.inputs) >= 3 else None


def _channels(value: ir.Value) -> int | None:
    """Number of channels if a linear layer puts out `value`, bias included; the weight may be quantized."""
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Add":
        inner = next((v for v in node.inputs if v is not None and _is_matmul(v)), None)
        bias = next((v for v in node.inputs if v is not inner), None)
        size = None if inner is None else _channels(inner)
        return size if size is not None and _shape(bias) == (size,) else None
    if node.op_type not in ("MatMul", "Gemm"):
        return None
    shape = _shape(node.inputs[1])
    if shape is None or len(shape) != 2:
        return None
    return shape[0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1]


def _is_matmul(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "MatMul" and len(users(value)) == 1 and not value.is_graph_output()


def _shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Shape of a constant, or of a constant that is dequantized."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "DequantizeLinear":
        value = node.inputs[0]
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(tensor.shape.numpy())


def _watched(projected: ir.Value, path: tuple[ir.Value, ...]) -> tuple[ir.Value, ...] | None:
    """Values behind `projected` that other ops read, those on the path left out; None if it is a graph output."""
    watched: list[ir.Value] = []
    pending = [projected]
    while pending:
        value = pending.pop()
        if value.is_graph_output():
            return None
        if value in path and value is not projected:
            continue
        for node in users(value):
            if node.op_type in _LAYOUT | _PARTS:
                pending += [v for v in node.outputs if v not in pending]
            elif node.op_type != "Shape" and value not in path and value not in watched:
                watched.append(value)
    return tuple(watched)


def _probe(
    model: ir.Model, context: Context, found: Sequence[Projection], outputs: Sequence[Array]
) -> dict[str, Array]:
    """Runs the model with each layer's output replaced by `0 * output + given`, and puts everything back."""
    editor = Editor(model)
    names = {v.name for p in found for v in (p.arrival, *p.watched) if v.name}
    undo: list[tuple[ir.Value, ir.Value, list[ir.Node]]] = []
    added: list[ir.Node] = []
    weights: list[ir.Value] = []
    given: dict[ir.Value, Array] = {}
    for projection, output in zip(found, outputs, strict=True):
        given.setdefault(projection.projected, output)
    try:
        for projected, output in given.items():
            readers = users(projected)
            zero = editor.weight("probe_zero", np.zeros((), np.float32))
            number = editor.weight("probe_number", output.astype(np.float32))
            silent = editor.after(projected, "Mul", [projected, zero], name="probe_silent", like=projected)
            replaced = editor.after(silent, "Add", [silent, number], name="probe", like=projected)
            redirect(projected, replaced, readers)
            undo.append((replaced, projected, readers))
            added += [n for v in (replaced, silent) if (n := v.producer()) is not None]
            weights += [zero, number]
        return context.run_sample(model, sorted(names))
    finally:
        for replaced, projected, readers in undo:
            redirect(replaced, projected, readers)
        for node in added:
            model.graph.remove(node, safe=True)
        for weight in weights:
            del model.graph.initializers[weight.name or ""]


def _channel_numbers(values: Array, size: int) -> Array | None:
    """Channel numbers that arrived along the last axis, or None if they are no choice of channels."""
    rows = values.reshape(-1, values.shape[-1])
    numbers = np.rint(rows[0]).astype(np.int64)
    exact = np.allclose(rows, numbers, rtol=1e-4, atol=1e-2)
    return numbers if exact and numbers.min() >= 0 and numbers.max() < size else None


def _only(size: int, channels: Array | None) -> Array:
    output = np.zeros(size)
    if channels is not None:
        output[channels] = 1.0 + np.arange(len(channels)) / len(channels)
    return output


def read_once(value: ir.Value) -> bool:
    """Whether one node alone reads the content of `value`; its shape may be read by others."""
    return sum(node.op_type != "Shape" for node in users(value)) == 1 and not value.is_graph_output()


def _over_last_axis(softmax: ir.Node) -> bool:
    axis = attribute(softmax, "axis", -1)
    shape = softmax.outputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
