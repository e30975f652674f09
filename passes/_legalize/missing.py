"""Quantizes tensors that another tool left in float between ops which are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import onnx_ir as ir

from onnxcomp.edit import users
from onnxcomp.passes._legalize.graph import (
    Work,
    dequantized,
    insert_pair,
    is_op,
    only_reader,
    producer,
    stored,
    weight_of,
)
from onnxcomp.passes._legalize.ranges import Range, known_range
from onnxcomp.quant import activation_grid

Observed: TypeAlias = Callable[[ir.Value], Range | None]


def missing(work: Work) -> dict[ir.Value, ir.Node]:
    """Tensors that have to be quantized for an op to run on integers, and the op.

    These are the input of a linear op with a quantized weight; the output of one whose kind needs that; the inputs of
    an elementwise op whose output is quantized.
    """
    found: dict[ir.Value, ir.Node] = {}
    if not any(stored(n.inputs[0]) is None for n in work.model.graph if is_op(n, "QuantizeLinear")):
        return found  # only weights are quantized, and that is meant
    for node in work.nodes(*work.capabilities.placements):
        for value in _wanted(work, node):
            if value.dtype in (None, ir.DataType.FLOAT) and not _is_quantized(value):
                found.setdefault(value, node)
    return found


def _wanted(work: Work, node: ir.Node) -> list[ir.Value]:
    if weight_of(node) is not None:
        values = [v for v in node.inputs[:1] if v is not None and stored(v) is None and dequantized(v) is None]
        if work.capabilities.placements[node.op_type].output:
            values.append(_saturated(node.outputs[0]))
        return values
    if work.kind(node) == "elementwise" and len(node.outputs) == 1:
        quantize = only_reader(_saturated(node.outputs[0]), "QuantizeLinear")
        inputs = [v for v in node.inputs if v is not None]
        if quantize is not None and any(dequantized(v) for v in inputs):
            return [v for v in inputs if stored(v) is None and dequantized(v) is None]
    return []


def _saturated(value: ir.Value) -> ir.Value:
    """Output of the Relu or Clip that alone reads `value`, else `value`."""
    activation = only_reader(value, "Relu", "Clip")
    return value if activation is None else activation.outputs[0]


def _is_quantized(value: ir.Value) -> bool:
    return any(is_op(u, "QuantizeLinear") and u.inputs[0] is value for u in users(value)) or (
        producer(value, "DequantizeLinear") is not None
    )


def quantize_missing(work: Work, observed: Observed) -> None:
    """Puts Q/DQ pairs on missing tensors, with the range that data or else the graph tells.

    Args:
        work: The model.
        observed: Gives the range of a value from data; None where there is none.
    """
    for value, node in missing(work).items():
        if work.exact:
            work.refuse(node, f"{value.name!r} is not quantized, and has to stay exact")
            continue
        limits, origin = observed(value), "observed"
        if limits is None:
            limits, origin = known_range(work, value), "known from the graph"
        if limits is None:
            work.refuse(
                node,
                f"{value.name!r} is not quantized, and its range is not known from the graph; set `calibrate` and give "
                "calibration data",
            )
            continue
        insert_pair(work, value, activation_grid(*limits, 8))
        work.done(node, f"{value.name!r} quantized to {limits[0]:.4g}..{limits[1]:.4g}, the range {origin}")
