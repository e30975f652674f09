"""What the readers of a space keep of their scores, and the scores in the form in which orders are searched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.passes._nm_scores import Pattern, Score, scores_of
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.passes._permutation_flow import Flow
from onnxcomp.passes._permutation_labels import sources
from onnxcomp.passes._permutation_search import Searcher, top
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """A layer that sums over labelled channels.

    Attributes:
        layer: The layer.
        codes: Labels of its channels, (groups, channels).
    """

    layer: Layer
    codes: Array

    def scores(self, score: Score, squares: Array | None) -> Array:
        """Float32 (groups, N / groups, kernel positions, channels)."""
        weight = self.layer.read().weight
        found = scores_of(score, weight, squares).astype(np.float32)
        return found.reshape(*found.shape[:2], self.layer.taps, self.layer.channels)

    def moved(self, order: Array) -> Array:
        """Where each channel takes its weights from, (groups, channels)."""
        return np.stack([sources(codes, order) for codes in self.codes])


def seed_labels(layer: Layer, done: Array) -> Array:
    """Labels of the inputs of a layer, in the shape of its weight.

    Args:
        layer: The layer.
        done: Inputs that get none, bool (groups, channels).
    """
    codes = np.where(done, -1, np.arange(done.size).reshape(done.shape))
    ones = [1] * (len(layer.shape) - 2)
    if layer.groups > 1:
        return np.repeat(codes, layer.shape[0] // layer.groups, axis=0).reshape(layer.shape[0], layer.channels, *ones)
    return codes.reshape(*((1, -1) if layer.outputs_first else (-1, 1)), *ones)


def space_readers(flow: Flow, layers: Sequence[Layer]) -> list[Reader]:
    """The layers that sum over labelled channels."""
    found = []
    for layer in layers:
        axis = 1 if layer.outputs_first else 0
        for codes in flow.strands(layer.value):
            if codes.shape[axis] == 1:
                continue
            rows = np.moveaxis(flow.labels.find(codes), axis, -1).reshape(-1, layer.channels)
            step = len(rows) // layer.groups or 1
            by_group = np.broadcast_to(rows[::step], (layer.groups, layer.channels))
            found.append(Reader(layer=layer, codes=by_group))
    return found


def retained(scores: Array, moved: Array | None, pattern: Pattern) -> float:
    """Sum of the scores that stay, channels taken from `moved` or as they are."""
    total = 0.0
    for group in range(len(scores)):
        rows = scores[group] if moved is None else scores[group].take(moved[group], axis=-1)
        total += pattern_sum(rows.reshape(-1, rows.shape[-1]), pattern)
    return total


def pattern_sum(rows: Array, pattern: Pattern) -> float:
    """Sum of what stays in rows of consecutive channels; an incomplete group is filled up with zeros."""
    total, step = 0.0, max((1 << 22) // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        part = np.pad(part, [(0, 0), (0, -part.shape[1] % pattern.size)])
        total += float(top(part.reshape(len(part), -1, pattern.size), pattern.kept, axis=2).sum(dtype=np.float64))
    return total


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Labels that may change places, and what says which should.

    Attributes:
        members: The labels, group by group.
        columns: For each reader, what holds scores of each member: (copies, members) with a group of channels for each
            copy, and the channels.
    """

    members: Array
    columns: Mapping[int, list[tuple[int, Array]]]


def problems(readers: Sequence[Reader], classes: Array, pattern: Pattern) -> Iterator[Problem]:
    """One problem for each class of labels that may change places with one another.

    The largest layer says which labels are together in a group. Groups that hold a label of another class stay as they
    are, and layers that group labels otherwise have no say.
    """
    largest = sorted(readers, key=lambda r: -int(np.prod(r.layer.shape)))
    for number in np.unique(classes[classes >= 0]):
        for reader in largest:
            members = _groups(reader.codes, classes, number, pattern.size)
            if len(members) > pattern.size:
                break
        else:
            continue
        columns = {i: list(_copies(r.codes, members, pattern.size)) for i, r in enumerate(readers)}
        yield Problem(members=members, columns={i: c for i, c in columns.items() if c})


def _groups(codes: Array, classes: Array, number: int, size: int) -> Array:
    """Labels of one class that fill groups, each label at its first place."""
    seen: set[int] = set()
    found: list[int] = []
    for row in codes:
        whole = row[: len(row) // size * size].reshape(-1, size)
        held = (whole >= 0) & (classes[whole] == number)
        for group in whole[held.all(axis=1)].tolist():
            if len(set(group)) == size and not seen.intersection(group):
                seen.update(group)
                found += group
    return np.array(found, np.int64)


def _copies(codes: Array, members: Array, size: int) -> Iterator[tuple[int, Array]]:
    """Where a layer holds all members, in groups of the same members: group of channels, and the channels."""
    for group, row in enumerate(codes):
        by_label = np.argsort(row, kind="stable")
        ordered = row[by_label]
        first = np.searchsorted(ordered, members)
        counts = np.searchsorted(ordered, members, side="right") - first
        for copy in range(int(counts.min())):
            places = by_label[first + copy]
            if (np.ptp(places.reshape(-1, size) // size, axis=1) == 0).all():
                yield group, places


def best_order(
    readers: Sequence[Reader],
    found: Sequence[Problem],
    scores: Callable[[Reader], Array],
    searcher: Searcher,
    count: int,
) -> Array:
    """The order that the search finds: for each label the one whose content it gets."""
    rngs = [np.random.default_rng(searcher.seed) for _ in found]
    shares = [min(searcher.rows(len(p.members)) / max(_rows(p, readers), 1), 1.0) for p in found]
    parts: list[list[Array]] = [[] for _ in found]
    for i, reader in enumerate(readers):
        read = scores(reader) if any(i in p.columns for p in found) else None
        for problem, rng, share, taken in zip(found, rngs, shares, parts, strict=True):
            for group, places in problem.columns.get(i, ()):
                assert read is not None
                rows = read[group].reshape(-1, read.shape[-1])
                if share < 1.0:
                    rows = rows[np.sort(rng.permutation(len(rows))[: max(round(len(rows) * share), 1)])]
                taken.append(rows.take(places, axis=1))
    order = np.arange(count)
    for problem, taken in zip(found, parts, strict=True):
        matrix = np.ascontiguousarray(np.concatenate(taken).T)
        taken.clear()
        order[problem.members] = problem.members[searcher.order(matrix)]
    return order


def _rows(problem: Problem, readers: Sequence[Reader]) -> int:
    sizes = {i: int(np.prod(r.layer.shape)) // (r.layer.groups * r.layer.channels) for i, r in enumerate(readers)}
    return sum(sizes[i] * len(columns) for i, columns in problem.columns.items())
