"""Thresholds of a streaming model: how far the outputs of a calibration sequence may stray from the dense model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CalibrationError
from onnxcomp.ops import SPARSITY
from onnxcomp.passes._delta_holds import Holds, Place
from onnxcomp.passes._delta_shapes import show_all
from onnxcomp.rewrite import Context
from onnxcomp.state import STATE_KEY, model_state
from onnxcomp.target import Array, Feed

_FINEST, _COARSEST = 2.0**-10, 4.0  # factors of the typical size of a value
_HALVINGS = 3  # of the interval that the global search ends with
_DOUBLINGS = 4  # that one layer may get beyond the global factor

Step = Mapping[str, Array]


@dataclass(frozen=True)
class Budget:
    """How far a stream may stray; one of both is given.

    Attributes:
        error: Root mean square of the outputs' difference over that of the outputs, worst output.
        agreement: Share of steps in which the largest element of the first output stays the same.
    """

    error: float | None = None
    agreement: float | None = None

    def spent(self, dense: Sequence[Step], found: Sequence[Step]) -> float:
        """Share of the budget that is used, more than 1 if it does not do."""
        if self.agreement is not None:
            first = next(iter(dense[0]))
            same = [np.argmax(a[first]) == np.argmax(b[first]) for a, b in zip(dense, found, strict=True)]
            allowed = max(1 - self.agreement, 0.5 / len(same))  # less than one step is none
            return float(1 - np.mean(same)) / allowed
        assert self.error is not None
        return max(_relative([d[n] for d in dense], [f[n] for f in found]) for n in dense[0]) / self.error


def _relative(dense: Sequence[Array], found: Sequence[Array]) -> float:
    size = sum(float(np.square(d, dtype=np.float64).sum()) for d in dense)
    off = sum(float(np.square(np.subtract(d, f, dtype=np.float64)).sum()) for d, f in zip(dense, found, strict=True))
    if not np.isfinite(off):
        return np.inf
    return float(np.sqrt(off / size)) if size else float(off > 0)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """What the model does before it is changed.

    Attributes:
        feeds: The calibration sequence.
        outputs: Floating outputs of every step, without those of state.
        sizes: Root mean square of the values to hold, by name.
    """

    feeds: Sequence[Feed]
    outputs: Sequence[Step]
    sizes: Mapping[str, float]


def run_dense(model: ir.Model, values: Sequence[ir.Value], context: Context, frames: int) -> Dense:
    """Runs the calibration sequence.

    Args:
        model: The model, not yet changed.
        values: Values that are going to be held.
        context: With feeds and a runner.
        frames: Most feeds to use.

    """
    assert context.runner is not None
    assert context.feeds is not None
    feeds = list(islice(context.feeds, frames))
    states = {s.output for s in model_state(model)}
    outputs = [v.name or "" for v in model.graph.outputs if v.name not in states and _floats(v)]
    probe, shown = show_all(model, values)
    names = {str(v.name): name for v, (name, _) in shown.items()}
    run = context.runner(probe, list(dict.fromkeys([*outputs, *names.values()])))
    squares = dict.fromkeys(names, 0.0)
    kept = []
    for feed in feeds:
        found = {**feed, **run(feed)}
        kept.append({name: np.array(found[name]) for name in outputs})
        for name, place in names.items():
            values_there = np.asarray(found[place], np.float64)  # of an untaken branch there are none
            squares[name] += float(np.square(values_there).mean()) / len(feeds) if values_there.size else 0.0
    return Dense(feeds=feeds, outputs=kept, sizes={n: float(np.sqrt(s)) for n, s in squares.items()})


def _floats(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def find_thresholds(
    holds: Holds, dense: Dense, budget: Budget, context: Context, method: Literal["global", "layers"]
) -> str:
    """Sets thresholds to the largest that keep to the budget.

    Returns:
        What the outcome costs, in words.

    Raises:
        CalibrationError: If there is no sequence, or no output to judge it by.
    """
    places = holds.places
    if len(dense.feeds) < 2 or not dense.outputs[0]:
        raise CalibrationError(
            f"thresholds are found on a sequence of at least 2 feeds ({len(dense.feeds)} given) and by floating "
            f"outputs ({len(dense.outputs[0])} found); set threshold instead"
        )
    with _threshold_inputs(holds, places):
        run = _stream(holds, dense, places, context)
        sizes = [dense.sizes.get(p.source or "", 1.0) or 1.0 for p in places]

        def spent(factors: Sequence[float]) -> float:
            return budget.spent(dense.outputs, run([f * s for f, s in zip(factors, sizes, strict=True)]))

        # A layer search needs something left to spend.
        factor = _largest(lambda f: spent([f] * len(places)), 1.0 if method == "global" else 0.5)
        factors = [factor] * len(places)
        used = spent(factors)
        if method == "layers" and factor:
            start = used
            for index in range(len(places)):
                allowed = start + (1 - start) * (index + 1) / len(places)
                for _ in range(_DOUBLINGS):
                    trial = [*factors[:index], 2 * factors[index], *factors[index + 1 :]]
                    if (found := spent(trial)) > allowed:
                        break
                    factors, used = trial, found
    for place, factor, size in zip(places, factors, sizes, strict=True):
        place.level = factor * size
    return f"thresholds use {used:.0%} of the budget on {len(dense.feeds)} calibration steps"


def _largest(spent: Callable[[float], float], limit: float) -> float:
    """The largest factor that spends at most `limit`, 0 if even the finest spends more."""
    factor = _FINEST
    if spent(factor) > limit:
        return 0.0
    while factor < _COARSEST and spent(2 * factor) <= limit:
        factor *= 2
    step = factor
    for _ in range(_HALVINGS if factor < _COARSEST else 0):
        step /= 2
        if spent(factor + step) <= limit:
            factor += step
    return factor


def note_densities(holds: Holds, dense: Dense, context: Context) -> None:
    """Notes the share of elements or pixels that is sent at every place in each calibration step but the first."""
    places = holds.places
    shares: dict[str, list[float]] = {p.slot.spec.output: [] for p in places}
    assert context.runner is not None
    run = context.runner(holds.model, list(shares))
    before: Step = {}
    for feed in dense.feeds:
        sent = run(feed)
        for place in places:
            name = place.slot.spec.output
            if before:
                changed = sent[name] != before[name]
                shares[name].append(float((changed.any(axis=1) if place.pixels else changed).mean()))
        before = {name: np.array(array) for name, array in sent.items()}
    for place in places:
        place.density = tuple(shares[place.slot.spec.output])
        of_node = [d for p in places if p.node is place.node for d in p.density]
        place.node.metadata_props[SPARSITY] = f"{1 - float(np.mean(of_node)):.4g}"


@contextmanager
def _threshold_inputs(holds: Holds, places: Sequence[Place]) -> Iterator[None]:
    """Makes thresholds inputs meanwhile, and state no more than inputs and outputs: one session for all trials."""
    model, graph = holds.model, holds.model.graph
    noted = model.metadata_props.pop(STATE_KEY)
    tensors = [p.threshold.const_value for p in places]
    for place in places:
        graph.initializers.pop(str(place.threshold.name))
        place.threshold.const_value = None
        graph.inputs.append(place.threshold)
    try:
        yield
    finally:
        del graph.inputs[len(graph.inputs) - len(places) :]
        for place, tensor in zip(places, tensors, strict=True):
            place.threshold.const_value = tensor
            graph.register_initializer(place.threshold)
        model.metadata_props[STATE_KEY] = noted


def _stream(
    holds: Holds, dense: Dense, places: Sequence[Place], context: Context
) -> Callable[[Sequence[float]], list[Step]]:
    """A function from thresholds to the outputs of the calibration sequence."""
    states = holds.states.all
    names = list(dense.outputs[0])
    assert context.runner is not None
    run = context.runner(holds.model, [*names, *(s.output for s in states)])

    def outputs(levels: Sequence[float]) -> list[Step]:
        fixed = {
            str(p.threshold.name): np.array(level, p.threshold.dtype.numpy() if p.threshold.dtype else np.float32)
            for p, level in zip(places, levels, strict=True)
        }
        carried = {s.input: s.zeros() for s in states}
        steps: list[Step] = []
        for feed in dense.feeds:
            found = run({**feed, **carried, **fixed})
            carried = {s.input: found[s.output] for s in states}
            steps.append({name: np.array(found[name]) for name in names})
        return steps

    return outputs
