"""Writes quantized tensors into a graph as Q/DQ pairs, and reads them back.

An activation becomes `QuantizeLinear -> DequantizeLinear`. A grid that uses fewer integers than its 8-bit container
gets a `Clip` *between* the two, on integers: that keeps `QuantizeLinear` right behind the op which computes the value,
where runtimes look for it when they pick an integer kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.quant import Grid
from onnxcomp.skeleton import release
from onnxcomp.target import Array

_FLOAT = "onnxcomp.float"  # key in the metadata of a dequantized weight, which is not saved


def quantize_activation(editor: Editor, value: ir.Value, grid: Grid) -> ir.Value:
    """Puts a Q/DQ pair behind `value`; users are not redirected.

    Returns:
        The output of DequantizeLinear.
    """
    name = value.name or "value"
    scale = editor.weight(f"{name}_scale", grid.scale)
    zero_point = editor.weight(f"{name}_zero_point", grid.zero_point)
    container = ir.DataType.from_numpy(grid.dtype)
    q = editor.after(value, "QuantizeLinear", [value, scale, zero_point], name=f"{name}_q", like=value, dtype=container)
    if grid.narrow:
        low = editor.weight(f"{name}_qmin", np.asarray(grid.qmin, grid.dtype))
        high = editor.weight(f"{name}_qmax", np.asarray(grid.qmax, grid.dtype))
        q = editor.after(q, "Clip", [q, low, high], name=f"{name}_q_clip", like=q)
    return editor.after(q, "DequantizeLinear", [q, scale, zero_point], name=f"{name}_dq", like=value)


def quantize_weight(editor: Editor, value: ir.Value, weight: Array, grid: Grid, anchor: ir.Node) -> ir.Value:
    """Stores a weight as integers with a DequantizeLinear before `anchor`.

    Returns:
        The output of DequantizeLinear.
    """
    name = value.name or "weight"
    integers = editor.weight(f"{name}_q", grid.quantize(weight))
    zero_point = editor.weight(f"{name}_zero_point", grid.zero_point)
    output = _dequantize(
        editor, name, [integers, editor.weight(f"{name}_scale", grid.scale), zero_point], grid.axis, value, anchor
    )
    output.meta[_FLOAT] = ir.convenience.get_const_tensor(value)
    return output


def float_weight(value: ir.Value | None) -> Array | None:
    """The float array that a weight had before it was quantized, or None once the model was saved and loaded again.

    It is kept as the tensor that the model was loaded with, beside the graph: later passes of the same recipe use it
    to choose better integers.
    """
    tensor = value.meta.get(_FLOAT) if value is not None else None
    if tensor is None:
        return None
    array = np.asarray(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        array = np.array(array)
        release(tensor)
    return array


def quantize_bias(editor: Editor, value: ir.Value, bias: Array, scale: Array, anchor: ir.Node) -> ir.Value:
    """Stores a bias as int32 with scale `s_x * s_w` and a DequantizeLinear before `anchor`.

    Args:
        editor: Of the graph.
        value: The float bias, for its name.
        bias: Float array `(channels,)`.
        scale: Float32, `(channels,)` or `()`.
        anchor: Node that uses the bias.
    """
    name = value.name or "bias"
    integers = editor.weight(f"{name}_q", bias_integers(bias, scale))
    # No zero point: it is 0 by default, and four bytes a channel in the file otherwise.
    return _dequantize(
        editor, name, [integers, editor.weight(f"{name}_scale", scale)], 0 if scale.ndim else None, value, anchor
    )


def bias_integers(bias: Array, scale: Array) -> Array:
    """`round(bias / scale)` as int32, saturated."""
    return np.asarray(np.clip(np.rint(bias.astype(np.float64) / scale), -(2**31), 2**31 - 1).astype(np.int32))


def _dequantize(
    editor: Editor,
    name: str,
    inputs: Sequence[ir.Value],
    axis: int | None,
    like: ir.Value,
    anchor: ir.Node,
) -> ir.Value:
    return editor.before(
        anchor,
        "DequantizeLinear",
        inputs,
        name=f"{name}_dq",
        attributes={"axis": axis} if axis is not None else None,
        like=like,
    )


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """An activation that goes through a Q/DQ pair.

    Attributes:
        value: The float value before QuantizeLinear.
        quantize: The QuantizeLinear node.
        dequantize: The DequantizeLinear node.
        grid: The grid.
    """

    value: ir.Value
    quantize: ir.Node
    dequantize: ir.Node
    grid: Grid


def read_activation(value: ir.Value | None) -> QuantizedTensor | None:
    """The Q/DQ pair that ends in `value`, or None if `value` is no such thing."""
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    integers = dequantize.inputs[0]
    producer = integers.producer() if integers is not None else None
    limits: tuple[Array | None, Array | None] = (None, None)
    if producer is not None and producer.op_type == "Clip":
        limits = (constant(_input(producer, 1)), constant(_input(producer, 2)))
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is None or producer.op_type != "QuantizeLinear" or producer.inputs[0] is None:
        return None
    scale, zero_point = constant(_input(producer, 1)), constant(_input(producer, 2))
    if scale is None or zero_point is None or zero_point.dtype not in (np.uint8, np.int8, np.uint16, np.int16):
        return None
    info = np.iinfo(zero_point.dtype)
    return QuantizedTensor(
        value=producer.inputs[0],
        quantize=producer,
        dequantize=dequantize,
        grid=Grid(
            scale=scale,
            zero_point=zero_point,
            qmin=int(info.min if limits[0] is None else limits[0]),
            qmax=int(info.max if limits[1] is None else limits[1]),
            dtype=zero_point.dtype,
            axis=None if scale.ndim == 0 else int(attribute(producer, "axis", 1)),
        ),
    )


def read_weight(value: ir.Value | None) -> tuple[Array, Array, int | None] | None:
    """Integers, scale and channel axis of a constant that is dequantized into `value`; None if it is no such thing."""
    dequantize = value.producer() if value is not None else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    integers, scale = constant(_input(dequantize, 0)), constant(_input(dequantize, 1))
    zero_point = constant(_input(dequantize, 2))
    if integers is None or scale is None:
        return None
    if zero_point is not None and zero_point.any():
        return None
    return integers, scale, None if scale.ndim == 0 else int(attribute(dequantize, "axis", 1)) % integers.ndim


def dequantized_weight(value: ir.Value | None) -> Array | None:
    """Float32 array of a constant or of a constant that is dequantized; None if `value` is neither."""
    found = read_weight(value)
    if found is None:
        return constant(value)
    integers, scale, axis = found
    shape = [1] * integers.ndim
    if axis is not None:
        shape[axis] = -1
    return np.asarray(integers.astype(np.float32) * scale.reshape(shape))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
