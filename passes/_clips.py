"""Turns a chain of Min, Max, Relu and Clip with constant bounds into one Clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, constant, sole_reader
from onnxcomp.opset import opset
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select
from onnxcomp.target import Array

_MIN_OPSET = 11  # from then on the bounds of Clip are inputs
_OPS = frozenset({"Clip", "Max", "Min", "Relu"})


@dataclass(frozen=True)
class _Clip:
    """A node that clips `source` to `[low, high]`; `bound` is one of its constants, None for a Relu."""

    source: ir.Value
    low: float
    high: float
    bound: Array | None


def merge_clips(model: ir.Model, where: Select) -> list[Edit]:
    """Merges every chain of two or more in the main graph that nobody else reads in between."""
    edits: list[Edit] = []
    if opset(model) < _MIN_OPSET:
        return edits
    editor = Editor(model)
    for node in list(model.graph):
        if node.graph is not None:  # else it went with an earlier chain
            edits += _merge(editor, node, where)
    return edits


def _merge(editor: Editor, first: ir.Node, where: Select) -> list[Edit]:
    chain: list[ir.Node] = []
    clips: list[_Clip] = []
    node: ir.Node | None = first
    while node is not None and where(node) and (clip := _read(node)) is not None:
        if chain and clip.source is not chain[-1].outputs[0]:
            break
        chain.append(node)
        clips.append(clip)
        node = sole_reader(node.outputs[0])
    bound = next((c.bound for c in clips if c.bound is not None), None)
    if len(chain) < 2 or bound is None:
        return []
    low, high = -math.inf, math.inf
    for clip in clips:
        low, high = (min(max(end, clip.low), clip.high) for end in (low, high))
    last = chain[-1]
    limits = [
        None if math.isinf(end) else editor.weight(f"{last.name}_{name}", np.asarray(end, bound.dtype))
        for name, end in (("min", low), ("max", high))
    ]
    inputs = [clips[0].source, *(limits[:1] if limits[1] is None else limits)]
    output = last.outputs[0]
    merged = editor.before(last, "Clip", inputs, name=f"{last.name}_clip", like=output)
    name = output.name
    ir.convenience.replace_all_uses_with(output, merged, replace_graph_outputs=True)
    for old in reversed(chain):
        editor.graph.remove(old, safe=True)
    merged.name = name
    return [applied(old, f"merged into one Clip to [{low:g}, {high:g}]") for old in chain]


def _read(node: ir.Node) -> _Clip | None:
    """What the node clips and to what; None if it is no such node."""
    if node.domain != "" or node.op_type not in _OPS or node.inputs[0] is None:
        return None
    variable = [v for v in node.inputs if v is not None and constant(v) is None]
    if len(variable) != 1 or (node.op_type == "Clip" and variable[0] is not node.inputs[0]):
        return None
    source = variable[0]
    if node.op_type == "Relu":
        return _Clip(source, 0.0, math.inf, None)
    arrays = [constant(v) for v in node.inputs if v is not source]
    bounds = [a for a in arrays if a is not None]
    if not bounds or not all(_is_bound(a, source) for a in bounds):
        return None
    ends = [None if a is None else float(a.reshape(-1)[0]) for a in arrays]
    known = [e for e in ends if e is not None]
    if any(math.isnan(e) for e in known):
        return None
    if node.op_type == "Max":
        return _Clip(source, max(known), math.inf, bounds[0])
    if node.op_type == "Min":
        return _Clip(source, -math.inf, min(known), bounds[0])
    low, high = (*ends, None)[:2]
    high = math.inf if high is None else high
    return _Clip(source, min(-math.inf if low is None else low, high), high, bounds[0])


def _is_bound(array: Array, source: ir.Value) -> bool:
    """Whether a constant is one floating point number that does not raise the rank of what it is compared with."""
    rank = 0 if source.shape is None else len(source.shape)
    return array.size == 1 and array.ndim <= rank and array.dtype in (np.float16, np.float32, np.float64)
