"""Searches an order of channels in which groups of M keep more of the score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from onnxcomp.errors import PassError
from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.target import Array

Search: TypeAlias = Literal["deal", "assignment", "swaps"]

_ENOUGH = 1e-5  # share of the score that a sweep has to gain for there to be another one
_LITTLE = 0.01  # share of the most that a round of exchanges gained that the next has to gain
_WORK = 1 << 32  # comparisons of one slot in one sweep; more rows than that allows are not looked at
_ROOM = 1 << 25  # scores that are held at once, as far as rows can be left out
_TILE = 1 << 18  # elements that are compared at a time


@dataclass(frozen=True, kw_only=True)
class Searcher:
    """How to go about it; see the fields of the pass.

    A sweep takes one channel out of every group and hands all of them out anew. What a channel adds to a group depends
    only on the channels that stay in it, so all exchanges of such a round are judged by one matrix (groups, channels).
    """

    pattern: Pattern
    search: Search
    rounds: int
    seed: int

    def rows(self, channels: int) -> int:
        """How many rows of scores are worth looking at."""
        groups = max(channels // self.pattern.size, 1)
        return max(min(_WORK // groups**2, _ROOM // channels), 64)

    def order(self, scores: Array) -> Array:
        """Which channel comes to which place.

        Args:
            scores: Float32 (channels, rows); channels are a multiple of M.

        Returns:
            Integers (channels,); those as they are if nothing better is found.
        """
        size = self.pattern.size
        found = np.arange(len(scores)).reshape(-1, size)
        if len(found) < 2:
            return found.reshape(-1)
        kept = self.retained(scores, found)
        dealt = deal(scores, size)
        if (other := self.retained(scores, dealt)) > kept:
            found, kept = dealt, other
        if self.search == "deal":
            return found.reshape(-1)
        solve = _assigned if self.search == "assignment" else _swapped
        rng = np.random.default_rng(self.seed)
        fruitless = 0
        for _ in range(self.rounds):
            new = self._sweep(scores, rng.permuted(found, axis=1), solve)
            after = self.retained(scores, new)
            fruitless = 0 if after - kept > _ENOUGH * kept else fruitless + 1
            if after > kept:
                found, kept = new, after
            if fruitless == size:  # each slot has met about all others by then
                break
        return np.sort(found, axis=1)[np.argsort(found.min(axis=1))].reshape(-1)

    def retained(self, scores: Array, groups: Array) -> float:
        """Sum of the scores that stay when each row of `groups` is one group."""
        step = max(_TILE // max(scores.shape[1] * self.pattern.size, 1), 1)
        total = 0.0
        for start in range(0, len(groups), step):
            members = scores[groups[start : start + step]]
            total += float(top(members, self.pattern.kept, axis=1).sum(dtype=np.float64))
        return total

    def _sweep(self, scores: Array, groups: Array, solve: Callable[[Array], Array]) -> Array:
        groups = groups.copy()
        kept, size = self.pattern.kept, self.pattern.size
        for slot in range(size):
            others = np.delete(groups, slot, axis=1)
            bar = np.partition(scores[others], size - 1 - kept, axis=1)[:, size - 1 - kept]  # N-th largest of M - 1
            taken = groups[:, slot]
            groups[:, slot] = taken[solve(_gains(bar, scores[taken]))]
        return groups


def deal(scores: Array, size: int) -> Array:
    """Channels dealt by their total: the best of all groups first, then their second best; (groups, M)."""
    ranked = np.argsort(-scores.sum(axis=1, dtype=np.float64), kind="stable")
    return ranked.reshape(size, -1).T


def top(scores: Array, count: int, axis: int) -> Array:
    """The `count` largest along an axis."""
    size = scores.shape[axis]
    return np.partition(scores, size - count, axis=axis).take(np.arange(size - count, size), axis=axis)


def _gains(bar: Array, scores: Array) -> Array:
    """What each group keeps with each channel, up to what it keeps in any case, float64 (groups, channels).

    A group keeps its N - 1 best, and the better one of its N-th best and the new channel.

    Args:
        bar: Score of the N-th best without the new channel, (groups, rows).
        scores: Of the channels, (channels, rows).
    """
    found = np.empty((len(bar), len(scores)))
    ones = np.ones(scores.shape[1], scores.dtype)
    step = max(_TILE // max(scores.shape[1], 1), 1)
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        buffer = np.empty_like(part)
        for group, row in enumerate(bar):
            found[group, start : start + step] = np.maximum(part, row, out=buffer) @ ones
    return found


def _assigned(gains: Array) -> Array:
    """The best channel for each group, all different."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        raise PassError(
            "search = 'assignment' needs scipy; run `pip install 'onnxcomp[permute]'`, or use 'swaps'"
        ) from error
    return np.asarray(linear_sum_assignment(gains, maximize=True)[1])


def _swapped(gains: Array) -> Array:
    """Channels exchanged between pairs of groups as long as that gains anything, the best pairs first."""
    count = len(gains)
    held = np.arange(count)
    most = 0.0
    while True:
        own = gains[np.arange(count), held]
        here = gains[:, held]
        change = here + here.T - own[:, None] - own[None, :]
        best = change.argmax(axis=1)
        value = change[np.arange(count), best]
        free = np.ones(count, bool)
        gained = 0.0
        for one in np.argsort(-value, kind="stable"):
            other = best[one]
            if value[one] <= 1e-7 * abs(own[one]):
                break
            if free[one] and free[other]:
                held[one], held[other] = held[other], held[one]
                free[[one, other]] = False
                gained += float(value[one])
        most = max(most, gained)
        if gained <= _LITTLE * most:
            return held
