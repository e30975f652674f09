"""Reads and shifts the bias of a linear op, in whatever form it stands in the graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, constant, redirect, replace_output, sole_reader, users
from onnxcomp.qdq import bias_integers, dequantized_weight, quantize_bias, read_weight
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Where the bias of a linear op stands.

    Attributes:
        value: The bias as its user reads it: a constant, or the output of a DequantizeLinear.
        user: The op itself, or the Add behind a MatMul.
    """

    value: ir.Value
    user: ir.Node


def find_bias(node: ir.Node) -> Bias | None:
    """The bias of a Gemm or Conv, or that in an Add which alone reads a MatMul; None if there is none."""
    if node.op_type in ("Gemm", "Conv"):
        value = node.inputs[2] if len(node.inputs) > 2 else None
        return None if value is None else Bias(value=value, user=node)
    reader = sole_reader(node.outputs[0])
    return None if reader is None else added_constant(reader, node.outputs[0])


def added_constant(node: ir.Node, value: ir.Value) -> Bias | None:
    """The constant vector, one value a channel of the last axis, that an Add adds to `value`."""
    if node.op_type != "Add" or node.domain != "":
        return None
    other = next((v for v in node.inputs if v is not value), None)
    array = dequantized_weight(other)
    if other is None or array is None or array.ndim != 1:
        return None
    return Bias(value=other, user=node)


def shift_bias(editor: Editor, node: ir.Node, delta: Array, input_scale: Array) -> None:
    """Adds `delta`, one value an output channel, to the bias of a quantized linear op; makes a bias if need be.

    The output of a MatMul in front of its bias no longer means what it did, so it is renamed.
    """
    bias = find_bias(node)
    if bias is not None:
        set_bias(editor, bias, delta)
    elif node.op_type in ("Gemm", "Conv"):
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, _new_bias(editor, node, delta, input_scale, node))
    else:
        output = node.outputs[0]
        readers = users(output)
        total = editor.after(output, "Add", [output, None], name=f"{output.name}_biased", like=output)
        adder = total.producer()
        assert adder is not None
        adder.replace_input_with(1, _new_bias(editor, node, delta, input_scale, adder))
        redirect(output, total, readers)
        if output.is_graph_output():
            replace_output(output, total)
    if node.op_type == "MatMul":
        editor.rename(node.outputs[0], "noisy")


def set_bias(editor: Editor, bias: Bias, delta: Array) -> Array:
    """Adds `delta` to a bias in place.

    Returns:
        What was really added, after rounding to the bias's integers.
    """
    stored = read_weight(bias.value)
    if stored is None:
        array = constant(bias.value)
        assert array is not None
        moved = editor.weight(f"{bias.value.name}_shifted", (array + delta).astype(array.dtype))
        redirect(bias.value, moved, [bias.user])
        return delta
    integers, scale, _ = stored
    old = integers * scale.astype(np.float64)
    new = bias_integers(old + delta, scale)
    dequantize = bias.value.producer()
    assert dequantize is not None
    dequantize.replace_input_with(0, editor.weight(f"{bias.value.name}_shifted", new))
    return np.asarray(new * scale.astype(np.float64) - old, np.float32)


def _new_bias(editor: Editor, node: ir.Node, delta: Array, input_scale: Array, user: ir.Node) -> ir.Value:
    stored = read_weight(node.inputs[1])
    assert stored is not None
    scale = np.asarray(input_scale * stored[1], np.float32)
    name = ir.Value(name=f"{node.name}_bias", shape=ir.Shape(delta.shape), type=ir.TensorType(ir.DataType.FLOAT))
    return quantize_bias(editor, name, delta, scale, user)
