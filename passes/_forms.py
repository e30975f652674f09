"""The choice of a form for each linear op, under limits on error, time and size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxcomp.macs import count_macs
from onnxcomp.model import model_size
from onnxcomp.passes._narrow import by_cost, has_kernel, narrow
from onnxcomp.passes._sensitivity import LayerCost, Trials, decibels
from onnxcomp.passes._timings import WHOLE, Timer, Timing


@dataclass(frozen=True, kw_only=True)
class Forms:
    """The ops that are not quantized to 8 bits.

    Attributes:
        floats: Name of each op that stays in float, in the order of choice, to the reason.
        narrow: Names of those that get 4-bit weights.
    """

    floats: dict[str, str] = field(default_factory=dict)
    narrow: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Search:
    """Finds the forms; every step is greedy, and the same for the same times.

    Attributes:
        trials: Builds and compares copies of the model.
        costs: What each linear op costs alone.
        timer: Measures copies on the target.
        min_sqnr: SQNR of the worst output to reach in dB.
        max_drop: Most samples, as a share, whose largest output element may move.
        max_time: Most of the float model's time.
        max_size: Most weight bytes; up to 1, as a share of the float model's.
    """

    trials: Trials
    costs: Sequence[LayerCost]
    timer: Timer
    min_sqnr: float | None = None
    max_drop: float | None = None
    max_time: float | None = None
    max_size: float | None = None
    _notes: list[str] = field(default_factory=list)

    def run(self) -> Forms:
        """The forms that hold the limits, or come closest."""
        float_times, integer_times = self.timer(self.trials.model, self.trials.without(()), nodes=True)
        saved = {c.node: self._saved(c, float_times, integer_times) for c in self.costs}
        floats = self._no_faster(float_times, integer_times)
        order = sorted(
            (c for c in self.costs if c.node not in floats),
            key=lambda c: c.error / max(saved[c.node], 1e-3),
            reverse=True,
        )
        for cost in order[: self._fewest(floats, order)]:
            floats[cost.node] = f"left in float: alone it costs the outputs {cost.sqnr:.1f} dB SQNR"
        if self.max_time is not None and float_times:
            self._give_up(floats, lambda kept: self._in_time(kept, self.max_time), "max_time")
        if self.max_size is not None:
            self._give_up(floats, lambda kept: self._bytes(kept) <= self._size_limit(), "max_size")
        return Forms(floats=floats, narrow=self._narrowed(floats))

    def outcome(self, forms: Forms) -> str:
        """What became of the model, in one line."""
        error, flips = self.trials.difference(self._build(forms.floats, forms.narrow))
        count = len(self.costs) - len(forms.floats)
        text = f"{count} of {len(self.costs)} linear ops quantized"
        text += f", {len(forms.narrow)} of them to 4-bit weights" if forms.narrow else ""
        text += f"; SQNR {decibels(error):.1f} dB"
        text += f", largest element moved in {flips:.1%}" if self.max_drop is not None else ""
        text += f" on {self.trials.samples} calibration feeds"
        within = [name for name in ("max_time", "max_size") if getattr(self, name) is not None]
        reason = f" within {' and '.join(within)}" if within else " whatever stays in float"
        if self.min_sqnr is not None and decibels(error) < self.min_sqnr:
            text += f", short of {self.min_sqnr:g} dB{reason}"
        if self.max_drop is not None and flips > self.max_drop:
            text += f", more than max_drop {self.max_drop:g}{reason}"
        return "; ".join([text, *self._notes])

    def _no_faster(self, float_times: dict[str, Timing], integer_times: dict[str, Timing]) -> dict[str, str]:
        """Ops that are surely no faster on integers, if leaving all of them in float makes the model no slower."""
        found: dict[str, str] = {}
        unclear = 0
        for node in (c.node for c in self.costs):
            if node not in float_times or node not in integer_times:
                continue
            before, after = float_times[node], integer_times[node]
            if before.below(after) or (before == after and not before.spread):
                found[node] = f"left in float: {before.median:.0f} us in float, {after.median:.0f} us on integers"
            else:
                unclear += not after.below(before)
        if unclear:
            self._notes.append(f"{unclear} quantized though times are too noisy to tell whether that is faster")
        if not found:
            return found
        partly, whole = self.timer(self.trials.without(found), self.trials.without(()))
        slower = partly[WHOLE].median > whole[WHOLE].median
        return {} if slower else found  # converting between float and integers takes more than was gained

    def _fewest(self, floats: Collection[str], order: Sequence[LayerCost]) -> int:
        """The fewest further ops in float that give the wanted fidelity, by bisection."""
        low, high = 0, len(order)
        if self._good(floats):
            return 0
        while low < high:
            middle = (low + high) // 2
            if self._good({*floats, *(c.node for c in order[:middle])}):
                high = middle
            else:
                low = middle + 1
        return low

    def _good(self, floats: Collection[str]) -> bool:
        error, flips = self.trials.difference(self.trials.without(floats))
        return (self.min_sqnr is None or decibels(error) >= self.min_sqnr) and (
            self.max_drop is None or flips <= self.max_drop
        )

    def _give_up(self, floats: dict[str, str], holds: Callable[[Collection[str]], bool], name: str) -> None:
        """Quantizes ops again, the last chosen first, an eighth at a time, until a limit holds."""
        while floats and not holds(floats):
            for _ in range(max(1, len(floats) // 8)):
                floats.popitem()
        if not floats and not holds(floats):
            self._notes.append(f"{name} cannot be held by 8 bits")

    def _in_time(self, floats: Collection[str], limit: float | None) -> bool:
        """Whether it holds beyond the noise; when in doubt it does not."""
        assert limit is not None
        before, after = (t[WHOLE] for t in self.timer(self.trials.model, self.trials.without(floats)))
        return after.median + after.spread <= limit * (before.median - before.spread)

    def _size_limit(self) -> float:
        assert self.max_size is not None
        return self.max_size * model_size(self.trials.model).weight_bytes if self.max_size <= 1.0 else self.max_size

    def _bytes(self, floats: Collection[str], narrowed: Collection[str] = ()) -> int:
        return model_size(self._build(floats, narrowed)).weight_bytes

    def _build(self, floats: Collection[str], narrowed: Collection[str]) -> ir.Model:
        trial = self.trials.without({*floats, *narrowed})
        narrow(trial, narrowed, self.trials)
        return trial

    def _narrowed(self, floats: Collection[str]) -> tuple[str, ...]:
        """The fewest ops with 4-bit weights that hold the size."""
        if self.max_size is None or self._bytes(floats) <= self._size_limit():
            return ()
        if not has_kernel(self.trials.context.capabilities):
            self._notes.append("the target has no kernel for 4-bit weights")
            return ()
        order = by_cost(self.trials, [n for n in self.trials.linears() if n.name not in floats])
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            if self._bytes(floats, order[:middle]) <= self._size_limit():
                high = middle
            else:
                low = middle + 1
        if self._bytes(floats, order[:low]) > self._size_limit():
            self._notes.append(f"max_size cannot be held: {self._bytes(floats, order[:low])} bytes of weights are left")
        elif low:
            self._notes = [note for note in self._notes if not note.startswith("max_size")]
        return tuple(order[:low])

    def _saved(self, cost: LayerCost, float_times: dict[str, Timing], integer_times: dict[str, Timing]) -> float:
        """Microseconds that integers save, or multiply-accumulates if nothing can be measured."""
        if cost.node in float_times and cost.node in integer_times:
            return float_times[cost.node].median - integer_times[cost.node].median
        return float(max(count_macs(self.trials.model.graph.node(cost.node), 1), 1))
