"""Observers of how sparse activations are, and the tail error that dropping small neurons causes (CETT)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from onnxcomp.errors import CalibrationError
from onnxcomp.stats import Observer, channel_rows
from onnxcomp.target import Array

_SHIFT = 16  # bits of a float32 that a bin does not tell apart: 7 bits of the mantissa are left
_BINS = 1 << (31 - _SHIFT)


class Magnitudes(Observer):
    """Distribution of `|x|` with a resolution of 1/128 of the value, however far the values are spread.

    The bins are the upper bits of a float32, so their number is fixed, zeros have one of their own, and counts merge
    exactly. Massive activations, which would make the bins of a linear histogram too wide, cost nothing.

    Args:
        weights: Factor of each channel of the last axis, shape `(channels,)`; 1 if None.
    """

    def __init__(self, weights: Array | None = None) -> None:
        self.weights = None if weights is None else np.asarray(weights, np.float32)
        self.counts: Array = np.zeros(_BINS, np.int64)

    @property
    def count(self) -> int:
        """Number of values seen."""
        return int(self.counts.sum())

    @override
    def update(self, x: Array) -> None:
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise CalibrationError(f"{x.size - int(np.isfinite(x).sum())} of {x.size} values are NaN or infinite")
        if self.weights is not None:
            x = x * self.weights
        bits = np.ascontiguousarray(x).reshape(-1).view(np.uint32) & np.uint32(0x7FFFFFFF)
        self.counts = self.counts + np.bincount(bits >> np.uint32(_SHIFT), minlength=_BINS)

    @override
    def merge(self, other: Magnitudes) -> None:
        if not _same(self.weights, other.weights):
            raise CalibrationError("cannot merge magnitudes of different weights")
        self.counts = self.counts + other.counts

    def quantile(self, q: float) -> float:
        """Magnitude that a share `q` of all values does not exceed, interpolated within its bin; 0.0 for `q = 0`.

        Raises:
            CalibrationError: If no value was seen.
        """
        if not self.count:
            raise CalibrationError("quantile of magnitudes that has seen no data")
        wanted = q * self.count
        cumulative = np.cumsum(self.counts)
        index = int(np.searchsorted(cumulative, wanted))
        if index == 0:
            return 0.0
        low, high = _edge(index), _edge(index + 1)
        inside = (wanted - float(cumulative[index - 1])) / float(self.counts[index])
        return low + (high - low) * inside

    def share(self, threshold: float) -> float:
        """Share of the values whose magnitude is at most `threshold`, interpolated likewise."""
        if threshold < 0.0 or not self.count:
            return 0.0
        index = int(np.float32(threshold).view(np.uint32) >> _SHIFT)
        low, high = _edge(index), _edge(index + 1)
        inside = 1.0 if index == 0 else (threshold - low) / (high - low)
        return float(self.counts[:index].sum() + inside * self.counts[index]) / self.count


def _edge(index: int) -> float:
    """Lower edge of a bin."""
    return float(np.array(min(index, _BINS - 1) << _SHIFT, np.uint32).view(np.float32))


def _same(a: Array | None, b: Array | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


class MeanMagnitude(Observer):
    """Mean of `|x|` for each channel of the last axis."""

    def __init__(self) -> None:
        self.rows = 0
        self._sum: Array = np.zeros(())

    @property
    def mean(self) -> Array:
        """Float64, shape `(channels,)`.

        Raises:
            CalibrationError: If no value was seen.
        """
        if not self.rows:
            raise CalibrationError("mean of magnitudes that has seen no data")
        return self._sum / self.rows

    @override
    def update(self, x: Array) -> None:
        rows = channel_rows(np.asarray(x), -1)
        self._sum = self._sum + np.abs(rows).sum(axis=0, dtype=np.float64)
        if not np.isfinite(self._sum).all():
            raise CalibrationError("some values are NaN or infinite")
        self.rows += len(rows)

    @override
    def merge(self, other: MeanMagnitude) -> None:
        self.rows += other.rows
        self._sum = self._sum + other._sum


class Firing(Observer):
    """How often each neuron fires, and how many neurons fire for a token.

    Args:
        threshold: A neuron fires if the magnitude of its value exceeds this; one value, or one a neuron.
    """

    def __init__(self, threshold: Array | float = 0.0) -> None:
        self.threshold = np.asarray(threshold, np.float32)
        self.tokens = 0
        self.fired: Array = np.zeros(0, np.int64)
        self._active: Array = np.zeros(0, np.int64)  # number of tokens for which so many neurons fire

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.fired)

    @property
    def rates(self) -> Array:
        """Share of the tokens for which each neuron fires, float64 `(neurons,)`."""
        return self.fired / max(self.tokens, 1)

    @property
    def density(self) -> float:
        """Mean share of the neurons that fire."""
        return float(self.rates.mean()) if self.neurons else 0.0

    def density_percentile(self, percent: float) -> float:
        """Share of the neurons that fire for a token, at a percentile over the tokens."""
        cumulative = np.cumsum(self._active)
        return int(np.searchsorted(cumulative, percent / 100.0 * self.tokens)) / max(self.neurons, 1)

    @override
    def update(self, x: Array) -> None:
        rows = channel_rows(np.asarray(x), -1)
        fires = ~(np.abs(rows) <= self.threshold)
        if not self.neurons:
            self.fired, self._active = np.zeros(rows.shape[1], np.int64), np.zeros(rows.shape[1] + 1, np.int64)
        self.tokens += len(rows)
        self.fired = self.fired + fires.sum(axis=0)
        self._active = self._active + np.bincount(fires.sum(axis=1), minlength=rows.shape[1] + 1)

    @override
    def merge(self, other: Firing) -> None:
        if not np.array_equal(self.threshold, other.threshold):
            raise CalibrationError("cannot merge firing rates of different thresholds")
        if not self.neurons:
            self.fired, self._active = np.zeros_like(other.fired), np.zeros_like(other._active)
        if other.neurons:
            self.fired, self._active = self.fired + other.fired, self._active + other._active
        self.tokens += other.tokens


class TailError:
    """Cumulative error of tail truncation (CETT) of a feed-forward block, Luo et al., arXiv 2411.02335.

    A neuron puts out `h_i D_i`. Those whose norm is at most a threshold are dropped; the tail error is the norm of
    their sum over that of the block's output, its mean over tokens.

    Args:
        rows: Inputs of the last layer, `(tokens, neurons)`.
        down: Its weight, `(neurons, outputs)`.
    """

    def __init__(self, rows: Array, down: Array) -> None:
        self._rows = np.asarray(rows, np.float32)
        self._down = np.asarray(down, np.float32)
        self.norms: Array = np.linalg.norm(self._down, axis=1)
        self._scores = np.abs(self._rows) * self.norms
        self._ordered = np.sort(self._scores, axis=None)
        output = np.linalg.norm(self._rows @ self._down, axis=1)
        self._live = output > 0.0
        self._output = output[self._live]

    def error(self, threshold: float) -> float:
        """CETT if neurons whose output has a norm of at most `threshold` are dropped."""
        dropped = np.where(self._scores <= threshold, self._rows, np.float32(0.0)) @ self._down
        if not len(self._output):
            return 0.0
        return float((np.linalg.norm(dropped[self._live], axis=1) / self._output).mean(dtype=np.float64))

    def sparsity(self, threshold: float) -> float:
        """Share of the neurons that are dropped."""
        return float((self._scores <= threshold).mean())

    def at(self, share: float) -> float:
        """Threshold that drops a share of the neurons."""
        return _at(self._ordered, share)

    def threshold(self, error: float, steps: int = 12) -> float:
        """Largest threshold whose CETT does not exceed `error`, by bisection over the sparsity, to 2**-`steps`."""
        low, high = 0.0, 1.0
        for _ in range(steps):
            middle = (low + high) / 2
            if self.error(self.at(middle)) <= error:
                low = middle
            else:
                high = middle
        return self.at(low)

    def curve(self, shares: Sequence[float]) -> tuple[float, ...]:
        """CETT for each share of neurons that is dropped."""
        return tuple(self.error(self.at(share)) if share else 0.0 for share in shares)


def _at(ordered: Array, share: float) -> float:
    """Value that a share of the sorted values does not exceed; 0 for none of them."""
    count = int(share * len(ordered))
    return float(ordered[count - 1]) if count else 0.0


def firing_histogram(rates: Array, edges: Sequence[float]) -> tuple[int, ...]:
    """Number of neurons that never fire, then of those whose firing rate lies in each interval between `edges`.

    Args:
        rates: Shares of tokens, `(neurons,)`.
        edges: Ends of the intervals, ascending from 0 to 1.
    """
    counts, _ = np.histogram(rates[rates > 0.0], bins=np.asarray(edges, np.float64))
    return (int(np.count_nonzero(rates == 0.0)), *map(int, counts))
