"""Ranges of values that follow from the graph alone, without data.

Two ranges are known of a value. It *reaches* no further than what computes it can give: a quantizer's range, the limits
of a Clip or Sigmoid, sums of these. And it *matters* no further than its readers can tell: what lies beyond the range
of a quantizer behind it, a Clip between them or an Add of a bounded value, is saturated there anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.passes._legalize.graph import (
    STANDARD,
    Work,
    clip_limits,
    dequantized,
    is_op,
    operand,
    quantized,
)

Range: TypeAlias = tuple[float, float]

_EVERYTHING: Range = (-np.inf, np.inf)
_BOUNDED: Mapping[str, Range] = {"Sigmoid": (0, 1), "HardSigmoid": (0, 1), "Softmax": (0, 1), "Tanh": (-1, 1)}
_AVERAGES = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
_DEPTH = 24


def known_range(work: Work, value: ir.Value) -> Range | None:
    """Range, zero included, outside of which nothing that `value` takes matters; None if one end is open."""
    low, high = _meet(_reach(work, value, _DEPTH), _matter(work, value, _DEPTH))
    if not np.isfinite([low, high]).all() or low > high:
        return None
    return min(low, 0.0), max(high, 0.0)


def _meet(one: Range, other: Range) -> Range:
    return max(one[0], other[0]), min(one[1], other[1])


def _join(ranges: list[Range]) -> Range:
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def _reach(work: Work, value: ir.Value | None, depth: int) -> Range:
    array = constant(value)
    if array is not None and array.size and array.dtype == np.float32:
        return float(array.min()), float(array.max())
    found = dequantized(value)
    if found is not None:
        return float(np.min(found[1].low)), float(np.max(found[1].high))
    node = None if value is None else value.producer()
    if node is None or node.domain not in STANDARD or not depth:
        return _EVERYTHING
    if node.op_type in _BOUNDED:
        return _BOUNDED[node.op_type]
    return _forward(work, node, depth - 1)


def _forward(work: Work, node: ir.Node, depth: int) -> Range:
    def inputs() -> list[Range]:
        return [_reach(work, v, depth) for v in node.inputs]

    if (limits := clip_limits(node)) is not None:
        low, high = inputs()[0]
        return min(max(low, limits[0]), limits[1]), max(min(high, limits[1]), limits[0])
    if work.kind(node) == "passthrough" or is_op(node, *_AVERAGES):
        return _join([inputs()[0], (0.0, 0.0)])
    rules: Mapping[str, Callable[[], Range]] = {
        "Add": lambda: _sum(inputs()),
        "Mul": lambda: _product(inputs()),
        "Concat": lambda: _join(inputs()),
        "LeakyRelu": lambda: _leaky(inputs()[0], float(attribute(node, "alpha", 0.01))),
        "HardSwish": lambda: (-0.375, max(inputs()[0][1], 0.0)),
    }
    rule = rules.get(node.op_type)
    return _EVERYTHING if rule is None else rule()


def _sum(ranges: list[Range]) -> Range:
    return sum(r[0] for r in ranges), sum(r[1] for r in ranges)


def _product(ranges: list[Range]) -> Range:
    one, other = ranges
    if not np.isfinite([*one, *other]).all():
        return _EVERYTHING
    corners = [a * b for a in one for b in other]
    return min(corners), max(corners)


def _leaky(given: Range, alpha: float) -> Range:
    if alpha < 0.0:
        return _EVERYTHING
    low, high = (v if v > 0.0 else v * alpha if alpha else 0.0 for v in given)
    return low, high


def _matter(work: Work, value: ir.Value, depth: int) -> Range:
    uses = value.uses()
    if not uses or value.is_graph_output() or not depth:
        return _EVERYTHING
    return _join([_needed(work, node, index, depth - 1) for node, index in uses])


def _needed(work: Work, node: ir.Node, index: int, depth: int) -> Range:
    """Range of an input beyond which the output of `node` does not change any more."""
    if is_op(node, "QuantizeLinear"):
        found = quantized(node)
        return _EVERYTHING if found is None else (float(np.min(found[0].low)), float(np.max(found[0].high)))
    if node.graph is not work.model.graph or len(node.outputs) != 1:
        return _EVERYTHING
    if is_op(node, "HardSigmoid"):
        alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
        return _EVERYTHING if alpha <= 0.0 else (-beta / alpha, (1.0 - beta) / alpha)
    output = node.outputs[0]
    if index == 0 and (limits := clip_limits(node)) is not None:
        return _meet(limits, _matter(work, output, depth))
    if is_op(node, "Concat") or (work.kind(node) == "passthrough" and index == 0):
        return _matter(work, output, depth)
    if is_op(node, "Add"):
        low, high = _matter(work, output, depth)
        least, most = _reach(work, operand(node, 1 - index), depth)
        return low - most, high - least
    if is_op(node, "LeakyRelu") and (alpha := float(attribute(node, "alpha", 0.01))) > 0.0:
        low, high = _matter(work, output, depth)
        return (low / alpha if low < 0.0 else low), (high / alpha if high < 0.0 else high)
    return _EVERYTHING
