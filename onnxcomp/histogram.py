"""The histogram that ranges are chosen from."""

from __future__ import annotations

import math

import numpy as np
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.stats import Observer, finite
from onnxcomp.target import Array

_OFTEN = 64  # values that are more than one in so many are no outliers


class Histogram(Observer):
    """Histogram whose bin width is a power of two and doubles when the range outgrows `bins`.

    Bin `i` covers `[i * width, (i + 1) * width)`. As widths are powers of two, bins nest, so the outcome depends on the
    data only and not on its order. Exact zeros are counted apart: they are representable in every quantizer.
    A large sample (axis 0) is thinned out evenly. If few of its values lie beyond a quarter of its largest magnitude,
    all of those enter the bins: few outliers decide on a range, and like to stand at the same place in every sample.

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
        self._unit = 2.0 ** (int(np.frexp(1.0 if weights is None else np.max(weights, initial=0.0))[1]) - 26)
        self.weights = None if weights is None else self._exact(np.asarray(weights, np.float64))
        self.axis = axis
        self.limit = limit
        self.min = np.inf
        self.max = -np.inf
        self.count = 0.0
        self.zeros = 0.0
        self._exponent: int | None = None  # the width is 2 ** exponent
        self._first = 0
        self._counts = np.zeros(0)
        self._thinned: tuple[tuple[int, ...], Array] = ((), np.zeros(0))

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
        axis = self.axis % max(x.ndim, 1)
        inner = math.prod(x.shape[axis + 1 :])
        rows = x.reshape(len(x) if x.ndim > 1 and (self.weights is None or axis > 0) else 1, -1)
        lows, highs = rows.min(axis=1), rows.max(axis=1)
        low, high = float(lows.min()), float(highs.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            finite(x)
        self._widen(low, high)
        if rows.shape[1] > self.limit:
            for row, low, high in zip(rows, lows, highs, strict=True):
                self._count_thinned(row, inner, float(low), float(high))
        elif self.weights is None:
            self._count(rows.reshape(-1), None)
        else:
            weights = _weights_at(np.arange(rows.shape[1]), inner, self.weights)
            self._count(rows.reshape(-1), np.tile(weights, len(rows)))

    @override
    def merge(self, other: Histogram) -> None:
        same_weights = (self.weights is None) == (other.weights is None) and (
            self.weights is None or np.array_equal(self.weights, other.weights)  # type: ignore[arg-type]
        )
        if other.bins != self.bins or not same_weights:
            raise CalibrationError("cannot merge histograms of different bins or weights")
        self.count += other.count
        self.zeros += other.zeros
        self._widen(other.min, other.max)
        if other._exponent is None or self._exponent is None:
            return
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

    def _widen(self, low: float, high: float) -> None:
        """Takes note of values in `[low, high]` and makes the bins wide enough for all that was ever seen."""
        if low >= self.min and high <= self.max:
            return
        self.min, self.max = min(self.min, low), max(self.max, high)
        largest = max(abs(self.min), abs(self.max))
        if not 0.0 < largest < np.inf:
            return
        # No finer than 2**-20 of the largest magnitude: float32 data has no more to say, and indices stay small.
        exponent = int(np.ceil(np.log2(max(largest, 1e-300)))) - 20
        while np.floor(np.ldexp(self.max, -exponent)) - np.floor(np.ldexp(self.min, -exponent)) + 1 > self.bins:
            exponent += 1
        if self._exponent is not None:
            for _ in range(exponent - self._exponent):
                self._first, self._counts = _halve(self._first, self._counts)
        self._exponent = exponent

    def _count_thinned(self, row: Array, inner: int, low: float, high: float) -> None:
        """Counts a large sample in `[low, high]`, flat, whose channel axis has `inner` elements behind it."""
        stride = -(-row.size // self.limit)
        while math.gcd(stride, row.size) > 1:
            stride += 1  # so that no channel or column is skipped
        thin = row[::stride]
        bound = max(high, -low) / 4.0
        near = np.abs(thin) <= bound
        far = np.zeros(0, np.int64)
        if thin.size - np.count_nonzero(near) > thin.size // _OFTEN:
            near[:] = True
        elif low >= -bound:
            far = np.flatnonzero(row > bound)
        else:
            far = np.flatnonzero((row > bound) | (row < -bound))
        # What is not near counts among the far values.
        near_weights = near * ((row.size - len(far)) / max(int(np.count_nonzero(near)), 1))
        far_weights = np.ones(len(far))
        if self.weights is not None:
            near_weights *= self._weights_of_thinned(row.size, stride, inner)
            far_weights = _weights_at(far, inner, self.weights)
        self._count(np.concatenate([row[far], thin]), np.concatenate([far_weights, self._exact(near_weights)]))

    def _weights_of_thinned(self, size: int, stride: int, inner: int) -> Array:
        """Weights of every `stride`-th value of a flat sample; kept, since samples are mostly of one size."""
        assert self.weights is not None
        if self._thinned[0] != (size, stride, inner):
            self._thinned = (size, stride, inner), _weights_at(np.arange(0, size, stride), inner, self.weights)
        return self._thinned[1]

    def _count(self, x: Array, weights: Array | None) -> None:
        """Adds flat values, each with its weight."""
        nothing = x == 0.0
        zeros = float(np.count_nonzero(nothing) if weights is None else (weights * nothing).sum())
        self.zeros += zeros
        self.count += x.size if weights is None else float(weights.sum())
        if self._exponent is None:
            return
        # In double precision: a small negative number must not underflow to -0.0, which lies in another bin.
        scaled = x.astype(np.float64)
        scaled *= 2.0**-self._exponent
        index = np.floor(scaled, out=scaled).astype(np.int64)
        first = int(index.min())
        counts = np.bincount(index - first, weights).astype(np.float64)
        if zeros:
            counts[-first] -= zeros
        self._add(first, counts)

    def _exact(self, weights: Array) -> Array:
        """Rounds to multiples of a power of two, so that sums of weights are exact and do not depend on the order."""
        scaled = weights / self._unit
        return np.multiply(np.rint(scaled, out=scaled), self._unit, out=scaled)

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
