"""Places in front of a quantizer where a bias can be added for free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, constant
from onnxcomp.passes._bias import Bias, added_constant, find_bias, set_bias
from onnxcomp.passes._projections import Projection, arriving_channels, find_projection, read_once
from onnxcomp.qdq import QuantizedTensor
from onnxcomp.rewrite import Context
from onnxcomp.target import Array


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
    if producer is None or not read_once(tensor.value):
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


def attention_folds(model: ir.Model, context: Context, tensors: Sequence[QuantizedTensor]) -> dict[ir.Node, _ValueFold]:
    """Folds into the bias of the value projection, by quantizer.

    Rows of a softmax sum to one, so a constant added to all values is added to the attention's output.
    """
    found = [(t.quantize, p, b) for t in tensors if (p := find_projection(t.value)) is not None and (b := _bias(p))]
    channels = arriving_channels(model, context, [p for _, p, _ in found])
    return {
        quantizer: _ValueFold(bias, c, projection.path)
        for (quantizer, projection, bias), c in zip(found, channels, strict=True)
        if c is not None and len(set(c.tolist())) == len(c)
    }


def _bias(projection: Projection) -> Bias | None:
    node = projection.projected.producer()
    if node is None or not projection.attention:
        return None
    if node.op_type == "Gemm":
        return find_bias(node)
    return next((b for v in node.inputs if v is not None and (b := added_constant(node, v)) is not None), None)


def _size(bias: Bias) -> int:
    shape = bias.value.shape
    assert shape is not None
    return int(np.prod(shape.numpy()))
