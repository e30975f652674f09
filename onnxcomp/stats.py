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


def finite(x: Array) -> Array:
    """The array itself.

    Raises:
        CalibrationError: If it holds NaN or infinity.
    """
    if not np.isfinite(x).all():
        bad = int(x.size - np.isfinite(x).sum())
        raise CalibrationError(f"{bad} of {x.size} values are NaN or infinite")
    return x


class ChannelMean(Observer):
    """Mean of each channel.

    Args:
        axis: Channel axis.

    Attributes:
        count: Values of a channel seen.
        shape: Shape of the last array seen.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.count = 0
        self.shape: tuple[int, ...] = ()
        self._sum: Array = np.zeros(())

    @property
    def mean(self) -> Array:
        """Mean, float64, shape `(channels,)`."""
        return self._sum / self.count

    @override
    def update(self, x: Array) -> None:
        x = np.asarray(x)
        if not x.size:
            return
        self.add(x)
        self.shape = x.shape

    def add(self, x: Array) -> None:
        """Adds values, whatever the shape of the array that they come from."""
        if not x.size:
            return
        # Sample by sample, so that the rounding of the sum does not depend on how samples came in batches.
        samples = _sums_of_samples(x, self.axis)
        if not np.isfinite(samples).all():
            finite(x)
        self._sum = np.add.accumulate(np.concatenate([np.broadcast_to(self._sum, samples[:1].shape), samples]))[-1]
        self.count += x.size // len(self._sum)

    @override
    def merge(self, other: ChannelMean) -> None:
        if other.axis != self.axis:
            raise CalibrationError("cannot merge means over different axes")
        self.count += other.count
        self._sum = self._sum + other._sum


def _sums_of_samples(x: Array, axis: int) -> Array:
    """Sums of each channel, float64 `(samples, channels)`; axis 0 counts samples unless it is the channels'."""
    axis %= max(x.ndim, 1)
    if axis == 0:
        return np.asarray(x.reshape(1, x.shape[0] if x.ndim else 1, -1).sum(axis=2, dtype=np.float64))
    x = x.reshape(len(x), -1, x.shape[axis], math.prod(x.shape[axis + 1 :]))
    if x.shape[3] > 1:  # contiguous, where numpy adds in pairs: single precision is exact enough, and much faster
        x = x.sum(axis=3)[..., None]
    return np.asarray(x[..., 0].sum(axis=1, dtype=np.float64))


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
        rows = channel_rows(finite(np.asarray(x)), self.axis)
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
        matrix = channel_rows(finite(np.asarray(x, dtype=np.float32)), self.axis)
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
