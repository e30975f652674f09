"""Streaming, mergeable observers of tensors.

An observer sees a tensor batch by batch and keeps a summary whose size does not grow with the number of batches. Two
observers of the same kind merge into what one would have seen. Results do not depend on how the data was cut into
batches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TypeVar

import numpy as np
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.target import Array

Self = TypeVar("Self", bound="Observer")


class Observer(ABC):
    """Summary of all arrays that it was shown."""

    @abstractmethod
    def update(self, x: Array) -> None:
        """Adds one array.

        Args:
            x: Array of any shape, floating point.

        Raises:
            CalibrationError: If the array holds NaN or infinity.
        """

    @abstractmethod
    def merge(self: Self, other: Self) -> None:
        """Adds everything that `other` has seen.

        Raises:
            CalibrationError: If `other` was made with other settings.
        """


class Group(Observer):
    """Several observers of one tensor.

    Args:
        *parts: Observers of different kinds.
    """

    def __init__(self, *parts: Observer) -> None:
        self.parts = parts

    @override
    def update(self, x: Array) -> None:
        for part in self.parts:
            part.update(x)

    @override
    def merge(self, other: Group) -> None:
        if [type(p) for p in self.parts] != [type(p) for p in other.parts]:
            raise CalibrationError("cannot merge groups of different observers")
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine.merge(theirs)


def _finite(x: Array) -> Array:
    if not np.isfinite(x).all():
        bad = int(x.size - np.isfinite(x).sum())
        raise CalibrationError(f"{bad} of {x.size} values are NaN or infinite")
    return x


class Histogram(Observer):
    """Histogram whose bin width is a power of two and doubles when the range outgrows `bins`.

    Bin `i` covers `[i * width, (i + 1) * width)`. As widths are powers of two, bins nest, so the outcome depends on the
    data only and not on its order. Exact zeros are counted apart: they are representable in every quantizer.
    Of a large sample (axis 0), all values beyond a quarter of its largest magnitude enter the bins and the others
    thinned out evenly: few outliers decide on a range, and they like to stand at the same place in every sample.

    Args:
        bins: Largest number of bins.
        weights: How much a value of each channel counts, shape `(channels,)`; every value counts 1 if None.
        axis: Channel axis, for `weights`.
        limit: Number of values beyond which a sample is thinned out.

    Attributes:
        min: Smallest value seen.
        max: Largest value seen.
        count: Weight of all values in the bins, zeros included.
        zeros: Weight of the exact zeros among them.
    """

    def __init__(self, bins: int = 8192, *, weights: Array | None = None, axis: int = -1, limit: int = 1 << 15) -> None:
        if bins < 16:
            raise CalibrationError(f"a histogram needs at least 16 bins, not {bins}")
        self.bins = bins
        self.weights = None if weights is None else np.asarray(weights, np.float64)
        self.axis = axis
        self.limit = limit
        self.min = np.inf
        self.max = -np.inf
        self.count = 0.0
        self.zeros = 0.0
        self._exponent: int | None = None  # the width is 2 ** exponent
        self._first = 0
        self._counts = np.zeros(0)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return 0.0 if self._exponent is None else 2.0**self._exponent

    @property
    def counts(self) -> Array:
        """Weights of the non-zero values by bin, shape `(used_bins,)`, float64."""
        return self._counts

    @property
    def centers(self) -> Array:
        """Centers of the bins in `counts`, shape `(used_bins,)`, float64."""
        return (np.arange(self._first, self._first + len(self._counts)) + 0.5) * self.width

    @override
    def update(self, x: Array) -> None:
        x = np.asarray(x)
        if not x.size:
            return
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            _finite(x)
        self.min, self.max = min(self.min, low), max(self.max, high)
        x, weights = self._thinned(x)
        chosen = x != 0.0
        nonzero = x[chosen]
        total = float(x.size if weights is None else weights.sum())
        weights = None if weights is None else weights[chosen]
        self.count += total
        self.zeros += total - float(nonzero.size if weights is None else weights.sum())
        if not nonzero.size:
            return
        self._widen(float(nonzero.min()), float(nonzero.max()))
        assert self._exponent is not None
        # In double precision: a small negative number must not underflow to -0.0, which lies in another bin.
        index = np.floor(np.ldexp(nonzero.astype(np.float64), -self._exponent)).astype(np.int64)
        self._add(int(index.min()), np.bincount(index - index.min(), weights))

    @override
    def merge(self, other: Histogram) -> None:
        same_weights = (self.weights is None) == (other.weights is None) and (
            self.weights is None or np.array_equal(self.weights, other.weights)  # type: ignore[arg-type]
        )
        if other.bins != self.bins or not same_weights:
            raise CalibrationError("cannot merge histograms of different bins or weights")
        self.count += other.count
        self.zeros += other.zeros
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)
        if other._exponent is None:
            return
        low = other._first * other.width
        high = (other._first + len(other._counts)) * other.width
        self._widen(low, np.nextafter(high, -np.inf), other._exponent)
        assert self._exponent is not None
        first, counts = other._first, other._counts
        for _ in range(self._exponent - other._exponent):
            first, counts = _halve(first, counts)
        self._add(first, counts)

    def quantile(self, q: float) -> float:
        """Value below which a share `q` of all values lies, to within one bin."""
        if not self.count:
            raise CalibrationError("quantile of a histogram that has seen no data")
        centers, counts = self.centers, self._counts
        split = int(np.searchsorted(centers, 0.0))
        centers = np.insert(centers, split, 0.0)
        cumulative = np.cumsum(np.insert(counts, split, self.zeros))
        i = min(int(np.searchsorted(cumulative, q * self.count)), len(centers) - 1)
        return float(np.clip(centers[i], self.min, self.max))

    def _widen(self, low: float, high: float, at_least: int = -(1 << 16)) -> None:
        """Makes the bins wide enough for `[low, high]` together with what is there; `min` and `max` know both."""
        if self._exponent is not None:
            low = min(low, self._first * self.width)
            high = max(high, np.nextafter((self._first + len(self._counts)) * self.width, -np.inf))
        # No finer than 2**-20 of the largest magnitude: float32 data has no more to say, and indices stay small.
        # Taken from the values and not from the edges of bins, since those depend on the width so far.
        finest = int(np.ceil(np.log2(max(abs(self.min), abs(self.max), 1e-300)))) - 20
        exponent = max(finest, at_least if self._exponent is None else max(self._exponent, at_least))
        while np.floor(np.ldexp(high, -exponent)) - np.floor(np.ldexp(low, -exponent)) + 1 > self.bins:
            exponent += 1
        self._coarsen(exponent)

    def _coarsen(self, exponent: int) -> None:
        if self._exponent is not None:
            for _ in range(exponent - self._exponent):
                self._first, self._counts = _halve(self._first, self._counts)
        self._exponent = exponent

    def _thinned(self, x: Array) -> tuple[Array, Array | None]:
        """The values of `x` that enter the bins and the weight of each, both flat; None stands for weights of 1."""
        axis = self.axis % max(x.ndim, 1)
        samples = len(x) if x.ndim > 1 and (self.weights is None or axis > 0) else 1
        rows = x.reshape(samples, -1)
        size = rows.shape[1]
        channel = None if self.weights is None else (math.prod(x.shape[axis + 1 :]), self.weights)
        if size <= self.limit:
            weights = None if channel is None else np.tile(_weights_at(np.arange(size), *channel), samples)
            return rows.reshape(-1), weights
        stride = -(-size // self.limit)
        while math.gcd(stride, size) > 1:
            stride += 1  # so that no channel or column is skipped
        some = np.arange(0, size, stride)
        some_weights = None if channel is None else _weights_at(some, *channel)
        values, weights_of = [], []
        for row in rows:
            bound = max(float(row.max()), -float(row.min())) / 4.0
            far = np.flatnonzero((row > bound) | (row < -bound))
            thin = row[some]
            near = np.abs(thin) <= bound
            share = (size - len(far)) / max(int(near.sum()), 1)
            near_weights = np.full(int(near.sum()), share) if some_weights is None else some_weights[near] * share
            far_weights = np.ones(len(far)) if channel is None else _weights_at(far, *channel)
            values += [row[far], thin[near]]
            weights_of += [far_weights, near_weights]
        return np.concatenate(values), np.concatenate(weights_of)

    def _add(self, first: int, counts: Array) -> None:
        if not len(self._counts):
            self._first, self._counts = first, counts.astype(np.float64)
            return
        start = min(first, self._first)
        stop = max(first + len(counts), self._first + len(self._counts))
        merged = np.zeros(stop - start)
        merged[self._first - start :][: len(self._counts)] += self._counts
        merged[first - start :][: len(counts)] += counts
        self._first, self._counts = start, merged


def _weights_at(index: Array, inner: int, weights: Array) -> Array:
    """Weight of the channel at each flat index into a sample, whose channel axis has `inner` elements behind it."""
    return np.asarray(weights[index // inner % len(weights)])


def _halve(first: int, counts: Array) -> tuple[int, Array]:
    """Merges bins in aligned pairs."""
    padded = np.concatenate([np.zeros(first % 2, counts.dtype), counts])
    padded = np.concatenate([padded, np.zeros(len(padded) % 2, counts.dtype)])
    return first // 2, padded.reshape(-1, 2).sum(axis=1)


class Moments(Observer):
    """Mean and variance per channel.

    Args:
        axis: Channel axis; None summarises the whole tensor.

    Attributes:
        count: Values of a channel seen.
        shape: Shape of the last array seen.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.axis = axis
        self.count = 0
        self.shape: tuple[int, ...] = ()
        self._sum: Array = np.zeros(())
        self._square: Array = np.zeros(())

    @property
    def mean(self) -> Array:
        """Mean, float64, shape `(channels,)` or `()`."""
        return self._sum / self.count

    @property
    def variance(self) -> Array:
        """Population variance, float64, shape `(channels,)` or `()`."""
        return np.asarray(np.maximum(self._square / self.count - self.mean**2, 0.0))

    @override
    def update(self, x: Array) -> None:
        x = np.asarray(x)
        kept = () if self.axis is None or x.ndim == 0 else (self.axis % x.ndim,)
        others = tuple(i for i in range(x.ndim) if i not in kept)
        total = x.sum(axis=others, dtype=np.float64)
        square = np.square(x, dtype=np.float64).sum(axis=others)
        if not np.isfinite(square).all():
            _finite(x)
        self._sum, self._square = self._sum + total, self._square + square
        self.count += x.size // max(total.size, 1)
        self.shape = x.shape

    @override
    def merge(self, other: Moments) -> None:
        if other.axis != self.axis:
            raise CalibrationError("cannot merge moments over different axes")
        self.count += other.count
        self._sum, self._square = self._sum + other._sum, self._square + other._square


class ChannelRange(Observer):
    """Least and largest value of each channel.

    Args:
        axis: Channel axis.

    Attributes:
        low: Least values, shape `(channels,)`.
        high: Largest values, shape `(channels,)`.
    """

    def __init__(self, axis: int = -1) -> None:
        self.axis = axis
        self.low: Array = np.full((), np.inf)
        self.high: Array = np.full((), -np.inf)

    @override
    def update(self, x: Array) -> None:
        rows = channel_rows(_finite(np.asarray(x)), self.axis)
        if len(rows):
            self.low = np.minimum(self.low, rows.min(axis=0))
            self.high = np.maximum(self.high, rows.max(axis=0))

    @override
    def merge(self, other: ChannelRange) -> None:
        if other.axis != self.axis:
            raise CalibrationError("cannot merge ranges over different axes")
        self.low, self.high = np.minimum(self.low, other.low), np.maximum(self.high, other.high)


class RowSample(Observer):
    """Uniform sample without replacement of the rows of a tensor, seen as a matrix of channels.

    Every row gets a random key from its position in the stream; the rows of smallest key are kept.

    Args:
        rows: Number of rows to keep.
        axis: Channel axis.
        seed: Seed of the keys.
    """

    def __init__(self, rows: int = 1024, axis: int = -1, seed: int = 0) -> None:
        self.rows = rows
        self.axis = axis
        self._random = np.random.Generator(np.random.Philox(seed))
        self._keys = np.zeros(0)
        self._sample: Array | None = None
        self.seen = 0

    @property
    def sample(self) -> Array:
        """The rows, shape `(kept_rows, channels)`, float32."""
        if self._sample is None:
            raise CalibrationError("a row sample has seen no data")
        return self._sample

    @override
    def update(self, x: Array) -> None:
        matrix = channel_rows(_finite(np.asarray(x, dtype=np.float32)), self.axis)
        self.seen += len(matrix)
        self._keep(self._random.random(len(matrix)), matrix)

    @override
    def merge(self, other: RowSample) -> None:
        if (other.rows, other.axis) != (self.rows, self.axis):
            raise CalibrationError("cannot merge row samples of different settings")
        self.seen += other.seen
        if other._sample is not None:
            self._keep(other._keys, other._sample)

    def _keep(self, keys: Array, matrix: Array) -> None:
        if len(self._keys) == self.rows:
            chosen = keys < self._keys[-1]
            keys, matrix = keys[chosen], matrix[chosen]
        if self._sample is not None:
            keys, matrix = np.concatenate([self._keys, keys]), np.concatenate([self._sample, matrix])
        order = np.argsort(keys, kind="stable")[: self.rows]
        self._keys, self._sample = keys[order], np.ascontiguousarray(matrix[order])


def channel_rows(x: Array, axis: int) -> Array:
    """Views a tensor as a matrix `(everything else, channels)`."""
    if x.ndim == 0:
        return x.reshape(1, 1)
    return np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
