"""Mixed precision: int8 where it pays, float where int8 costs too much of the outputs or is no faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import onnx_ir as ir
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.macs import count_macs
from onnxcomp.passes._sensitivity import LayerCost, Trials, decibels
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Context, Edit, Pass, refused
from onnxcomp.stats import Observer

_TOTAL = ""  # key of the whole run in the timer's answer


@dataclass(frozen=True, kw_only=True)
class Mixed(Pass):
    """Quantizes like `quantize`, but leaves linear ops in float until the outputs are good enough.

    Ops that run no faster on integers *as measured on the target* stay in float from the start, if the whole model is
    not slower for it. The others go back to float in the order of the error that they cause alone, end to end, for each
    microsecond that they save, until `min_sqnr` is reached. Without a target to measure on, multiply-accumulates stand
    for time.

    Attributes:
        min_sqnr: SQNR of the worst output against the original to reach, in dB, on the first calibration feeds.
        max_time: Most of the float model's time to take, as measured; goes before `min_sqnr`.
        samples: Feeds that outputs are compared on.
        quantize: How ops are quantized; its `where` is ignored for that of this pass.
    """

    name: ClassVar[str] = "mixed"
    summary: ClassVar[str] = "int8 with float fallbacks, chosen by measured error and measured time"
    min_opset: ClassVar[int] = Quantize.min_opset

    min_sqnr: Annotated[float, Gt(0.0), Le(120.0)] = 25.0
    max_time: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    samples: Annotated[int, Ge(1), Le(256)] = 8
    quantize: Quantize = field(default_factory=Quantize)

    @property
    def _step(self) -> Quantize:
        return replace(self.quantize, where=self.where)

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        self._step.requires(model, context)

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return self._step.observers(model, context)

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        if not context.statistics:  # nothing to quantize
            return self._step.apply(model, context)
        trials = Trials(model=model, context=context, step=self._step, samples=self.samples)
        nodes = {n.name or "": n for n in trials.linears()}
        search = _Search(trials, trials.costs(nodes.values()), context, self)
        floats = search.run()
        edits = trials.quantize(model, trials.where_not(floats))
        edits += [refused(nodes[name], reason) for name, reason in floats.items()]
        return [*edits, Edit(action="applied", node="", op_type="model", detail=search.outcome)]


class _Search:
    """The choice of ops that stay in float."""

    def __init__(self, trials: Trials, costs: Sequence[LayerCost], context: Context, settings: Mixed) -> None:
        self.trials = trials
        self.settings = settings
        self.timer = context.timer
        self.sample = context.sample
        self.float_times = self._times(trials.model)
        self.total = self.float_times.get(_TOTAL, 0.0)
        self.costs = costs
        self.outcome = ""

    def run(self) -> dict[str, str]:
        """Name of each op that stays in float, in the order of choice, to the reason."""
        integer_times = self._times(self.trials.without(()))
        saved = {c.node: self._saved(c.node, integer_times) for c in self.costs}
        floats = self._no_faster(saved, integer_times)
        order = sorted(
            (c for c in self.costs if c.node not in floats),
            key=lambda c: c.error / max(saved[c.node], 1e-3),
            reverse=True,
        )
        count, error = self._least(floats, order)
        while count and self._too_slow({**floats, **dict.fromkeys((c.node for c in order[:count]), "")}):
            count -= max(1, count // 8)
            error = self._error(floats, order, count)
        for cost in order[:count]:
            floats[cost.node] = f"left in float: alone it costs the outputs {cost.sqnr:.1f} dB SQNR"
        self.outcome = f"{len(self.costs) - len(floats)} of {len(self.costs)} linear ops quantized; "
        self.outcome += f"SQNR {decibels(error):.1f} dB on {self.settings.samples} calibration feeds"
        if decibels(error) < self.settings.min_sqnr:
            self.outcome += f", short of {self.settings.min_sqnr:g} dB"
            self.outcome += " within max_time" if self.settings.max_time is not None else " whatever stays in float"
        return floats

    def _no_faster(self, saved: Mapping[str, float], integer_times: Mapping[str, float]) -> dict[str, str]:
        if not self.total:
            return {}
        reason = "left in float: {:.0f} us in float, {:.0f} us on integers"
        found = {
            c.node: reason.format(self.float_times[c.node], integer_times[c.node])
            for c in self.costs
            if saved[c.node] <= 0.0 and c.node in integer_times
        }
        if found and self._times(self.trials.without(found))[_TOTAL] > integer_times[_TOTAL]:
            return {}  # converting between float and integers takes more than was gained
        return found

    def _least(self, floats: Mapping[str, str], order: Sequence[LayerCost]) -> tuple[int, float]:
        """The fewest further ops in float that give the wanted SQNR, by bisection, and the error then."""
        wanted = 10.0 ** (-self.settings.min_sqnr / 10.0)
        low, high = 0, len(order)
        errors: dict[int, float] = {}
        while low < high:
            middle = (low + high) // 2 if errors else 0
            errors[middle] = self._error(floats, order, middle)
            if errors[middle] <= wanted:
                high = middle
            else:
                low = middle + 1
        return low, errors[low] if low in errors else self._error(floats, order, low)

    def _error(self, floats: Mapping[str, str], order: Sequence[LayerCost], count: int) -> float:
        return self.trials.difference(self.trials.without({*floats, *(c.node for c in order[:count])}))[0]

    def _too_slow(self, floats: Mapping[str, str]) -> bool:
        limit = self.settings.max_time
        return bool(limit and self.total and self._times(self.trials.without(floats))[_TOTAL] > limit * self.total)

    def _saved(self, node: str, integer_times: Mapping[str, float]) -> float:
        """Microseconds that integers save, or multiply-accumulates if nothing can be measured."""
        if node in self.float_times and node in integer_times:
            return self.float_times[node] - integer_times[node]
        return float(max(count_macs(self.trials.model.graph.node(node), 1), 1))

    def _times(self, model: ir.Model) -> Mapping[str, float]:
        return {} if self.timer is None or self.sample is None else self.timer(model, self.sample)
