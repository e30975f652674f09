"""Gives streaming models kernels that compute what changed, and takes holds away that would save nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp import native
from onnxcomp.edit import Editor, constant, redirect, replace_output, users
from onnxcomp.macs import count_macs
from onnxcomp.model import infer_shapes
from onnxcomp.ops import DELTA_OPS, DOMAIN, SPARSITY
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.state import model_state
from onnxcomp.target import Array
from onnxcomp.targets.ort.delta_cells import CELLS, lower_cell, why_no_cell
from onnxcomp.targets.ort.delta_layers import layers
from onnxcomp.targets.ort.delta_maps import Maps, is_map
from onnxcomp.targets.ort.delta_products import lower_products
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.delta_strip import strip
from onnxcomp.targets.ort.dense_steps import DenseSteps

# Share of changed pixels, on average over the multiply-accumulates, beyond which some step takes as long as the dense
# model's; and that of a calibration sequence beyond which there is no use in the kernels.
_BREAK_EVEN = 0.35
_MOST_CHANGED = 0.6
_SHARE = 0.25  # of pixels of the input, where calibration did not tell how changes spread
DENSE = "onnxcomp.dense"
"""Key of a lowered model's `meta`: the model that computes everything, and the `DenseSteps` that are to run it."""


@dataclass(frozen=True, kw_only=True)
class NativeDelta(Pass):
    """Lowers what the pass `delta` writes.

    Convolutions and what lies between them go over to maps whose pixels lie together, with masks of the pixels that
    changed; products and recurrent cells to kernels that read the weights of changed inputs only. All of them update
    state in place. Holds that no kernel makes use of are taken away, with their state: they would only cost time.

    Attributes:
        kernels: The target has the kernels; else all holds are taken away.
    """

    name: ClassVar[str] = "native_delta"
    summary: ClassVar[str] = "Streaming ops to native kernels."

    kernels: bool = True

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        holds = [n for n in model.graph.all_nodes() if n.domain == DOMAIN and n.op_type in DELTA_OPS]
        if not holds:
            return []
        edits: list[Edit] = []
        infer_shapes(model)
        editor = Editor(model)
        states = StreamStates(model, editor)
        dense: tuple[ir.Model, DenseSteps] | None = None
        if self.kernels and native.available():
            maps = map_holds(model, holds)
            if (when := dense_steps(maps)) is not None:
                dense = model.clone(), when
                strip(dense[0])
            if maps:
                edits += lower_maps(model, editor, states, maps)
            edits += lower_vectors(model, editor, states, holds, "runs in the native library")
        states.write()
        edits += [refused(n, "no kernel skips what it holds, so it is left out, with its state") for n in strip(model)]
        if any(n.domain == native.DOMAIN and n.op_type.startswith("Delta") for n in model.graph):
            model.opset_imports.setdefault(native.DOMAIN, 1)
            if dense is not None and not model_state(dense[0]):
                model.meta[DENSE] = dense
        return edits


def lower_vectors(
    model: ir.Model, editor: Editor, states: StreamStates, holds: Sequence[ir.Node], done: str
) -> list[Edit]:
    """Lowers products behind holds, and recurrent cells, which both follow changed inputs.

    Args:
        model: The model.
        editor: Of its graph.
        states: Takes up the sums that changes are added to.
        holds: Portable streaming ops.
        done: What the edit of a cell says.
    """
    edits: list[Edit] = []
    for node in [n for n in holds if n.op_type == "DeltaHold" and n.graph is model.graph]:
        source, step, _ = _unrounded(node)
        edits += lower_products(model, editor, states, node, source, step)
    for node in [n for n in holds if n.op_type in CELLS]:
        reason = why_no_cell(model, node)
        if not reason:
            lower_cell(model, editor, states, node)
        edits.append(refused(node, reason) if reason else applied(node, done))
    return edits


def map_holds(model: ir.Model, holds: Sequence[ir.Node]) -> list[ir.Node]:
    """Holds of maps that kernels may take; none if so much changes that it would not pay.

    Args:
        model: The model.
        holds: Portable streaming ops.
    """
    found = [
        n for n in holds
        if n.op_type == "DeltaHoldPixels" and n.graph is model.graph and is_map(n.inputs[0]) and is_map(n.outputs[0])
    ]  # fmt: skip
    return [] if _changed(found) > _MOST_CHANGED else found


def _changed(holds: Sequence[ir.Node]) -> float:
    """Share of changed pixels on a calibration sequence, on average over the multiply-accumulates; NaN if not known."""
    macs = [float(sum(count_macs(n) for n in users(h.outputs[0]))) for h in holds]
    noted = [float(h.metadata_props.get(SPARSITY, math.nan)) for h in holds]
    total = math.fsum(macs)
    return 1 - math.fsum(m * n for m, n in zip(macs, noted, strict=True) if m) / total if total else math.nan


def dense_steps(holds: Sequence[ir.Node]) -> DenseSteps | None:
    """Which steps are faster with the dense model; None where no input is held as a map, or streams are to be exact.

    Args:
        holds: Holds of maps.
    """
    thresholds: dict[str, float] = {}
    of_inputs = []
    for hold in holds:
        source, step, _ = _unrounded(hold)
        if step.any():
            return None  # other kernels, other last bits: some would be rounded to another step
        level = constant(hold.inputs[3])
        if source.is_graph_input() and level is not None:
            thresholds[str(source.name)] = float(level)
            of_inputs.append(1 - float(hold.metadata_props.get(SPARSITY, math.nan)))
    if not thresholds:
        return None
    spread = _changed(holds) / max(of_inputs) if max(of_inputs) > 0 else math.nan
    share = _SHARE if math.isnan(spread) else min(_BREAK_EVEN / max(spread, _BREAK_EVEN), 0.9)
    return DenseSteps(thresholds=thresholds, share=share)


def lower_maps(model: ir.Model, editor: Editor, states: StreamStates, holds: Sequence[ir.Node]) -> list[Edit]:
    """Lowers what lies between holds of maps to nodes in the domain of the native library, in its layout.

    Args:
        model: The model.
        editor: Of its graph.
        states: Takes up what layers sent last.
        holds: Holds of maps, at least one.
    """
    started = holds[0].inputs[2]
    assert started is not None
    maps = Maps(model, editor, states, started)
    wanted = set(holds)
    done: list[ir.Node] = []
    for node in list(model.graph):
        if node in wanted and constant(node.inputs[3]) is not None:
            source, step, rounding = _unrounded(node)
            maps.hold(node, source, step)
            done += [*rounding, node]
            continue
        found = layers(node, maps)
        for layer in found:
            maps.layers[layer.value] = layer
        if found:
            done.append(node)
    covered = set(done)
    for node in done:
        for value in node.outputs:
            rest = [user for user in users(value) if user not in covered and user.domain != native.DOMAIN]
            is_output = value.is_graph_output()
            if (rest or is_output) and value in maps:
                left = maps.leave(value)
                redirect(value, left, rest)
                if is_output:
                    replace_output(value, left)
    for node in reversed(done):
        assert isinstance(node.graph, ir.Graph)
        if not any(users(v) or v.is_graph_output() for v in node.outputs):
            node.graph.remove(node, safe=True)
    return [
        applied(n, f"computes changed pixels only, by {n.op_type}")
        for n in model.graph
        if n.domain == native.DOMAIN and n.op_type == "DeltaConv"
    ]


def _unrounded(hold: ir.Node) -> tuple[ir.Value, Array, list[ir.Node]]:
    """The value before the rounding in front of a hold, the step, and the nodes that round."""
    none = np.zeros(1, np.float32)
    value = hold.inputs[0]
    assert value is not None
    chain: list[ir.Node] = []
    current: ir.Value | None = value
    for op_type in ("Mul", "Round", "Div"):
        node = None if current is None else current.producer()
        if node is None or node.op_type != op_type or len(users(node.outputs[0])) != 1:
            return value, none, []
        chain.append(node)
        current = node.inputs[0]
    step = constant(chain[0].inputs[1])
    if current is None or step is None or step.size != 1 or chain[0].inputs[1] is not chain[2].inputs[1]:
        return value, none, []
    return current, np.ravel(step).astype(np.float32), chain[::-1]
