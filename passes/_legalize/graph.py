"""What the rules of `legalize` share: the model under work, and how quantization is read off a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, replace_output, sole_reader, users
from onnxcomp.qdq import quantize_activation
from onnxcomp.quant import Grid
from onnxcomp.rewrite import Edit, applied, refused
from onnxcomp.select import Select
from onnxcomp.target import Array, Capabilities

STANDARD = ("", "ai.onnx")
LINEAR = ("Conv", "MatMul", "Gemm")


@dataclass(kw_only=True)
class Work:
    """A model under work.

    Attributes:
        model: The model.
        capabilities: Of the target.
        where: The nodes that may be touched.
        exact: Whether every integer has to stay what it is.
        editor: Of the main graph.
        edits: What was done so far.
        refusals: What could not be done in this round, by node and reason.
    """

    model: ir.Model
    capabilities: Capabilities
    where: Select
    exact: bool = False
    editor: Editor = field(init=False)
    edits: list[Edit] = field(default_factory=list)
    refusals: dict[tuple[str, str], Edit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.editor = Editor(self.model)

    def nodes(self, *op_types: str) -> Iterator[ir.Node]:
        """Selected nodes of the main graph with one of these op types; those removed meanwhile are left out."""
        for node in list(self.model.graph):
            if node.graph is not None and is_op(node, *op_types) and self.where(node):
                yield node

    def done(self, node: ir.Node, detail: str) -> None:
        """Reports an edit."""
        self.edits.append(applied(node, detail))

    def refuse(self, node: ir.Node, reason: str) -> None:
        """Reports what cannot be done, once."""
        self.refusals[node.name or "", reason] = refused(node, reason)

    def kind(self, node: ir.Node | None) -> str:
        """Kind of the target's placement for `node`, or an empty string."""
        if node is None or node.domain not in STANDARD:
            return ""
        placement = self.capabilities.placements.get(node.op_type)
        return "" if placement is None else placement.kind


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of these ops of the default domain."""
    return node is not None and node.domain in STANDARD and node.op_type in op_types


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input, or None where it is absent."""
    return node.inputs[index] if index < len(node.inputs) else None


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of a constant, not read yet; None if `value` is not constant."""
    if value is None or (value.is_graph_input() and value.is_initializer()):
        return None
    return ir.convenience.get_const_tensor(value)


def set_operand(node: ir.Node, index: int, value: ir.Value) -> None:
    """Sets an input, also one that was absent."""
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that computes `value` if it is one of these ops."""
    node = None if value is None else value.producer()
    return node if is_op(node, *op_types) else None


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node that alone reads `value`, if it is one of these ops; None if `value` is a graph output."""
    reader = sole_reader(value)
    return reader if reader is not None and is_op(reader, *op_types) else None


def grid_of(node: ir.Node) -> Grid | None:
    """The 8-bit grid of a QuantizeLinear or DequantizeLinear; None if its parameters are computed or not 8 bit."""
    scale, zero_point = constant(operand(node, 1)), constant(operand(node, 2))
    if scale is None or scale.dtype != np.float32 or attribute(node, "block_size", 0):
        return None
    if zero_point is None:
        if operand(node, 2) is not None:
            return None
        dtype = default_dtype(node)
        if dtype is None:
            return None
        zero_point = np.zeros(scale.shape, dtype)
    if zero_point.dtype not in (np.uint8, np.int8) or not (scale > 0.0).all():
        return None
    info = np.iinfo(zero_point.dtype)
    axis = None if scale.ndim == 0 else int(attribute(node, "axis", 1))
    if scale.size == 1:
        scale, zero_point, axis = scale.reshape(()), zero_point.reshape(()), None
    return Grid(
        scale=scale, zero_point=zero_point, qmin=int(info.min), qmax=int(info.max), dtype=zero_point.dtype, axis=axis
    )


def default_dtype(node: ir.Node) -> np.dtype[np.uint8] | np.dtype[np.int8] | None:
    """Type of the integers of a Q/DQ node without a zero point; None if it is not known or not 8 bit."""
    if is_op(node, "QuantizeLinear"):
        wanted = ir.DataType(int(attribute(node, "output_dtype", 0)) or ir.DataType.UINT8)
    else:
        integers = node.inputs[0]
        tensor = stored(integers)
        known = tensor.dtype if tensor is not None else None if integers is None else integers.dtype
        if known is None:
            return None
        wanted = known
    if wanted == ir.DataType.UINT8:
        return np.dtype(np.uint8)
    return np.dtype(np.int8) if wanted == ir.DataType.INT8 else None


def same_grid(one: Grid, other: Grid) -> bool:
    """Whether two grids give the same integers the same meaning; the integers that they use may differ."""
    return (
        one.dtype == other.dtype
        and one.axis == other.axis
        and np.array_equal(one.scale, other.scale)
        and np.array_equal(one.zero_point, other.zero_point)
    )


def position(grid: Grid, limit: float) -> float:
    """Integer that a per-tensor grid has for `limit`, without saturation."""
    return float(np.rint(np.float32(limit) / grid.scale)) + float(grid.zero_point)


def integer_clip(value: ir.Value) -> ir.Node | None:
    """The Clip that alone reads the integers `value`, with constant limits."""
    clip = only_reader(value, "Clip")
    if clip is None or any(v is not None and stored(v) is None for v in clip.inputs[1:]):
        return None
    return clip


def quantized(quantize: ir.Node) -> tuple[Grid, ir.Value] | None:
    """Grid of a QuantizeLinear and its integers, a Clip on them included."""
    grid = grid_of(quantize)
    if grid is None:
        return None
    output = quantize.outputs[0]
    clip = integer_clip(output)
    if clip is None:
        return grid, output
    low, high = (constant(operand(clip, i)) for i in (1, 2))
    return _within(grid, low, high), clip.outputs[0]


def dequantized(value: ir.Value | None) -> tuple[ir.Node, Grid] | None:
    """The DequantizeLinear of 8-bit integers that computes `value`, and its grid; integers may be constant."""
    node = producer(value, "DequantizeLinear")
    if node is None or (grid := grid_of(node)) is None:
        return None
    source = producer(node.inputs[0], "Clip")
    if source is None:
        return node, grid
    low, high = constant(operand(source, 1)), constant(operand(source, 2))
    return node, _within(grid, low, high)


def _within(grid: Grid, low: Array | None, high: Array | None) -> Grid:
    """A grid whose integers a Clip limits as well."""
    qmin = grid.qmin if low is None else max(grid.qmin, int(low))
    qmax = grid.qmax if high is None else min(grid.qmax, int(high))
    return replace(grid, qmin=qmin, qmax=qmax)


def weight_of(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear of constant integers that a linear op has for a weight."""
    if not is_op(node, *LINEAR):
        return None
    dequantize = producer(operand(node, 1), "DequantizeLinear")
    if dequantize is None or stored(operand(dequantize, 0)) is None:
        return None
    return dequantize


def clip_limits(node: ir.Node) -> tuple[float, float] | None:
    """Limits of a Relu or Clip; None if it is neither, or a limit is computed."""
    if is_op(node, "Relu"):
        return 0.0, np.inf
    if not is_op(node, "Clip"):
        return None
    found = [-np.inf, np.inf]
    for index in (1, 2):
        if (value := operand(node, index)) is not None:
            limit = floats(value)
            if limit is None or limit.size != 1:
                return None
            found[index - 1] = float(limit.reshape(()))
    return found[0], found[1]


def floats(value: ir.Value | None) -> Array | None:
    """Values of a float32 constant, or of constant integers that are dequantized, zero point and all."""
    dequantize = producer(value, "DequantizeLinear")
    if dequantize is None:
        array = constant(value)
        return array if array is not None and array.dtype == np.float32 else None
    integers, scale, zero_point = (constant(operand(dequantize, i)) for i in range(3))
    if integers is None or scale is None or attribute(dequantize, "block_size", 0):
        return None
    shape = [1] * integers.ndim
    if scale.size > 1:
        shape[int(attribute(dequantize, "axis", 1))] = -1
    shifted = integers.astype(np.int64) - (0 if zero_point is None else zero_point.astype(np.int64).reshape(shape))
    return np.asarray((shifted * scale.astype(np.float64).reshape(shape)).astype(np.float32))


def insert_pair(work: Work, value: ir.Value, grid: Grid, readers: list[ir.Node] | None = None) -> ir.Value:
    """Puts a Q/DQ pair behind `value`, for some of its readers or for all of them and the graph's output.

    Returns:
        The output of DequantizeLinear.
    """
    before = users(value) if readers is None else readers
    output = quantize_activation(work.editor, value, grid)
    redirect(value, output, before)
    if readers is None and value.is_graph_output():
        replace_output(value, output)
    return output
