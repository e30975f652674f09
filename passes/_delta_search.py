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

# Of changes that a threshold may hold back: never all of them, or what calibration did not see would be held as well.
_SHARES = np.linspace(0.0, 0.99, 100)
_SAMPLES = 2048  # changes of one value that a step adds to its distribution
_REFERENCE = 75  # index of the share at which a layer's part of the error is measured
_WEIGHTS = np.logspace(-6, 8, 57)  # of squared errors against shares of the cost, tried by bisection

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
        changes: Thresholds that hold back `_SHARES` of a value's changes from step to step, by name; elements of a
            product's input, of a map the root mean square over channels.
    """

    feeds: Sequence[Feed]
    outputs: Sequence[Step]
    changes: Mapping[str, Array]


def hardly_changes(dense: Dense, budget: Budget) -> bool:
    """Whether the first step's outputs would do for the whole sequence, so that it cannot tell what changes cost."""
    return len(dense.outputs) > 1 and budget.spent(dense.outputs, [dense.outputs[0]] * len(dense.outputs)) <= 1


def run_dense(model: ir.Model, values: Mapping[ir.Value, bool], context: Context, frames: int) -> Dense:
    """Runs the calibration sequence.

    Args:
        model: The model, not yet changed.
        values: Values that are going to be held, and whether channels are held together.
        context: With feeds and a runner.
        frames: Most feeds to use.
    """
    assert context.runner is not None
    assert context.feeds is not None
    feeds = list(islice(context.feeds, frames))
    states = {s.output for s in model_state(model)}
    outputs = [v.name or "" for v in model.graph.outputs if v.name not in states and _floats(v)]
    probe, shown = show_all(model, values)
    names = {str(v.name): (place, values[v]) for v, (place, _) in shown.items()}
    run = context.runner(probe, list(dict.fromkeys([*outputs, *(place for place, _ in names.values())])))
    seen: dict[str, list[Array]] = {name: [] for name in names}
    kept: list[Step] = []
    before: Step = {}
    for feed in feeds:
        found = {**feed, **run(feed)}
        kept.append({name: np.array(found[name]) for name in outputs})
        for name, (place, pixels) in names.items():
            if before and before[name].shape == found[place].shape and before[name].size:
                seen[name].append(_changes(found[place] - before[name], pixels=pixels))
        before = {name: np.array(found[place]) for name, (place, _) in names.items()}
    changes = {n: np.quantile(np.concatenate(c), _SHARES) if c else np.zeros(len(_SHARES)) for n, c in seen.items()}
    return Dense(feeds=feeds, outputs=kept, changes=changes)


def _changes(difference: Array, *, pixels: bool) -> Array:
    """Sizes of changes, a part of them if there are many."""
    if pixels and difference.ndim > 1:
        size = np.sqrt(np.square(difference, dtype=np.float32).mean(axis=1)).ravel()
    else:
        size = np.abs(difference).ravel()
    part: Array = size[:: -(-len(size) // _SAMPLES)]
    return part


def _floats(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def find_thresholds(
    holds: Holds, dense: Dense, budget: Budget, context: Context, method: Literal["global", "layers"]
) -> str:
    """Sets thresholds to the largest that keep to the budget.

    `global` holds the same share of changes back everywhere. `layers` holds back more where that saves much and costs
    little: the sum of multiply-accumulates times what is sent, plus a multiple of the squared errors that each layer
    alone brings to the outputs, is least.

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
    least = np.finfo(np.float32).tiny if holds.quantized else 0.0  # a step has to be something
    table = np.stack([dense.changes.get(p.source or "", np.zeros(len(_SHARES))) for p in places])
    table = np.maximum(table.astype(np.float64), least)
    with _threshold_inputs(holds, places):
        run = _stream(holds, dense, places, context)

        def spent(levels: Array) -> float:
            return budget.spent(dense.outputs, run(levels.tolist()))

        if method == "global":
            levels = _most(lambda i: table[:, i], len(_SHARES), spent)
        else:
            errors = _errors_alone(table[:, _REFERENCE], dense, run)
            costs = holds.costs / holds.costs.sum()
            levels = _most(lambda i: _balanced(table, errors, costs, _WEIGHTS[-1 - i]), len(_WEIGHTS), spent)
        used = spent(levels)
    for place, level in zip(places, levels, strict=True):
        place.level = float(level)
    return f"thresholds use {used:.0%} of the budget on {len(dense.feeds)} calibration steps"


def _most(levels: Callable[[int], Array], count: int, spent: Callable[[Array], float]) -> Array:
    """The last of some levels, each higher than the one before, that keeps to the budget; zeros if none does."""
    low, high = -1, count
    while high - low > 1:
        middle = (low + high) // 2
        if spent(levels(middle)) <= 1:
            low = middle
        else:
            high = middle
    return levels(low) if low >= 0 else np.zeros_like(levels(0))


def _errors_alone(levels: Array, dense: Dense, run: Callable[[Sequence[float]], list[Step]]) -> Array:
    """Relative error of the outputs for a threshold of 1 at each place alone, as far as it grows with the threshold."""
    found = np.zeros(len(levels))
    for index in np.flatnonzero(levels > 0):
        alone = np.zeros(len(levels))
        alone[index] = levels[index]
        found[index] = Budget(error=1.0).spent(dense.outputs, run(alone.tolist())) / levels[index]
    return found


def _balanced(table: Array, errors: Array, costs: Array, weight: float) -> Array:
    """For every place the threshold of least cost, its share of the squared error counted with a weight."""
    total = (1 - _SHARES) * costs[:, None] + weight * np.square(errors[:, None] * table)
    chosen: Array = table[np.arange(len(table)), total.argmin(axis=1)]
    return chosen


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
