"""What quantizing each linear op alone costs the outputs of the model, measured end to end."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.metrics import top1_agreement
from onnxcomp.passes._placement import plan
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Context, Edit
from onnxcomp.select import Select
from onnxcomp.stats import Group, Observer
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """What one linear op costs when it alone is quantized.

    Attributes:
        node: Its name.
        op_type: Its op type.
        error: Squared error of the outputs over their squared norm, worst output.
        flips: Share of samples for which the largest element of an output is another one, worst output; of positions
            for outputs that look like class scores (rank 2 or 3), whose last axis holds the classes.
    """

    node: str
    op_type: str
    error: float
    flips: float

    @property
    def sqnr(self) -> float:
        """SQNR of the outputs in dB."""
        return decibels(self.error)


def decibels(error: float) -> float:
    """SQNR in dB of a relative squared error."""
    return float(-10.0 * np.log10(max(error, 1e-20)))


@dataclass(kw_only=True)
class Trials:
    """Quantizes copies of a model in part, and compares their outputs with those of the original.

    Attributes:
        model: The float model; unchanged.
        context: With a sweep over the data, and the statistics known so far.
        step: How ops are quantized.
        samples: Number of feeds that outputs are compared on.
    """

    model: ir.Model
    context: Context
    step: Quantize
    samples: int
    _reference: list[list[Array]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = replace(self.context, statistics=dict(self.context.statistics))
        self._reference = self._outputs(self.model)

    def linears(self) -> list[ir.Node]:
        """The linear ops that can be quantized, in order."""
        return [linear.node for linear in plan(self.model, self.context.capabilities, self.step.where).linears]

    def refusals(self) -> list[Edit]:
        """Why the others cannot."""
        return plan(self.model, self.context.capabilities, self.step.where).refusals

    def costs(self, nodes: Iterable[ir.Node]) -> list[LayerCost]:
        """Quantizes each node alone."""
        found = []
        for node in nodes:
            error, flips = self.difference(self.only((node.name or "",)))
            found.append(LayerCost(node=node.name or "", op_type=node.op_type, error=error, flips=flips))
        return found

    def only(self, names: Collection[str]) -> ir.Model:
        """A copy in which the named nodes alone are quantized."""
        trial = self.model.clone()
        self.quantize(trial, Select(name=tuple(exactly(n) for n in names)))
        return trial

    def without(self, floats: Collection[str]) -> ir.Model:
        """A copy in which all but the named nodes are quantized."""
        trial = self.model.clone()
        self.quantize(trial, self.where_not(floats))
        return trial

    def where_not(self, floats: Collection[str]) -> Select:
        """The step's selector less the named nodes."""
        return replace(self.step.where, skip=(*self.step.where.skip, *(exactly(n) for n in sorted(floats))))

    def quantize(self, model: ir.Model, where: Select) -> list[Edit]:
        """Quantizes what `where` takes, in place; observes what was not observed before."""
        step = replace(self.step, where=where)
        known: Mapping[str, Observer] = self.context.statistics
        wanted = {k: _missing(v, known.get(k)) for k, v in step.observers(model, self.context).items()}
        missing = {k: Group(*parts) for k, parts in wanted.items() if parts}
        if missing:
            self.sweep(self.model, missing)
            merged = {k: Group(*_parts(known.get(k)), *v.parts) for k, v in missing.items()}
            self.context = replace(self.context, statistics={**known, **merged})
        return list(step.apply(model, self.context))

    def difference(self, trial: ir.Model) -> tuple[float, float]:
        """Relative squared error of the outputs, and the share of samples whose largest element moved; the worst."""
        errors, flips = [0.0], [0.0]
        for want, got in zip(self._reference, self._outputs(trial), strict=True):
            noise = sum(float(((a.astype(np.float64) - b) ** 2).sum()) for a, b in zip(got, want, strict=True))
            power = sum(float((b.astype(np.float64) ** 2).sum()) for b in want)
            errors.append(noise / power if power else 0.0)
            flips.append(float(np.mean([_moved(a, b) for a, b in zip(got, want, strict=True) if a.size])))
        return max(errors), max(flips)

    def _outputs(self, model: ir.Model) -> list[list[Array]]:
        recorders = {v.name or "": Recorder() for v in self.model.graph.outputs}
        self.sweep(model, recorders, self.samples)
        kept = [r.arrays for r in recorders.values()]
        return [arrays for arrays in kept if arrays and np.issubdtype(arrays[0].dtype, np.floating)]

    def sweep(self, model: ir.Model, observers: Mapping[str, Observer], limit: int | None = None) -> None:
        """Shows the data, or `limit` feeds of it, to observers.

        Raises:
            CalibrationError: If there is no data.
        """
        if self.context.sweep is None:
            raise CalibrationError("it needs calibration data; give some with --data")
        self.context.sweep(model, observers, limit)


def _moved(got: Array, want: Array) -> float:
    """Share of positions whose largest entry moved; an array that holds no class scores is one position."""
    if want.ndim not in (2, 3) or want.shape[-1] < 2:
        got, want = got.reshape(1, -1), want.reshape(1, -1)
    return 1.0 - top1_agreement(want, got)


def _parts(observer: Observer | None) -> tuple[Observer, ...]:
    return () if observer is None else observer.parts if isinstance(observer, Group) else (observer,)


def _missing(wanted: Observer, known: Observer | None) -> list[Observer]:
    """The parts of `wanted` of a kind that `known` has not."""
    kinds = {type(part) for part in _parts(known)}
    return [part for part in _parts(wanted) if type(part) not in kinds]


class Recorder(Observer):
    """Keeps every array; for a few feeds only."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []

    @override
    def update(self, x: Array) -> None:
        self.arrays.append(np.array(x))

    @override
    def merge(self, other: Recorder) -> None:
        self.arrays += other.arrays


def exactly(name: str) -> str:
    """Pattern that takes this name alone."""
    return "re:" + re.escape(name)
