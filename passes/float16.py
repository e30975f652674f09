"""Half precision: weights and activations in float16, or weights only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import Editor, constant, redirect, users
from onnxcomp.errors import CalibrationError
from onnxcomp.macs import MAC_OPS
from onnxcomp.passes._half import FLOAT, HALF, float_values, make_half, plan_half, to_half
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.select import Patterns
from onnxcomp.stats import Observer
from onnxcomp.target import Array

_COORDINATES = ("GridSample", "NonMaxSuppression", "Range", "Resize", "RoiAlign", "TopK")
"""Ops on coordinates and counts, of which float16 is exact up to 2048 only."""
_SPARED = ("QuantizeLinear", "DequantizeLinear")


class _Peak(Observer):
    """Largest magnitude of a tensor."""

    def __init__(self) -> None:
        self.value = 0.0

    @override
    def update(self, x: Array) -> None:
        if not np.isfinite(x).all():
            raise CalibrationError("NaN or infinity in an activation")
        self.value = max(self.value, float(np.abs(x).max(initial=0.0)))

    @override
    def merge(self, other: _Peak) -> None:
        self.value = max(self.value, other.value)


@dataclass(frozen=True, kw_only=True)
class Float16(Pass):
    """Stores weights in float16 and computes in it, where the target does; everything else stays float32 behind casts.

    A constant that float16 would change by more than 0.1 %, or cannot hold, stays float32 with the nodes that read it;
    the large negative numbers of masks become the largest that float16 has. So does a node whose values exceed half of
    the largest float16 on the calibration data. Without data, that is assumed of what Exp, Pow, sums of squares and the
    like put out.

    Constants that are no initializers stay as they are; the pass cleanup makes them so.

    With `weights_only` the weights are cast back where they are used: the file is half as large, and what is computed
    stays float32. onnxruntime does the cast once, when it loads the model, so that neither time nor memory changes.

    Attributes:
        weights_only: Store weights in float16 and compute in float32.
        keep_io: Inputs and outputs of the model stay float32.
        keep: Op types that stay float32.
        slow_target: What to do if the target has no float16 kernels and would cast around every op: `refuse`, or
            `convert` for use elsewhere. (onnxruntime 1.32 on a CPU even crashes when it loads a float16 MatMul behind
            a Transpose of leading axes, as recurrent layers have.)
        min_weights: With `weights_only`, smaller weights stay as they are.
    """

    name: ClassVar[str] = "float16"
    summary: ClassVar[str] = "half precision for targets that compute in it, or of the stored weights only"

    weights_only: bool = False
    keep_io: bool = True
    keep: Patterns = _COORDINATES
    slow_target: Literal["refuse", "convert"] = "refuse"
    min_weights: Annotated[int, Ge(0)] = 1024

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        if self.weights_only or context.sweep is None or self._refuses(context):
            return {}
        floats = float_values(model)
        made = {
            v.name for node in model.graph if self.where(node) for v in (*node.inputs, *node.outputs) if v is not None
        }
        constants = model.graph.initializers
        return {name: _Peak() for name in sorted(floats) if name in made and name not in constants}

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        if self.weights_only:
            return list(self._weights(model))
        plan = plan_half(model, self.where, self.keep, _peaks(context), float_values(model), keep_io=self.keep_io)
        if not any(node.op_type in MAC_OPS for node in (*plan.slots, *plan.refusals)):
            return []
        if self._refuses(context):
            target = context.capabilities.target
            reason = f"target {target!r} has no float16 kernels and would cast around every op, which is slower"
            reason += '; weights_only = true halves the file all the same, slow_target = "convert" is for other targets'
            return [refused(node, reason) for node in plan.slots if node.op_type in MAC_OPS]
        edits = [refused(node, reason) for node, reason in plan.refusals.items()]
        edits += [applied(node, "computes in float16") for node in plan.slots]
        edits += [refused(n, "it stands in a subgraph or function") for n in _elsewhere(model) if self.where(n)]
        if plan.slots:
            make_half(model, plan, keep_io=self.keep_io)
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _refuses(self, context: Context) -> bool:
        return self.slow_target == "refuse" and HALF not in context.capabilities.activation_dtypes

    def _weights(self, model: ir.Model) -> Iterator[Edit]:
        """Stores weights in float16, one after the other."""
        for graph in (model.graph, *model.graph.subgraphs()):
            editor: Editor | None = None
            for value in list(graph.initializers.values()):
                tensor = value.const_value
                readers = [
                    node for node in users(value) if node.op_type not in _SPARED and node.domain in ("", "ai.onnx")
                ]
                if tensor is None or tensor.dtype != FLOAT or tensor.size < max(self.min_weights, 1):
                    continue
                taken = [node for node in readers if self.where(node)]
                if not taken or value.is_graph_output():
                    continue
                array = constant(value)
                if len(taken) < len(users(value)) or array is None:
                    reason = (
                        "another node needs its weight in float32" if array is not None else "its weight is an input"
                    )
                    yield refused(taken[0], reason)
                    continue
                half = to_half(array)
                if isinstance(half, str):
                    yield refused(taken[0], f"its weight {value.name} stays float32: {half}")
                    continue
                editor = editor or Editor(model, graph)
                name = value.name or "weight"
                stored = editor.weight(f"{name}_f16", half)
                whole = editor.after(
                    stored, "Cast", [stored], name=f"{name}_f32", attributes={"to": FLOAT}, like=value, dtype=FLOAT
                )
                redirect(value, whole, taken)
                graph.initializers.pop(name)
                yield applied(taken[0], f"weight {name} stored in float16")


def _peaks(context: Context) -> dict[str, float]:
    return {name: peak.value for name, peak in context.statistics.items() if isinstance(peak, _Peak)}


def _elsewhere(model: ir.Model) -> Iterator[ir.Node]:
    """Products and convolutions outside of the main graph."""
    inner = (node for graph in model.graph.subgraphs() for node in graph)
    functions = (node for function in model.functions.values() for node in function.all_nodes())
    yield from (node for node in (*inner, *functions) if node.op_type in MAC_OPS)
