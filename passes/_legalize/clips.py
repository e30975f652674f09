"""Drops a Relu or Clip between an op and its quantizer, which keeps an integer kernel from being found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import bypass, redirect, users
from onnxcomp.passes._legalize.graph import (
    Work,
    clip_limits,
    grid_of,
    integer_clip,
    is_op,
    only_reader,
    position,
    set_operand,
)
from onnxcomp.quant import Grid, activation_grid

Range = tuple[float, float]


def drop_activations(work: Work) -> None:
    """A Relu or Clip in front of a QuantizeLinear is dropped; the quantizer saturates in its place.

    Quantizing keeps the order of values, so `q(clip(x, a, b)) = clip(q(x), q(a), q(b))` to the last bit.
    """
    for activation in work.nodes("Relu", "Clip"):
        value, output = activation.inputs[0], activation.outputs[0]
        quantize = only_reader(output, "QuantizeLinear")
        limits = clip_limits(activation)
        if quantize is None or limits is None or value is None or quantize.inputs[0] is not output:
            continue
        if len(users(value)) != 1 or value.is_graph_output() or not _computed_on_integers(work, value):
            continue
        grid = grid_of(quantize)
        if grid is None or grid.axis is not None or not overlaps(grid, limits):
            continue
        bypass(activation)
        work.done(activation, f"dropped: {saturate(work, quantize, quantize.outputs[0], grid, limits)}")


def _computed_on_integers(work: Work, value: ir.Value) -> bool:
    """Whether the op in front has an integer kernel, and so should have the quantizer right behind it."""
    return work.kind(value.producer()) in ("linear", "elementwise")


def overlaps(grid: Grid, limits: Range) -> bool:
    """Whether a per-tensor grid has integers within `limits`."""
    return position(grid, limits[0]) <= grid.qmax and position(grid, limits[1]) >= grid.qmin


def saturate(work: Work, node: ir.Node, integers: ir.Value, grid: Grid, limits: Range, scale: int = 1) -> str:
    """Makes quantized values keep within limits that are tighter than their grid.

    The integers get a Clip; or, unless exactness is asked for, the grid is fitted to the limits, which makes it finer
    and spares the Clip.

    Args:
        work: The model.
        node: The op that quantizes.
        integers: Its output.
        grid: Its per-tensor grid.
        limits: Float values, which the grid overlaps.
        scale: Input of `node` with the scale; the zero point follows.

    Returns:
        What keeps the values within the limits now.
    """
    low, high = max(position(grid, limits[0]), grid.qmin), min(position(grid, limits[1]), grid.qmax)
    if (low, high) == (grid.qmin, grid.qmax):
        return "the quantizer behind it saturates at the same values"
    dequantizers = users(integers)
    if not work.exact and grid.dtype == np.uint8 and _may_change(work, integers, dequantizers):
        fitted = activation_grid(max(limits[0], float(grid.low)), min(limits[1], float(grid.high)), 8)
        parameters = (
            work.editor.weight(f"{integers.name}_scale", fitted.scale),
            work.editor.weight(f"{integers.name}_zero_point", fitted.zero_point),
        )
        for user, first in ((node, scale), *((n, 1) for n in dequantizers)):
            set_operand(user, first, parameters[0])
            set_operand(user, first + 1, parameters[1])
        return f"the quantizer behind it is fitted to {float(fitted.low):.4g}..{float(fitted.high):.4g}"
    name = integers.name
    ends = [work.editor.weight(f"{name}_{k}", np.asarray(v, grid.dtype)) for k, v in (("min", low), ("max", high))]
    clipped = work.editor.after(integers, "Clip", [integers, *ends], name=f"{name}_clip", like=integers)
    redirect(integers, clipped, dequantizers)
    return f"a Clip to {low:g}..{high:g} on the integers behind it replaces it"


def _may_change(work: Work, integers: ir.Value, readers: Sequence[ir.Node]) -> bool:
    """Whether all that reads the integers can have parameters of its own for them."""
    if integers.is_graph_output() or integer_clip(integers) is not None:
        return False
    for node in readers:
        if not is_op(node, "DequantizeLinear") or node.outputs[0].is_graph_output():
            return False
        # Behind an op that moves values, the same parameters are written once more.
        if any(work.kind(user) == "passthrough" or is_op(user, "QuantizeLinear") for user in users(node.outputs[0])):
            return False
    return bool(readers)
