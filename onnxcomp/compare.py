"""Fidelity of a model against a reference, on data given, per output and per layer.

Everything is summed up feed by feed and block by block, so memory depends neither on the number of feeds nor on how
large a tensor is beyond the tensor itself, and the figures do not depend on how the data is cut into feeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.calibrate import Runner
from onnxcomp.errors import DataError, GraphError
from onnxcomp.metrics import EXACT_DB, kl_divergence, power_sums, sqnr_of_sums, top1_agreement
from onnxcomp.rewrite import Progress
from onnxcomp.target import Array, Feed

Run: TypeAlias = Callable[[Feed], Mapping[str, Array]]
"""Runs one feed and returns the outputs by name."""

Metric: TypeAlias = Callable[[Run], float | Mapping[str, float]]
"""A task metric: is given something that runs feeds, and returns one or several figures, higher is better."""

LAYERS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm", "MatMulNBits"})
"""Op types whose outputs `compare_layers` looks at, besides every op of a domain `onnxcomp*`."""

_BLOCK = 1 << 18  # elements that are converted to float64 at a time


@dataclass(frozen=True, kw_only=True)
class TensorFidelity:
    """How close one tensor is to its reference over all feeds.

    Attributes:
        name: Name of the value.
        sqnr: Signal to quantization noise ratio in dB, of powers summed over all feeds; -200 if `non_finite`.
        cosine: Cosine similarity of all feeds taken as one vector; 0 if `non_finite`.
        max_error: Largest absolute difference of finite elements.
        top1: Share of positions whose largest entry along the last axis agrees, for class scores; share of equal
            elements, for integers, booleans and strings; None otherwise.
        kl: Mean Kullback-Leibler divergence along the last axis in nats, for class scores; None otherwise.
        non_finite: Number of elements that are NaN or infinite in one tensor and not the same in the other.
    """

    name: str
    sqnr: float
    cosine: float
    max_error: float
    top1: float | None = None
    kl: float | None = None
    non_finite: int = 0


@dataclass(frozen=True, kw_only=True)
class LayerFidelity:
    """Error of one layer's output inside the model; it includes the error of all layers before.

    Attributes:
        node: Name of the node in the rewritten model.
        op_type: Its op type.
        value: Name of the value compared.
        sqnr: In dB.
    """

    node: str
    op_type: str
    value: str
    sqnr: float


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Outcome of a comparison.

    Attributes:
        data: What the data is called.
        samples: Number of feeds.
        seen_by_calibration: Calibration saw the same data, so the figures are no claim about unseen data.
        outputs: One entry an output.
        layers: One entry a layer that stands under the same value name in both models, in execution order.
        reference_metric: Task metric of the reference, by name; empty without a metric.
        metric: Task metric of the other model.
    """

    data: str
    samples: int
    seen_by_calibration: bool
    outputs: tuple[TensorFidelity, ...]
    layers: tuple[LayerFidelity, ...] = ()
    reference_metric: Mapping[str, float] = field(default_factory=dict)
    metric: Mapping[str, float] = field(default_factory=dict)

    @property
    def worst_sqnr(self) -> float:
        """SQNR of the worst output in dB."""
        return min(o.sqnr for o in self.outputs)

    @property
    def non_finite(self) -> tuple[str, ...]:
        """Names of the outputs with NaN or infinity where the reference has none."""
        return tuple(o.name for o in self.outputs if o.non_finite)

    def drop(self) -> float | None:
        """Largest fall of a task metric, else of top-1 agreement below 1; None if neither is there.

        Infinite where an output or a metric is NaN, so that a gate on it fails.
        """
        if self.non_finite:
            return math.inf
        if self.metric:
            falls = [self.reference_metric[k] - v for k, v in self.metric.items()]
            return max(math.inf if math.isnan(fall) else fall for fall in falls)
        agreements = [o.top1 for o in self.outputs if o.top1 is not None]
        return 1.0 - min(agreements) if agreements else None


def compare(
    reference: Run,
    other: Run,
    data: Iterable[Feed],
    *,
    data_name: str,
    seen_by_calibration: bool = False,
    metric: Metric | None = None,
    classes: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Fidelity:
    """Runs both models on every feed and measures how far the outputs are apart.

    Args:
        reference: Runs the original.
        other: Runs the model in question; outputs that the reference has not are ignored.
        data: Feeds, consumed once.
        data_name: What the data is called.
        seen_by_calibration: Whether calibration saw the same data.
        metric: Task metric; called once with each of the two.
        classes: Names of the outputs that hold class scores along the last axis. By default those that look like it:
            floating point, rank 2 or 3, last axis longer than 1 (logits of a classifier or language model; an
            embedding looks the same and has to be ruled out by name).
        progress: Told about every feed.

    Returns:
        The figures, without layers.

    Raises:
        DataError: If there is no feed, a name in `classes` is no output, or the metric returns different figures for
            the two.
        GraphError: If an output is missing, or differs in shape or kind.
    """
    tensors: dict[str, _Tensor] = {}
    count = 0
    total = _length(data)
    for feed in data:
        expected, found = reference(feed), other(feed)
        for name, value in expected.items():
            _check_tensor(name, value, "reference")
        if not tensors:
            if unknown := set(classes or ()) - set(expected):
                raise DataError(f"the class scores {sorted(unknown)} are no outputs; there are {sorted(expected)}")
            tensors = {k: _Tensor(v, None if classes is None else k in classes) for k, v in expected.items()}
        for name, tensor in tensors.items():
            if name not in found:
                raise GraphError(f"the other model has no output {name!r}; it has {sorted(found)}")
            tensor.update(expected[name], _same_kind(name, expected[name], found[name], count))
        count += 1
        if progress:
            progress("compare", count, total)
    if not count:
        raise DataError(f"{data_name} is empty: there is nothing to compare on")
    scores = [_scores(metric(run)) if metric else {} for run in (reference, other)]
    if scores[0].keys() != scores[1].keys():
        raise DataError(f"the metric returns {sorted(scores[0])} for the reference, {sorted(scores[1])} for the other")
    return Fidelity(
        data=data_name,
        samples=count,
        seen_by_calibration=seen_by_calibration,
        outputs=tuple(t.result(name) for name, t in tensors.items()),
        reference_metric=scores[0],
        metric=scores[1],
    )


def compare_layers(
    model_a: ir.Model,
    model_b: ir.Model,
    runner: Runner,
    data: Iterable[Feed],
    limit: int = 32,
    progress: Progress | None = None,
) -> tuple[LayerFidelity, ...]:
    """Measures how far the output of every layer of `model_b` is from the value of the same name in `model_a`.

    Layers are the nodes of the main graph in `LAYERS`. If `model_a` has no value of the name of a layer's output, the
    output of an Add after the layer is taken. What has no counterpart, another shape, or integers is left out. As names
    decide, `model_a` should be the model that the lossy passes were given: a pass that folds a node into the one before
    may leave another tensor under an old name.

    Args:
        model_a: The reference.
        model_b: The rewritten model.
        runner: Runs a model and returns values from inside.
        data: Feeds; iterated once for every `limit` layers.
        limit: Number of values to hold at once from each model.
        progress: Told about every feed.

    Returns:
        One entry a layer, in execution order.

    Raises:
        DataError: If `limit` is not positive, there is no feed, or `data` would have to be iterated again and cannot.
    """
    if limit < 1:
        raise DataError(f"layers have to be compared at least one at a time, not {limit}")
    layers = list(_layers(model_a, model_b))
    if len(layers) > limit and iter(data) is data:
        raise DataError("the data can be iterated only once; give a list or data that can be opened again")
    found: list[LayerFidelity] = []
    for start in range(0, len(layers), limit):
        chunk = layers[start : start + limit]
        names = [value for _, value in chunk]
        sums = _sweep(runner(model_a, names), runner(model_b, names), data, names, progress)
        found += [
            LayerFidelity(node=n.name or "", op_type=n.op_type, value=v, sqnr=sums[v].sqnr)
            for n, v in chunk
            if v in sums
        ]
    return tuple(found)


def _layers(model_a: ir.Model, model_b: ir.Model) -> Iterator[tuple[ir.Node, str]]:
    known = {v.name: v for node in model_a.graph for v in node.outputs}
    for node in model_b.graph:
        if node.op_type not in LAYERS and not node.domain.startswith("onnxcomp"):
            continue
        followers = [user.outputs[0] for user, _ in node.outputs[0].uses() if user.op_type == "Add"]
        for value in (node.outputs[0], *followers):
            counterpart = known.get(value.name)
            if value.name and counterpart is not None:
                if not any(v.dtype is not None and v.dtype.is_integer() for v in (value, counterpart)):
                    yield node, value.name
                break


def _sweep(
    run_a: Callable[[Feed], Mapping[str, Array]],
    run_b: Callable[[Feed], Mapping[str, Array]],
    data: Iterable[Feed],
    names: Sequence[str],
    progress: Progress | None,
) -> dict[str, _Tensor]:
    sums: dict[str, _Tensor] = {}
    skipped: set[str] = set()
    count = 0
    total = _length(data)
    for feed in data:
        a, b = run_a(feed), run_b(feed)
        for name in names:
            if a[name].shape != b[name].shape or not (_floating(a[name]) and _floating(b[name])):
                skipped.add(name)
            else:
                sums.setdefault(name, _Tensor(a[name], classes=False)).update(a[name], b[name])
        count += 1
        if progress:
            progress("compare layers", count, total)
    if not count:
        raise DataError("there is no feed to compare layers on")
    return {name: s for name, s in sums.items() if name not in skipped}


class _Tensor:
    """Sums over all that was seen of one tensor and its reference."""

    def __init__(self, example: Array, classes: bool | None) -> None:
        self._exact = not _floating(example)  # compared for equality
        looks_like_classes = example.ndim in (2, 3) and example.shape[-1] > 1
        self._classes = not self._exact and (looks_like_classes if classes is None else classes and example.ndim > 0)
        self._signal = self._noise = self._power = self._dot = self._max_error = 0.0
        self._positions = self._kl_positions = self._non_finite = 0
        self._agreed = self._kl = 0.0

    def update(self, reference: Array, other: Array) -> None:
        if not reference.size:
            return
        r = reference.reshape(-1, reference.shape[-1] if self._classes else 1)
        o = other.reshape(r.shape)
        step = max(1, _BLOCK // r.shape[1])
        for start in range(0, len(r), step):
            self._update(r[start : start + step], o[start : start + step])

    def _update(self, r: Array, o: Array) -> None:
        if self._exact:
            equal = r == o
            self._agreed += float(equal.sum())
            self._positions += equal.size
            if r.dtype.kind not in "biu":  # strings
                r, o = np.ones(r.shape), equal.astype(np.float64)
        r, o = r.astype(np.float64), o.astype(np.float64)
        finite = np.isfinite(r) & np.isfinite(o)
        bad = ~finite & (r != o) & ~(np.isnan(r) & np.isnan(o))
        self._non_finite += int(bad.sum())
        if self._classes:
            self._positions += len(r)
            self._count_classes(r[~bad.any(axis=1)], o[~bad.any(axis=1)])
        if not finite.all():
            r, o = np.where(finite, r, 0.0), np.where(finite, o, 0.0)
        signal, noise = power_sums(r, o)
        self._signal += signal
        self._noise += noise
        self._power += float((o**2).sum())
        self._dot += float((r * o).sum())
        self._max_error = max(self._max_error, float(np.abs(r - o).max()))

    def _count_classes(self, r: Array, o: Array) -> None:
        """Rows with stray NaN or infinity are not given, so they count as disagreement; masked scores may be -inf."""
        if len(r):
            r, o = (np.nan_to_num(x, posinf=1e30, neginf=-1e30) for x in (r, o))
            self._agreed += top1_agreement(r, o) * len(r)
            self._kl += kl_divergence(r, o) * len(r)
            self._kl_positions += len(r)

    @property
    def sqnr(self) -> float:
        """In dB."""
        return -EXACT_DB if self._non_finite else sqnr_of_sums(self._signal, self._noise)

    def result(self, name: str) -> TensorFidelity:
        norm = math.sqrt(self._signal) * math.sqrt(self._power)
        cosine = self._dot / norm if norm else float(self._signal == self._power)
        return TensorFidelity(
            name=name,
            sqnr=self.sqnr,
            cosine=0.0 if self._non_finite else cosine,
            max_error=self._max_error,
            top1=self._agreed / self._positions if self._positions else None,
            kl=self._kl / self._kl_positions if self._kl_positions else None,
            non_finite=self._non_finite,
        )


def _floating(array: Array) -> bool:
    return array.dtype.kind in "fV"  # V: bfloat16 and float8 of ml_dtypes


def _same_kind(name: str, reference: Array, other: Array, index: int) -> Array:
    _check_tensor(name, other, "other model")
    if reference.shape != other.shape:
        raise GraphError(f"output {name!r} has shape {reference.shape} in the reference, {other.shape}, feed {index}")
    if _floating(reference) != _floating(other):
        raise GraphError(f"output {name!r} is {reference.dtype} in the reference and {other.dtype} in the other model")
    return other


def _check_tensor(name: str, value: object, which: str) -> None:
    if not isinstance(value, np.ndarray):
        raise GraphError(f"output {name!r} of the {which} is a {type(value).__name__}, not a tensor")


def _scores(value: float | Mapping[str, float]) -> dict[str, float]:
    return {k: float(v) for k, v in value.items()} if isinstance(value, Mapping) else {"metric": float(value)}


def _length(data: Iterable[Feed]) -> int | None:
    return len(data) if isinstance(data, Sized) else None
