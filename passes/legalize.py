"""Makes a quantized model that another tool wrote run in the target's integer kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from typing_extensions import override

from onnxcomp.errors import PassError
from onnxcomp.histogram import Histogram
from onnxcomp.model import all_nodes
from onnxcomp.passes._legalize import (
    bias,
    channels,
    check,
    clips,
    forms,
    halves,
    missing,
    moving,
    pairs,
    signed,
    weights,
)
from onnxcomp.passes._legalize.graph import Work
from onnxcomp.passes._legalize.ranges import Range
from onnxcomp.quant import RangeMethod, observed_range
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass
from onnxcomp.stats import Observer

_BINS = 8192
_ROUNDS = 12  # what one rule leaves another may take up; graphs seen need three

_RULES: Sequence[Callable[[Work], None]] = (
    halves.whole_floats,
    forms.sorted_nodes,
    forms.standard_domain,
    forms.scalar_parameters,
    forms.positive_axis,
    forms.clip_from_min_max,
    weights.fold_quantized_constants,
    weights.symmetric_weights,
    weights.written_zero_points,
    channels.channels_to_weights,
    signed.unsigned_activations,
    pairs.drop_inverse,
    pairs.merge_equal,
    pairs.drop_first_of_two,
    pairs.read_rounded,
    moving.pair_before_moves,
    moving.pair_behind_moves,
    clips.drop_activations,
)


@dataclass(frozen=True, kw_only=True)
class Legalize(Pass):
    """Rewrites a quantized model of any origin, QDQ or QOperator, into the form that integer kernels are found for.

    Needs no data. Outputs stay what they were up to rounding: integers, scales and what is saturated are kept. Tensors
    that the other tool left in float between quantized ops are quantized where the graph tells their range.

    Attributes:
        exact: Keep every integer what it is, up to ties in rounding. Otherwise a float16 model is computed in float32;
            a rounding that another follows is dropped; a grid of which a Relu leaves only a part is fitted to that
            part; a float value that is read besides its quantizer is read rounded; missing tensors are quantized. A
            tensor then differs by at most half a step of a grid, more of the model runs on integers, and fewer ops are
            left.
        calibrate: Observe the missing tensors, so that those are quantized too whose range the graph does not tell; it
            needs data.
        range: How their ranges are found.
    """

    name: ClassVar[str] = "legalize"
    summary: ClassVar[str] = "makes int8 models of other tools run in the target's integer kernels, without data"
    min_opset: ClassVar[int] = 13  # DequantizeLinear along an axis

    exact: bool = False
    calibrate: bool = False
    range: RangeMethod = "mse"

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        if not context.capabilities.placements:
            raise PassError(f"target {context.capabilities.target!r} has no integer kernels")

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        if not self.calibrate or self.exact:
            return {}
        names = {v.name for v in model.graph.inputs} | {v.name for n in model.graph for v in n.outputs}
        wanted: dict[str, Observer] = {}

        def anything(value: ir.Value) -> Range | None:
            """Whatever is asked for is observed; with a pair there, the next tensor may turn out to be missing."""
            if value.name not in names:
                return None
            wanted[value.name or ""] = Histogram(_BINS)
            return -1.0, 1.0

        _rewrite(self._work(model.clone(), context), anything)
        return wanted

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        if not any("quantizelinear" in n.op_type.lower() or "Integer" in n.op_type for n in all_nodes(model)):
            return []
        work = self._work(model, context)

        def observed(value: ir.Value) -> Range | None:
            histogram = context.statistics.get(value.name or "")
            return observed_range(histogram, self.range, 8) if isinstance(histogram, Histogram) else None

        _rewrite(work, observed)
        check.refuse_rest(work)
        return [*work.edits, *work.refusals.values()]

    def _work(self, model: ir.Model, context: Context) -> Work:
        return Work(model=model, capabilities=context.capabilities, where=self.where, exact=self.exact)


def _rewrite(work: Work, observed: missing.Observed) -> None:
    """Applies the rules in order until none finds anything to do."""
    for _ in range(_ROUNDS):
        before = len(work.edits)
        work.refusals.clear()
        for rule in _RULES:
            _apply(work, rule)
        _apply(work, lambda w: missing.quantize_missing(w, observed))
        _apply(work, clips.drop_activations)
        _apply(work, bias.integer_biases)
        if len(work.edits) == before:
            return


def _apply(work: Work, rule: Callable[[Work], None]) -> None:
    """One rule; what it left without a reader goes, since rules count readers."""
    before = len(work.edits)
    rule(work)
    if len(work.edits) > before:
        IrPassAdapter(common_passes.RemoveUnusedNodesPass())(work.model)
