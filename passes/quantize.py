"""Static quantization with Q/DQ pairs, placed where the target's integer kernels want them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.edit import Editor, bypass, constant, redirect, replace_output, users
from onnxcomp.errors import CalibrationError, PassError
from onnxcomp.histogram import Histogram
from onnxcomp.passes._bias import shift_bias
from onnxcomp.passes._channels import channel_axis, input_norms, mean_shift
from onnxcomp.passes._placement import Linear, Pair, Plan, plan
from onnxcomp.passes._shield import shield_float_ops
from onnxcomp.qdq import quantize_activation, quantize_bias, quantize_weight
from onnxcomp.quant import Grid, RangeMethod, activation_grid, observed_range, weight_grid
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied
from onnxcomp.stats import ChannelMean, Group, Observer
from onnxcomp.target import Array, Capabilities

# The mean of a difference between two roundings of the same values settles sooner than the ends of a range do.
_ROUNDED_FEEDS = 8
# An int32 bias is kept this far below overflow, so that the accumulator it starts has room.
_BIAS_LIMIT = 2.0**30

_ACTIVATION_TYPES = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
_WEIGHT_TYPES = (ir.DataType.INT8, ir.DataType.UINT8)
_OPSET_OF_16_BITS = 21  # of QuantizeLinear


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Quantizes activations per tensor and weights per output channel, to integer types that the target takes.

    Values with fewer than 8 bits are carried in 8-bit containers. A target that takes activations of 16 bits alone gets
    these. What is quantized follows the target's placements:
    linear ops with their inputs, and outputs where the target needs them; elementwise ops between quantized tensors;
    ops that only move values. A ReLU or Clip in front of a quantizer whose range lies inside it is dropped, since the
    quantizer saturates at the same place.

    Attributes:
        activation_bits: 2 to 8, or 16 where the target takes them.
        weight_bits: 2 to 8; where the CPU's int8 dot product saturates, 8 becomes 7.
        range: How ranges of activations are found; `mse` minimises the expected squared error.
        percentile: Percent of values to cover, for `range = "percentile"`.
        weight_range: How ranges of weights are found.
        output_aware: With `range = "mse"`, weighs the error of each input channel of a linear op by the squared norm of
            the weights that read it, so that the error of the op's output is minimised and not that of its input.
        per_channel: One weight scale for each output channel instead of one for the tensor.
        bias_correction: Takes the mean error that rounded weights and inputs put on each output channel off the bias
            again, from observed means of the inputs (Nagel et al., arXiv 1906.04721, section 4.2). Costs nothing at run
            time; a MatMul that no constant Add follows has no bias to correct.
        symmetric: Zero point of activations in the middle of the levels, except behind a folded ReLU.
        bins: Bins of the histograms.
    """

    name: ClassVar[str] = "quantize"
    summary: ClassVar[str] = "static int8 (2 to 8 bit) QDQ quantization, placed for the target's integer kernels"
    min_opset: ClassVar[int] = 13  # DequantizeLinear along an axis

    activation_bits: Annotated[int, Ge(2), Le(16)] = 8
    weight_bits: Annotated[int, Ge(2), Le(8)] = 8
    range: RangeMethod = "mse"
    percentile: Annotated[float, Gt(50.0), Le(100.0)] = 99.99
    weight_range: Literal["minmax", "mse"] = "mse"
    output_aware: bool = True
    per_channel: bool = True
    bias_correction: bool = True
    symmetric: bool = False
    bins: Annotated[int, Ge(256), Le(1 << 20)] = 8192

    @override
    def needed_opset(self, context: Context) -> int:
        wide = _activation_dtype(context.capabilities, self.activation_bits).itemsize > 1
        return _OPSET_OF_16_BITS if wide else self.min_opset

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        if not context.capabilities.placements:
            raise PassError(f"target {context.capabilities.target!r} has no integer kernels")
        if 8 < self.activation_bits < 16:
            raise PassError(f"activation_bits is {self.activation_bits}; it can be 2 to 8, or 16")
        _activation_dtype(context.capabilities, self.activation_bits)
        _weight_dtype(context.capabilities)

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        todo = plan(model, context.capabilities, self.where)
        weights = _channel_weights(todo) if self.output_aware and self.range == "mse" else {}
        observers: dict[str, Observer] = {}
        for pair in todo.pairs.values():
            norms, axis = weights.get(pair.observed, (None, -1))
            observers[pair.observed] = Histogram(self.bins, weights=norms, axis=axis)
        means: dict[str, dict[int, Observer]] = {}
        for linear in todo.linears if self.bias_correction else ():
            axis = channel_axis(linear)  # a Conv and a MatMul may read the same tensor
            means.setdefault(linear.input.name or "", {}).setdefault(axis, ChannelMean(axis))
        for name, moments in means.items():
            observers[name] = Group(*([observers[name]] if name in observers else []), *moments.values())
        return observers

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        todo = plan(model, context.capabilities, self.where)
        unsigned = {pair.observed for pair in todo.pairs.values() if pair.folded is not None}
        grids = {v: self._grid(context, pair.observed, pair.observed in unsigned) for v, pair in todo.pairs.items()}
        editor = Editor(model)
        edits = list(todo.refusals)
        inputs = _input_grids(todo, grids)
        errors = self._rounding_errors(model, todo, inputs, context)
        edits += [self._quantize_linear(editor, x, inputs[x.input].scale, errors, context) for x in todo.linears]
        edits.extend(applied(node, "inputs and output quantized") for node in todo.elementwise)
        for value, pair in todo.pairs.items():
            if pair.folded is not None:
                edits.append(applied(pair.folded, "dropped: the quantizer behind it saturates at the same values"))
                bypass(pair.folded)
            _insert(editor, value, pair, grids[value])
        if todo.pairs:
            shield_float_ops(model)
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _grid(self, context: Context, observed: str, unsigned: bool) -> Grid:
        histogram = context.statistic(observed, Histogram)
        if not histogram.count:
            raise CalibrationError(f"value {observed!r} is empty in all calibration data; give data where it is not")
        bits, dtype = self._activation_bits(context), _activation_dtype(context.capabilities, self.activation_bits)
        low, high = observed_range(histogram, self.range, bits, percentile=self.percentile)
        return activation_grid(low, high, bits, symmetric=self.symmetric and not unsigned, dtype=dtype)

    def _activation_bits(self, context: Context) -> int:
        wide = _activation_dtype(context.capabilities, self.activation_bits).itemsize > 1
        return 16 if wide else self.activation_bits

    def _quantize_linear(
        self,
        editor: Editor,
        linear: Linear,
        input_scale: Array,
        errors: Mapping[tuple[str, int], Array],
        context: Context,
    ) -> Edit:
        weight, bias = constant(linear.weight), constant(linear.bias)
        assert weight is not None
        bits = min(self.weight_bits, 7) if context.capabilities.reduce_range else self.weight_bits
        axis = linear.channel_axis if self.per_channel else None
        grid = weight_grid(weight, bits, axis, self.weight_range, _weight_dtype(context.capabilities))
        if bias is not None:
            grid = _with_room_for_bias(grid, bias.reshape(-1), input_scale)
        linear.node.replace_input_with(1, quantize_weight(editor, linear.weight, weight, grid, linear.node))
        each = "channel" if self.per_channel else "tensor"
        detail = f"input {self._activation_bits(context)} bit, weight {bits} bit per {each}"
        shift = self._correction(linear, weight, grid, errors, context)
        if linear.bias is not None and linear.bias_user is not None and bias is not None:
            scale = np.asarray(input_scale * grid.scale, np.float32)
            integers = quantize_bias(editor, linear.bias, bias.reshape(-1) + shift, scale, linear.bias_user)
            redirect(linear.bias, integers, [linear.bias_user])
            detail += ", bias int32"
        elif linear.node.op_type != "MatMul" and np.any(shift):
            shift_bias(editor, linear.node, shift, input_scale)
            detail += ", bias int32 added"
        return applied(linear.node, detail)

    def _rounding_errors(
        self, model: ir.Model, todo: Plan, grids: Mapping[ir.Value, Grid], context: Context
    ) -> dict[tuple[str, int], Array]:
        """Mean of what quantization adds to each channel of the inputs, by name and channel axis."""
        if not self.bias_correction or context.sweep is None:
            return {}
        wanted: dict[str, dict[int, RoundingError]] = {}
        for linear in todo.linears:
            grid, axis = grids[linear.input], channel_axis(linear)
            wanted.setdefault(linear.input.name or "", {}).setdefault(axis, RoundingError(axis, grid))
        context.sweep(model, {name: Group(*parts.values()) for name, parts in wanted.items()}, _ROUNDED_FEEDS)
        return {(name, axis): part.mean for name, parts in wanted.items() for axis, part in parts.items()}

    def _correction(
        self, linear: Linear, weight: Array, grid: Grid, errors: Mapping[tuple[str, int], Array], context: Context
    ) -> Array:
        """What to add to the bias, shape `(outputs,)`, so that quantization keeps the mean output."""
        if not self.bias_correction:
            return np.zeros(weight.shape[linear.channel_axis])
        name, axis = linear.input.name or "", channel_axis(linear)
        context.statistic(name, ChannelMean)
        group = context.statistics[name]
        assert isinstance(group, Group)
        seen = {part.axis: part for part in group.parts if isinstance(part, ChannelMean)}[axis]
        stored = grid.round_trip(weight)
        shift = mean_shift(linear, weight - stored, seen.mean, seen.shape)
        if (name, axis) in errors:
            shift = shift - mean_shift(linear, stored, errors[name, axis], seen.shape)
        return shift


def _activation_dtype(capabilities: Capabilities, bits: int) -> np.dtype[Any]:
    """The first type that holds `bits`, one of 8 bits if there is one; see `Capabilities.activation_dtypes`."""
    known = [d for d in capabilities.activation_dtypes if d in _ACTIVATION_TYPES]
    fitting = [d for d in known if d.bitwidth >= bits]
    if not fitting:
        names = ", ".join(d.name for d in known) or "none"
        raise PassError(
            f"target {capabilities.target!r} has no integer kernel for activations of {bits} bits; it takes {names}"
        )
    return min(fitting, key=lambda d: d.bitwidth).numpy()  # the first of those of equal width


def _weight_dtype(capabilities: Capabilities) -> np.dtype[Any]:
    found = next((d for d in capabilities.weight_dtypes if d in _WEIGHT_TYPES), None)
    if found is None:
        raise PassError(f"target {capabilities.target!r} takes no weights of INT8 or UINT8")
    return found.numpy()


def _channel_weights(todo: Plan) -> dict[str, tuple[Array, int]]:
    """Squared weight norm of each channel, and the channel axis, of tensors that only linear ops read quantized."""
    readers: dict[str, list[Linear]] = {}
    for linear in todo.linears:
        readers.setdefault(linear.input.name or "", []).append(linear)
    nodes = {linear.node for linear in todo.linears}
    shared = set()
    for value, pair in todo.pairs.items():
        tensor = value if pair.folded is None else pair.folded.outputs[0]
        if tensor.name != pair.observed or tensor.is_graph_output() or set(pair.readers or users(tensor)) - nodes:
            shared.add(pair.observed)
    found: dict[str, tuple[Array, int]] = {}
    for name, linears in readers.items():
        norms = [input_norms(linear) for linear in linears]
        axes = {axis for _, axis in norms}
        total = sum(float(n.sum()) for n, _ in norms)  # 0 where all weights are, and every value counts nothing
        if name not in shared and len(axes) == 1 and len({len(n) for n, _ in norms}) == 1 and total > 0.0:
            found[name] = (np.sum([n for n, _ in norms], axis=0), axes.pop())
    return found


def _input_grids(todo: Plan, grids: Mapping[ir.Value, Grid]) -> dict[ir.Value, Grid]:
    """Grid of the tensor that each linear op reads: a folded activation's output is kept under the value before it."""
    found = dict(grids)
    for value, pair in todo.pairs.items():
        if pair.folded is not None:
            found[pair.folded.outputs[0]] = grids[value]
    return found


class RoundingError(ChannelMean):
    """Mean of what quantization adds to each channel.

    Args:
        axis: Channel axis.
        grid: Per-tensor grid.
    """

    _POSITIONS = 256  # of a sample and channel that are looked at

    def __init__(self, axis: int, grid: Grid) -> None:
        super().__init__(axis)
        self._scale = np.float32(grid.scale)
        self._limits = np.float32(grid.low), np.float32(grid.high)

    @override
    def add(self, x: Array) -> None:
        axis = self.axis % max(x.ndim, 1)
        inner = math.prod(x.shape[axis + 1 :])
        if inner > 2 * self._POSITIONS:
            x = x.reshape(*x.shape[: axis + 1], inner)[..., :: inner // self._POSITIONS | 1]
        rounded = np.rint(x / self._scale)
        rounded *= self._scale
        np.clip(rounded, *self._limits, out=rounded)
        rounded -= x
        super().add(rounded)


def _with_room_for_bias(grid: Grid, bias: Array, input_scale: Array) -> Grid:
    """Widens the scale of channels whose weights are so small that `bias / (s_x s_w)` would overflow an int32."""
    needed = np.abs(bias) / (input_scale * np.float32(_BIAS_LIMIT))
    needed = needed.max() if grid.axis is None else needed
    return replace(grid, scale=np.maximum(grid.scale, needed).astype(np.float32))


def _insert(editor: Editor, value: ir.Value, pair: Pair, grid: Grid) -> None:
    readers = users(value) if pair.readers is None else pair.readers
    output = quantize_activation(editor, value, grid)
    redirect(value, output, readers)
    if pair.readers is None and value.is_graph_output():
        replace_output(value, output)
