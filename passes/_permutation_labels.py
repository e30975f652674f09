"""Which positions of a channel axis move together when channels are put in another order.

Every position of an axis carries a label. Positions of the same label, in whatever value, move together. A value may
hold a label several times, as the two halves of one matrix for gate and up do: these copies move within their own half.
An array of labels has as many axes as the value; along an axis of size 1 all positions are alike. -1 is no label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcomp.target import Array


class Labels:
    """Labels 0, 1, ..., which may turn out to be the same, or to have to stay where they are.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._parent: Array = np.arange(count)
        self._why: Array = np.full(count, -1)
        self._reasons: list[str] = []

    @property
    def count(self) -> int:
        """Number of labels, those that turned out to be the same included."""
        return len(self._parent)

    @property
    def reasons(self) -> Sequence[str]:
        """Why labels have to stay, in the order in which that was found."""
        return self._reasons

    def find(self, codes: Array) -> Array:
        """The smallest label that is the same, for each."""
        while not np.array_equal(shorter := self._parent[self._parent], self._parent):
            self._parent = shorter
        return np.where(codes < 0, -1, self._parent[codes])

    def unify(self, one: Array, other: Array) -> None:
        """Makes labels the same, pair by pair, as far as both are labels."""
        while True:
            first, second = self.find(one), self.find(other)
            differ = (first >= 0) & (second >= 0) & (first != second)
            if not differ.any():
                return
            low, high = np.minimum(first, second)[differ], np.maximum(first, second)[differ]
            np.minimum.at(self._parent, high, low)

    def fix(self, codes: Array, reason: str) -> None:
        """Labels that have to stay where they are."""
        these = np.unique(codes[codes >= 0])
        new = these[self._why[these] < 0]
        if new.size:
            if reason not in self._reasons:
                self._reasons.append(reason)
            self._why[new] = self._reasons.index(reason)

    def fixed(self) -> Array:
        """Whether a label has to stay, bool, one a label."""
        roots = self.find(np.arange(self.count))
        found = np.zeros(self.count, bool)
        found[roots[self._why >= 0]] = True
        return np.asarray(found[roots])


def labelled(codes: Array) -> tuple[int, ...]:
    """Axes along which an array of labels has several positions."""
    return tuple(axis for axis, size in enumerate(codes.shape) if size > 1)


def join(labels: Labels, strands: list[Array], codes: Array) -> bool:
    """Adds an array of labels to those of one value: each axis is in one of them only.

    Returns:
        Whether that says anything new about the value.
    """
    if not labelled(codes) or not (codes >= 0).any():
        return False
    axes = set(labelled(codes))
    same = [s for s in strands if axes & set(labelled(s))]
    merged = codes
    for old in same:
        shape = np.broadcast_shapes(old.shape, merged.shape)
        first, second = np.broadcast_to(old, shape), np.broadcast_to(merged, shape)
        labels.unify(first, second)
        merged = np.where(first >= 0, first, second)
    if len(same) == 1 and merged.shape == same[0].shape and not ((merged >= 0) & (same[0] < 0)).any():
        return False
    strands[:] = [s for s in strands if not any(s is old for old in same)] + [merged]
    return True


def innermost(codes: Array) -> int:
    """The axis along which labels count up: that of the channels where heads have an axis of their own."""
    found, best = -1, -1
    for axis in labelled(codes):
        steps = int((np.abs(np.diff(codes, axis=axis)) == 1).sum())
        if steps >= best:
            found, best = axis, steps
    return found


def sources(codes: Array, order: Array) -> Array:
    """Where each position takes its content from, as an index into the flattened array of labels.

    Args:
        codes: Labels, none of which is the same as another.
        order: For each label the one whose content it gets; both occur equally often in `codes`.
    """
    flat = codes.reshape(-1)
    by_label = np.argsort(flat, kind="stable")
    ordered = flat[by_label]
    copy = np.empty(len(flat), np.int64)
    copy[by_label] = np.arange(len(flat)) - np.searchsorted(ordered, ordered)
    wanted = np.where(flat < 0, -1, order[flat])
    found = by_label[np.searchsorted(ordered, wanted) + copy]
    return np.where(flat < 0, np.arange(len(flat)), found).reshape(codes.shape)


def occurrences(codes: Array, keys: Array, count: int) -> Array:
    """A number for each label, equal where labels have equal keys at all their positions, in order.

    Args:
        codes: Labels.
        keys: A key for each position, in the same shape.
        count: Number of labels.
    """
    held = codes.reshape(-1) >= 0
    flat, keys = codes.reshape(-1)[held], keys.reshape(-1)[held]
    by_label = np.argsort(flat, kind="stable")
    sizes = np.bincount(flat, minlength=count)
    starts = np.cumsum(sizes) - sizes
    found, used = np.zeros(count, np.int64), 1
    for size in np.unique(sizes[sizes > 0]):
        these = np.flatnonzero(sizes == size)
        rows = keys[by_label][starts[these, None] + np.arange(size)]
        _, numbers = np.unique(rows, axis=0, return_inverse=True)
        found[these] = numbers.reshape(-1) + used
        used = int(found[these].max()) + 1
    return found
