"""Clusters of prompts by the neurons that are core for them."""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from onnxcomp.stats import Observer
from onnxcomp.target import Array

_STARTS, _ROUNDS = 8, 100


class CoreSets(Observer):
    """Keeps the most frequent neurons of each prompt as bits; those that are core of no token are left out.

    Args:
        kept: Number of neurons of a prompt.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._size = 0
        self._bits: list[Array] = []

    @override
    def update(self, x: Array) -> None:
        """Adds the counts of one prompt, `(neurons,)`."""
        self._size = x.size
        marks = np.zeros(x.size, np.bool_)
        index = most_frequent(x, self._kept)
        marks[index] = x[index] > 0
        self._bits.append(np.packbits(marks))

    @override
    def merge(self, other: CoreSets) -> None:
        self._size = max(self._size, other._size)
        self._bits += other._bits

    def sets(self) -> Array:
        """One row a prompt in which its neurons are 1: float32 `(prompts, neurons)`."""
        return np.unpackbits(np.stack(self._bits), axis=1, count=self._size).astype(np.float32)

    def __len__(self) -> int:
        return len(self._bits)


def most_frequent(counts: Array, kept: int) -> Array:
    """The neurons of the largest counts, ascending; of equal ones those of lower number."""
    return np.sort(np.argsort(-counts, kind="stable")[:kept])


def k_means(points: Array, clusters: int, seed: int) -> Array:
    """The best of several runs of Lloyd's algorithm, each from centres that k-means++ draws.

    Args:
        points: float32 `(points, dimensions)`.
        clusters: Number of clusters, at most that of points.
        seed: Of the draws.

    Returns:
        The cluster of each point, int64 `(points,)`. None is empty.
    """
    random = np.random.default_rng(seed)
    runs = [_lloyd(points, _spread(points, clusters, random)) for _ in range(_STARTS)]
    return min(runs, key=lambda found: _scatter(points, found, clusters))


def _lloyd(points: Array, centres: Array) -> Array:
    clusters = len(centres)
    found = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        distances = _distances(points, centres)
        new = distances.argmin(axis=1)
        for empty in np.setdiff1d(np.arange(clusters), new):
            # The point that is worst served, of a cluster that has others, is a cluster of its own.
            alone = np.bincount(new, minlength=clusters)[new] == 1
            new[np.where(alone, -1.0, distances[np.arange(len(points)), new]).argmax()] = empty
        if (new == found).all():
            break
        found = new
        centres = np.stack([points[found == c].mean(axis=0) for c in range(clusters)])
    return found


def _scatter(points: Array, found: Array, clusters: int) -> float:
    """Sum of the squared distances of points to the means of their clusters."""
    return float(sum(points[found == c].var(axis=0).sum() * (found == c).sum() for c in range(clusters)))


def _spread(points: Array, clusters: int, random: np.random.Generator) -> Array:
    """Points far from each other: each is drawn with the square of its distance to those drawn before."""
    drawn: list[int] = [int(random.integers(len(points)))]
    while len(drawn) < clusters:
        least = _distances(points, points[drawn]).min(axis=1)
        total = float(least.sum())
        weights: Any = least / total if total else None
        drawn.append(int(random.choice(len(points), p=weights)))
    return points[drawn]


def _distances(points: Array, centres: Array) -> Array:
    """Squared distances, float64 `(points, centres)`."""
    points, centres = points.astype(np.float64), centres.astype(np.float64)
    products = points @ centres.T
    squares = np.square(points).sum(axis=1)[:, None] + np.square(centres).sum(axis=1)
    return np.asarray(np.maximum(squares - 2 * products, 0.0))
