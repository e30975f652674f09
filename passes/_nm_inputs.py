"""What N:M masks need to know of the inputs of layers, observed for a few layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._gram import Gram, Window, position_count, rows_of
from onnxcomp.passes._nm_weights import Layer, Reader
from onnxcomp.rewrite import Context
from onnxcomp.stats import Group, Observer, finite
from onnxcomp.target import Array

_SLAB = 1 << 24  # elements of patches that are in memory at a time


class Squares(Observer):
    """Mean square of each column of the rows that a linear op reads.

    Args:
        cut: Window of a Conv.

    Attributes:
        count: Rows seen.
    """

    def __init__(self, cut: Window | None) -> None:
        self.cut, self.count = cut, 0
        self._sum: Array = np.zeros(())

    @property
    def mean(self) -> Array:
        """Float64 (groups, K)."""
        return self._sum / max(self.count, 1)

    @override
    def update(self, x: Array) -> None:
        x = finite(np.atleast_2d(np.asarray(x, np.float32)))
        positions = position_count(x, self.cut)
        for sample in x:  # one by one, so that nothing depends on how samples came in batches
            step = max(1, _SLAB * max(positions, 1) // max(self._size(sample), 1))
            for start in range(0, positions, step):
                part = np.arange(start, min(start + step, positions))
                rows = rows_of(sample[None], self.cut, [part])[0]
                self._sum = self._sum + np.square(rows, dtype=np.float64).sum(axis=0)
                self.count += len(part)

    @override
    def merge(self, other: Squares) -> None:
        if other.cut != self.cut:
            raise CalibrationError("cannot merge squares of different windows")
        self.count += other.count
        self._sum = self._sum + other._sum

    def _size(self, sample: Array) -> int:
        """Elements of all patches of a sample."""
        return int(sample.size * (1 if self.cut is None else np.prod(self.cut.kernel)))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the inputs of a layer, columns in the order of `Layer.rows`.

    Attributes:
        squares: Mean square of each input, float64 (groups, K).
        fit: Second moments to choose weights by, float64 (groups, K, K); None where only squares are known.
        judge: The same of data that is held out.
    """

    squares: Array
    fit: Array | None = None
    judge: Array | None = None


@dataclass(frozen=True, kw_only=True)
class Observation:
    """How inputs are observed.

    Attributes:
        products: Second moments and not squares only.
        positions: Of second moments: rows of a sample that are drawn at most.
        memory: Bytes of second moments that are held at a time.
        inputs: Inputs that are observed in one run.
    """

    products: bool
    positions: int
    memory: int
    inputs: int

    def needs(self, layer: Layer) -> int:
        """Bytes for one input of a layer, those of held-out data included."""
        return 2 * 8 * layer.groups * layer.columns ** (2 if self.products else 1)

    def runs(self, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
        """Layers in order, as many at a time as may be; those of the same input stay together."""
        chunk: list[Layer] = []
        held: set[object] = set()
        used = 0
        for layer in layers:
            keys: set[object] = {reader.key for reader in layer.readers}
            more = len(keys - held) * self.needs(layer)
            if chunk and more and (len(held | keys) > self.inputs or used + more > self.memory):
                yield chunk
                chunk, held, used = [], set(), 0
                more = len(keys) * self.needs(layer)
            chunk.append(layer)
            held |= keys
            used += more
        if chunk:
            yield chunk

    def run(self, model: ir.Model, context: Context, layers: Sequence[Layer]) -> Iterator[tuple[Layer, Moments]]:
        """Layers with the moments of their inputs, from one run over the data through the model as it is by now.

        Raises:
            CalibrationError: If there is no data, or one sample where some have to be held out.
        """
        if context.sweep is None:
            raise CalibrationError("it needs calibration data; give some with --data")
        made: dict[object, Observer] = {}
        by_value: dict[str, list[Observer]] = {}
        for reader in (reader for layer in layers for reader in layer.readers):
            if reader.key not in made:
                made[reader.key] = self._observer(reader, context.seed)
                by_value.setdefault(reader.key[0], []).append(made[reader.key])
        context.sweep(model, {name: Group(*observers) for name, observers in by_value.items()})
        for layer in layers:
            yield layer, _moments(layer, [made[key] for key in dict.fromkeys(r.key for r in layer.readers)])

    def _observer(self, reader: Reader, seed: int) -> Observer:
        if not self.products:
            return Squares(reader.cut)
        return Gram(reader.cut, None, errors=False, positions=self.positions, seed=seed)


def _moments(layer: Layer, observers: Sequence[Observer]) -> Moments:
    """Mean over all inputs of a layer."""
    order = layer.order()
    squares = [o.mean[:, order] for o in observers if isinstance(o, Squares)]
    if squares:
        return Moments(squares=np.mean(squares, axis=0))
    fit, judge = [], []
    for gram in observers:
        assert isinstance(gram, Gram)
        if not gram.held_out.count:
            raise CalibrationError("it takes two samples or more, since one in four is held out to judge the weights")
        fit.append(_ordered(gram.fit.about(np.zeros_like(gram.fit.mean)), order))
        judge.append(_ordered(gram.held_out.about(np.zeros_like(gram.held_out.mean)), order))
    mean = np.mean(fit, axis=0) if len(fit) > 1 else fit[0]
    return Moments(
        squares=np.diagonal(mean, axis1=1, axis2=2),
        fit=mean,
        judge=np.mean(judge, axis=0) if len(judge) > 1 else judge[0],
    )


def _ordered(products: Array, order: Array) -> Array:
    return products[:, order[:, None], order[None, :]]
