"""Graph forms of layers whose inputs are quantized by the range that each run finds.

A product becomes DynamicQuantizeLinear, MatMulInteger, Cast, Mul by both scales, and Add of a Gemm's bias; all of it is
ONNX standard. The integer node takes over the name of the product, and the last node its output.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, become, constant
from onnxcomp.passes._matrices import Matrix
from onnxcomp.target import Array

LSTM_DOMAIN, LSTM = "com.microsoft", "DynamicQuantizeLSTM"


class Editors:
    """Editors of the graphs of a model, and the quantized activations that its products share."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._last: Editor | None = None
        self._quantized: dict[tuple[ir.Value, ir.Graph], tuple[ir.Value, ...]] = {}

    def of(self, graph: ir.Graph) -> Editor:
        """Editor of `graph`; an older one does not know names given since."""
        if self._last is None or self._last.graph is not graph:
            self._last = Editor(self.model, graph)
        return self._last

    def quantized(self, value: ir.Value, graph: ir.Graph) -> tuple[ir.Value, ...]:
        """Integers, scale and zero point of an activation that nodes of `graph` read; made once in every graph."""
        key = (value, graph)
        if key not in self._quantized:
            editor = self.of(graph)
            name = f"{value.name}_q"
            if _owner(value) is graph:
                integers = editor.after(value, "DynamicQuantizeLinear", [value], name=name)
            else:  # from outside of a branch
                integers = editor.before(graph[0], "DynamicQuantizeLinear", [value], name=name)
            node = integers.producer()
            assert node is not None
            node.resize_outputs(3)
            for output, kind, suffix in zip(
                node.outputs, (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8), ("", "scale", "zero_point"),
                strict=True,
            ):  # fmt: skip
                output.dtype, output.shape = kind, ir.Shape(()) if suffix else value.shape
                if suffix:
                    output.name = name
                    editor.rename(output, suffix)
            self._quantized[key] = tuple(node.outputs)
        return self._quantized[key]


def _owner(value: ir.Value) -> ir.Graph | ir.Function | None:
    producer = value.producer()
    return value.graph if producer is None else producer.graph


def to_integer_matmul(editors: Editors, matrix: Matrix, integers: Array, scale: Array) -> None:
    """Makes the products with one matrix integer.

    Args:
        editors: Of the model.
        matrix: The matrix; a Gemm's bias, if any, is a vector (N,).
        integers: Its integers, int8 (K, N).
        scale: Step of each output channel, float32 (N,), or () for one step.
    """
    name = matrix.value.name or "weight"
    owner = editors.of(matrix.graph)
    weight, step = owner.weight(f"{name}_q", integers), owner.weight(f"{name}_scale", scale)
    for node in matrix.products:
        assert isinstance(node.graph, ir.Graph)
        data = node.inputs[0]
        assert data is not None
        x, x_scale, x_zero = editors.quantized(data, node.graph)
        editor, name, output = editors.of(node.graph), node.name or "product", node.outputs[0]
        y = editor.before(
            node, "MatMulInteger", [x, weight, x_zero], name=f"{name}_dequantized", like=output, dtype=ir.DataType.INT32
        )
        product = y.producer()
        assert product is not None
        factors = editor.before(node, "Mul", [x_scale, step], name=f"{name}_scales", like=step)
        floats = editor.before(
            node, "Cast", [y], name=f"{name}_floats", attributes={"to": ir.DataType.FLOAT}, like=output,
            dtype=ir.DataType.FLOAT,
        )  # fmt: skip
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        last = ("Mul", floats, factors)
        if bias is not None:
            last = ("Add", editor.before(node, "Mul", [floats, factors], name=f"{name}_scaled", like=output), bias)
        become(node, last[0], last[1:])
        product.name, node.name = node.name, product.name
        y.name = name
        editor.rename(y, "integers")


def read_lstm(node: ir.Node, min_weights: int) -> tuple[Array, Array] | str:
    """Weights of input and state of an LSTM, or why it has no integer form.

    Returns:
        Float32 (directions, 4 * hidden size, columns) each.
    """
    if attribute(node, "layout", 0):
        return "its batch comes first (layout = 1), which the integer LSTM does not take"
    weight, recurrence = (constant(value) for value in node.inputs[1:3])
    if weight is None or recurrence is None:
        return "its weights are no constants; the pass cleanup may make them so"
    if weight.dtype != np.float32 or recurrence.dtype != np.float32:
        return f"its weights are {weight.dtype}, not float32"
    if weight.size + recurrence.size < min_weights:
        return f"it has {weight.size + recurrence.size} weights, fewer than min_weights = {min_weights}"
    if not (np.isfinite(weight).all() and np.isfinite(recurrence).all()):
        return "its weights hold NaN or infinity"
    return weight, recurrence


def to_integer_lstm(editor: Editor, node: ir.Node, quantized: list[tuple[Array, Array]]) -> None:
    """Turns an LSTM into DynamicQuantizeLSTM.

    Args:
        editor: Of its graph.
        node: The LSTM.
        quantized: For the weights of input and state: int8 (directions, 4 * hidden size, columns), and their steps,
            float32 (directions, 4 * hidden size) or (directions,).
    """
    inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
    for index, (integers, scale) in enumerate(quantized, 1):
        value = node.inputs[index]
        name = "weight" if value is None else value.name or "weight"
        inputs[index] = editor.weight(f"{name}_q", np.ascontiguousarray(integers.swapaxes(1, 2)))
        inputs += [
            editor.weight(f"{name}_scale", scale),
            editor.weight(f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
        ]
    kept = {name: given for name, given in node.attributes.items() if name != "layout"}
    editor.model.opset_imports.setdefault(LSTM_DOMAIN, 1)
    become(node, LSTM, inputs, domain=LSTM_DOMAIN)
    node.attributes.update(kept)
