"""Nodes that take a value apart along one axis, or put it together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcomp.passes._permutation_labels import Labels, labelled
from onnxcomp.passes._permutation_relations import Board, Place, coordinates
from onnxcomp.target import Array

_FEW = 16  # positions of an axis that are told apart though no label lies along it: queries, keys and values


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One value is part of another along one axis: Split, Slice, Concat, Gather at constant places.

    Attributes:
        part: The part.
        whole: What it is part of.
        axis: The axis, in both.
        index: Which positions, in order.
        size: Number of positions in the whole.
        dropped: The part lacks the axis.
    """

    part: Place
    whole: Place
    axis: int
    index: Array
    size: int
    dropped: bool = False

    @property
    def places(self) -> list[Place]:
        """The places it speaks of."""
        return [self.part, self.whole]

    def spread(self, board: Board) -> Sequence[tuple[Array, tuple[int, ...]]]:
        """Labels the part as the whole is, and the other way round."""
        for codes in list(board.strands(self.whole)):
            cut = self._cut(codes)
            if labelled(codes) and not labelled(cut):
                board.labels.fix(cut, "an op picks a single channel out")
            board.put(self.part, self._drop(cut))
        for codes in list(board.strands(self.part)):
            codes = np.expand_dims(codes, self.axis) if self.dropped else codes
            if codes.shape[self.axis] > 1 or (self.size <= _FEW and len(self.index) < self.size):
                shape = list(codes.shape)
                shape[self.axis] = len(self.index)
                spread = np.broadcast_to(codes, shape)
                shape[self.axis] = self.size
                whole = np.full(shape, -1)
                for position, at in enumerate(self.index):
                    self._meet(board.labels, whole, int(at), spread.take(position, axis=self.axis))
                codes = whole
            board.put(self.whole, codes)
        return ()

    def holds(self, board: Board, order: Array) -> bool:
        """Whether the part is the same part still once labels are in that order."""
        whole: dict[int, Array] = {}
        part: dict[int, Array] = {}
        for codes in board.strands(self.whole):
            moved = coordinates(board.labels.find(codes), order)
            whole |= {axis: self._cut(moved[axis]) for axis in labelled(codes)}
        for codes in board.strands(self.part):
            codes = np.expand_dims(codes, self.axis) if self.dropped else codes
            moved = coordinates(board.labels.find(codes), order)
            part |= {a: self.index[moved[a]] if a == self.axis else moved[a] for a in labelled(codes)}
        for axis in whole.keys() | part.keys():
            rank = next(iter((whole | part).values())).ndim
            still = self.index if axis == self.axis else None
            for one, other in ((whole, part), (part, whole)):
                if axis in one and axis not in other:
                    size = one[axis].shape[axis]
                    given = np.arange(size) if still is None else still
                    other[axis] = given.reshape([-1 if a == axis else 1 for a in range(rank)])
            if (whole[axis] != part[axis]).any():
                return False
        return True

    def _cut(self, codes: Array) -> Array:
        return codes.take(self.index, axis=self.axis) if codes.shape[self.axis] > 1 else codes

    def _drop(self, codes: Array) -> Array:
        return codes.take(0, axis=self.axis) if self.dropped else codes

    def _meet(self, labels: Labels, whole: Array, at: int, codes: Array) -> None:
        place = (slice(None),) * self.axis + (at,)
        labels.unify(whole[place], codes)
        whole[place] = np.where(whole[place] >= 0, whole[place], codes)
