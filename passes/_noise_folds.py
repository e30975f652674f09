"""Places in front of a quantizer where a bias can be added for free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, constant, redirect, users
from onnxcomp.errors import CalibrationError
from onnxcomp.passes._bias import Bias, added_constant, find_bias, set_bias
from onnxcomp.qdq import QuantizedTensor
from onnxcomp.rewrite import Context
from onnxcomp.target import Array

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_PARTS = ("Split", "Slice", "Gather")


class Fold(ABC):
    """A place in the graph that takes the noise of one quantized activation."""

    place: str

    @abstractmethod
    def shift(self, editor: Editor, noise: Array) -> Array:
        """Adds `noise`, one value a channel, to the activation.

        Returns:
            What was really added, after rounding where the place holds integers.
        """


@dataclass(frozen=True)
class _LayerNormFold(Fold):
    node: ir.Node
    place = "LayerNorm beta"

    def shift(self, editor: Editor, noise: Array) -> Array:
        beta = constant(self.node.inputs[2]) if len(self.node.inputs) > 2 else None
        if len(self.node.inputs) < 3:
            self.node.resize_inputs(3)
        total = noise if beta is None else beta + noise
        self.node.replace_input_with(2, editor.weight(f"{self.node.name}_noisy_beta", total.astype(np.float32)))
        editor.rename(self.node.outputs[0], "noisy")
        return noise


@dataclass(frozen=True)
class _AddFold(Fold):
    bias: Bias
    place = "constant of an Add"

    def shift(self, editor: Editor, noise: Array) -> Array:
        added = set_bias(editor, self.bias, noise)
        editor.rename(self.bias.user.outputs[0], "noisy")
        return added


@dataclass(frozen=True)
class _ValueFold(Fold):
    """The bias of a value projection.

    Attributes:
        bias: The projection's bias, possibly shared with queries and keys.
        channels: For each channel of the activation, its index in the bias.
        path: Values between the bias and the activation, which the noise shifts.
    """

    bias: Bias
    channels: Array
    path: tuple[ir.Value, ...]
    place = "V bias"

    def shift(self, editor: Editor, noise: Array) -> Array:
        array = _size(self.bias)
        delta = np.zeros(array, np.float32)
        delta[self.channels] = noise
        added = set_bias(editor, self.bias, delta)
        for value in self.path:
            editor.rename(value, "noisy")
        return np.asarray(added[self.channels])


def direct_fold(tensor: QuantizedTensor) -> Fold | None:
    """A fold right in front of the quantizer: a LayerNormalization or an Add of a constant that nobody else reads."""
    producer = tensor.value.producer()
    if producer is None or not _read_once(tensor.value):
        return None
    if producer.op_type == "LayerNormalization" and producer.domain == "" and len(producer.outputs) == 1:
        scale = constant(producer.inputs[1])
        beta = producer.inputs[2] if len(producer.inputs) > 2 else None
        one_axis = scale is not None and scale.ndim == 1
        return _LayerNormFold(producer) if one_axis and (beta is None or constant(beta) is not None) else None
    for value in producer.inputs:
        if value is not None and (bias := added_constant(producer, value)) is not None and bias.value is not value:
            return _AddFold(bias)
    return None


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """An activation that is attention-weighted values.

    Attributes:
        tensor: The activation.
        bias: Bias of the projection that the values come from.
        projected: Output of that projection, bias included.
        path: Values behind the bias down to the activation that carry values only.
        weights: What must not change with the values: the softmax, or queries and keys.
    """

    tensor: QuantizedTensor
    bias: Bias
    projected: ir.Value
    path: tuple[ir.Value, ...]
    weights: tuple[ir.Value, ...]


def attention_folds(model: ir.Model, context: Context, tensors: Sequence[QuantizedTensor]) -> dict[ir.Node, _ValueFold]:
    """Folds into the bias of the value projection, by quantizer.

    Rows of a softmax sum to one, so a constant added to all values is added to the attention's output. Which entries
    of the bias arrive at which channel, through splits, reshapes and transposes of any exporter, is read off a run in
    which the projections put out nothing but the number of each channel; a second run in which only those channels are
    not zero shows that the attention weights do not depend on them.
    """
    found = [a for t in tensors if (a := _match(t)) is not None]
    if not found:
        return {}
    try:
        numbers = _probe(model, context, found, [np.arange(_size(a.bias)) for a in found])
        channels = [_channel_numbers(numbers[a.tensor.value.name or ""], _size(a.bias)) for a in found]
        only = [_only(_size(a.bias), c) for a, c in zip(found, channels, strict=True)]
        with_values = _probe(model, context, found, only)
        without = _probe(model, context, found, [np.zeros_like(o) for o in only])
    except CalibrationError:
        return {}
    return {
        a.tensor.quantize: _ValueFold(a.bias, c, a.path)
        for a, c in zip(found, channels, strict=True)
        if c is not None and all(np.array_equal(with_values[w.name], without[w.name]) for w in a.weights if w.name)
    }


def _match(tensor: QuantizedTensor) -> _Attention | None:
    path: list[ir.Value] = []
    value = tensor.value
    while (node := value.producer()) is not None and node.op_type in _LAYOUT and _read_once(value):
        path.append(value)
        value = _data(node)
    if node is None or not _read_once(value):
        return None
    path.append(value)
    if node.op_type == "MatMul" and node.inputs[0] is not None and node.inputs[1] is not None:
        softmax = node.inputs[0].producer()
        if softmax is None or softmax.op_type != "Softmax" or not _over_last_axis(softmax):
            return None
        weights: tuple[ir.Value, ...] = (node.inputs[0],)
        value = node.inputs[1]
    elif node.op_type == "Attention" and node.domain == "" and len(node.inputs) >= 3 and node.inputs[2] is not None:
        weights = tuple(v for v in node.inputs[:2] if v is not None)
        value = node.inputs[2]
    else:
        return None
    whole = True
    while (node := value.producer()) is not None and node.op_type in (*_LAYOUT, *_PARTS):
        if whole and not _read_once(value):
            return None
        path += [value] if whole else []
        whole &= node.op_type not in _PARTS
        value = _data(node)
    bias = _bias_of(node, value)
    if bias is None or node is None or (whole and not _read_once(value)):
        return None
    path.append(value)
    return _Attention(tensor=tensor, bias=bias, projected=value, path=tuple(path), weights=weights)


def _bias_of(node: ir.Node | None, value: ir.Value) -> Bias | None:
    if node is None:
        return None
    if node.op_type == "Gemm":
        return find_bias(node)
    return next((b for v in node.inputs if v is not None and (b := added_constant(node, v)) is not None), None)


def _probe(model: ir.Model, context: Context, found: Sequence[_Attention], biases: Sequence[Array]) -> dict[str, Array]:
    """Runs the model with each projection's output replaced by `0 * output + bias`, and puts everything back."""
    editor = Editor(model)
    names = {v.name for a in found for v in (a.tensor.value, *a.weights) if v.name}
    undo: list[tuple[ir.Value, ir.Value, list[ir.Node]]] = []
    added: list[ir.Node] = []
    weights: list[ir.Value] = []
    projections = {a.projected: (a, b) for a, b in zip(found, biases, strict=True)}
    try:
        for projected, (_, bias) in projections.items():
            readers = users(projected)
            zero = editor.weight("probe_zero", np.zeros((), np.float32))
            number = editor.weight("probe_number", bias.astype(np.float32))
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
    """Channel numbers that arrived at the activation, or None if they are no one-to-one choice of channels."""
    rows = values.reshape(-1, values.shape[-1])
    numbers = np.rint(rows[0]).astype(np.int64)
    exact = np.allclose(rows, numbers, rtol=1e-4, atol=1e-2)
    inside = numbers.min() >= 0 and numbers.max() < size and len(set(numbers.tolist())) == len(numbers)
    return numbers if exact and inside else None


def _only(size: int, channels: Array | None) -> Array:
    bias = np.zeros(size)
    if channels is not None:
        bias[channels] = 1.0 + np.arange(len(channels)) / len(channels)
    return bias


def _size(bias: Bias) -> int:
    shape = bias.value.shape
    assert shape is not None
    return int(np.prod(shape.numpy()))


def _read_once(value: ir.Value) -> bool:
    """Whether one node alone reads the content of `value`; its shape may be read by others."""
    return sum(node.op_type != "Shape" for node in users(value)) == 1 and not value.is_graph_output()


def _data(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _over_last_axis(softmax: ir.Node) -> bool:
    attribute = softmax.attributes.get("axis")
    axis = -1 if attribute is None else attribute.as_int()
    shape = softmax.outputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
