"""What relations between the positions of values are about: places, their labels, and the indices of their axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.passes._permutation_labels import Labels, sources
from onnxcomp.target import Array

Place: TypeAlias = ir.Value | tuple[ir.Node, int]
"""A value, or a vector that is shared among nodes as an input of one of them, which gets its own copy."""
Symbols: TypeAlias = tuple[tuple[str, ...], ...]
"""For each axis of a value the indices that run along it, the slowest first; none for an axis of size 1."""


class Board(Protocol):
    """Where labels are kept."""

    labels: Labels

    def strands(self, place: Place) -> list[Array]:
        """Arrays of labels of a place."""

    def put(self, place: Place, codes: Array) -> None:
        """Labels the positions of a place."""


class Relation(Protocol):
    """What a node asks of the order of channels in the values around it."""

    @property
    def places(self) -> Sequence[Place]:
        """The places it speaks of."""

    def spread(self, board: Board) -> Sequence[tuple[Array, tuple[int, ...]]]:
        """Labels all places that the labels of one of them reach.

        Returns:
            Labels, and the axes along which none may change its position: that of the heads, where what is weighed by
            attention has an order of its own in each.
        """

    def holds(self, board: Board, order: Array) -> bool:
        """Whether the node computes the same, in another order, once labels are in that order."""


def alike(labels: Labels, codes: Array, axes: Sequence[int]) -> Array:
    """Makes labels the same along axes, of which one position is left; it has no label only where none has."""
    for axis in axes:
        one = codes.max(axis=axis, keepdims=True)
        labels.unify(np.broadcast_to(one, codes.shape), codes)
        codes = one
    return codes


def still(codes: Array, axis: int) -> Array:
    """The positions along an axis, in the shape of an array of labels."""
    return np.arange(codes.shape[axis]).reshape([-1 if a == axis else 1 for a in range(codes.ndim)])


def coordinates(codes: Array, order: Array) -> Mapping[int, Array]:
    """For every axis the position along it that each position takes its content from."""
    return dict(enumerate(np.unravel_index(sources(codes, order), codes.shape)))


def axes_of(count: int, prefix: str = "") -> Iterator[tuple[str]]:
    """One index an axis."""
    return ((f"{prefix}{i}",) for i in range(count))
