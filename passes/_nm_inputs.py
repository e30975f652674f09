"""What N:M masks need to know of the inputs of layers, observed for a few layers at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._gram import Gram, Window, position_count, rows_of
from onnxcomp.passes._nm_bias import bias_of
from onnxcomp.passes._nm_weights import Layer, Reader
from onnxcomp.rewrite import Context
from onnxcomp.stats import Group, Observer, finite
from onnxcomp.target import Array

_SLAB = 1 << 24  # elements of patches that are in memory at a time


class Squares(Observer):
    """Mean and mean square of each column of the rows that a linear op reads.

    Args:
        cut: Window of a Conv.

    Attributes:
        count: Rows seen.
    """

    def __init__(self, cut: Window | None) -> None:
        self.cut, self.count = cut, 0
        self._sums: Array = np.zeros(())
        self._squares: Array = np.zeros(())

    @property
    def mean(self) -> Array:
        """Mean, float64 (groups, K)."""
        return self._sums / max(self.count, 1)

    @property
    def mean_square(self) -> Array:
        """Mean square, float64 (groups, K)."""
        return self._squares / max(self.count, 1)

    @override
    def update(self, x: Array) -> None:
        x = finite(np.atleast_2d(np.asarray(x, np.float32)))
        positions = position_count(x, self.cut)
        for sample in x:  # one by one, so that nothing depends on how samples came in batches
            step = max(1, _SLAB * max(positions, 1) // max(self._size(sample), 1))
            for start in range(0, positions, step):
                part = np.arange(start, min(start + step, positions))
                rows = rows_of(sample[None], self.cut, [part])[0]
                self._sums = self._sums + rows.sum(axis=0, dtype=np.float64)
                self._squares = self._squares + np.square(rows, dtype=np.float64).sum(axis=0)
                self.count += len(part)

    @override
    def merge(self, other: Squares) -> None:
        if other.cut != self.cut:
            raise CalibrationError("cannot merge squares of different windows")
        self.count += other.count
        self._sums = self._sums + other._sums
        self._squares = self._squares + other._squares

    def _size(self, sample: Array) -> int:
        """Elements of all patches of a sample."""
        return int(sample.size * (1 if self.cut is None else np.prod(self.cut.kernel)))


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Of the inputs of a layer, columns in the order of `Layer.rows`.

    Attributes:
        means: Mean of each input, float64 (groups, K).
        squares: Mean square of each input, in the same shape.
        fit: Second moments to choose weights by, float64 (groups, K, K); None where only squares are known. About the
            means where a bias makes up for these.
        judge: The same of data that is held out, about the same.
    """

    means: Array
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
        biases: Biases make up for what changes of weights shift on average.
    """

    products: bool
    positions: int
    memory: int
    inputs: int
    biases: bool = True

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
            observers = [made[key] for key in dict.fromkeys(r.key for r in layer.readers)]
            yield layer, _moments(layer, observers, about_mean=self.biases and bias_of(layer) is not None)

    def _observer(self, reader: Reader, seed: int) -> Observer:
        if not self.products:
            return Squares(reader.cut)
        return Gram(reader.cut, None, errors=False, positions=self.positions, seed=seed)


def _moments(layer: Layer, observers: Sequence[Observer], *, about_mean: bool) -> Moments:
    """Mean over all inputs of a layer."""
    order = layer.order()
    if all(isinstance(o, Squares) for o in observers):
        means, squares = (
            np.mean([found[:, order] for found in parts], axis=0)
            for parts in zip(*((o.mean, o.mean_square) for o in observers if isinstance(o, Squares)), strict=True)
        )
        return Moments(means=means, squares=squares)
    grams = [gram for gram in observers if isinstance(gram, Gram)]
    if not all(gram.held_out.count for gram in grams):
        raise CalibrationError("it takes two samples or more, since one in four is held out to judge the weights")
    centers = [gram.fit.mean if about_mean else np.zeros_like(gram.fit.mean) for gram in grams]
    fit, judge = (
        np.mean([_ordered(part.about(center), order) for part, center in zip(parts, centers, strict=True)], axis=0)
        for parts in ([gram.fit for gram in grams], [gram.held_out for gram in grams])
    )
    means = np.mean([gram.fit.mean[:, order] for gram in grams], axis=0)
    squares = np.diagonal(fit, axis1=1, axis2=2) + (means**2 if about_mean else 0.0)
    return Moments(means=means, squares=squares, fit=fit, judge=judge)


def _ordered(products: Array, order: Array) -> Array:
    return products[:, order[:, None], order[None, :]]
