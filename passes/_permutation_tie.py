"""Nodes that compute the same under another order of an index: contractions, elementwise ops, reshapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np

from onnxcomp.passes._permutation_labels import Labels, innermost, join, labelled
from onnxcomp.passes._permutation_relations import Board, Place, Symbols, alike, coordinates, still
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class Tie:
    """A node that computes the same under another order of any index: a contraction, an elementwise op, a Reshape.

    Attributes:
        tensors: Places with the indices along their axes. None stands for something inside of the node.
        sizes: Sizes of indices that share an axis, as far as they are known.
        told_apart: Indices whose positions the node tells apart, such as the taps of a kernel.
        what: The node in words.
    """

    tensors: tuple[tuple[Place | None, Symbols], ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    told_apart: frozenset[str] = frozenset()
    what: str = ""

    @cached_property
    def symbols(self) -> list[str]:
        """All indices."""
        return list(dict.fromkeys(s for _, axes in self.tensors for axis in axes for s in axis))

    @property
    def places(self) -> list[Place]:
        """The places it speaks of."""
        return [place for place, _ in self.tensors if place is not None]

    def spread(self, board: Board) -> list[tuple[Array, tuple[int, ...]]]:
        """Labels all places that the labels of one of them reach; see `Relation`."""
        kept = []
        for codes in self._joined(board):
            apart = [a for a in labelled(codes) if self.symbols[a] in self.told_apart]
            if len(apart) == len(labelled(codes)):
                board.labels.fix(codes, f"{self.what} tells their positions apart")
                continue
            codes = alike(board.labels, codes, apart)
            across = labelled(codes)
            inner = innermost(board.labels.find(codes))
            for place, axes in self.tensors:
                own = tuple(a for a in across if any(self.symbols[a] in axis for axis in axes))
                if not own:
                    continue
                if inner not in own:
                    kept.append((codes, own))
                    continue
                lowered = self._lower(board.labels, codes, axes)
                if place is not None:
                    board.put(place, lowered)
        return kept

    def holds(self, board: Board, order: Array) -> bool:
        """Whether the node computes the same, in another order, once labels are in that order."""
        for codes in self._joined(board):
            moved = coordinates(board.labels.find(codes), order)
            for axis in labelled(codes):
                if self.symbols[axis] in self.told_apart and (moved[axis] != still(codes, axis)).any():
                    return False
            for place, axes in self.tensors:
                names = {s for axis in axes for s in axis}
                lacking = [a for a in labelled(codes) if self.symbols[a] not in names]
                own = {} if place is None else self._moved(board, place, axes, order)
                for axis in labelled(codes):
                    symbol = self.symbols[axis]
                    if symbol not in names:
                        continue
                    found = own.get(symbol)
                    if place is None:  # it moves along, as long as that is one and the same for all that see it
                        found = moved[axis]
                        for other in lacking:
                            found = found.take([0], axis=other)
                    elif found is None:
                        found = still(codes, axis)
                    if (found != moved[axis]).any():
                        return False
        return True

    def _joined(self, board: Board) -> list[Array]:
        found: list[Array] = []
        for place, axes in self.tensors:
            for codes in () if place is None else list(board.strands(place)):
                lifted = self._lift(codes, axes)
                if lifted is None:
                    board.labels.fix(codes, f"{self.what} divides an axis of unknown size")
                else:
                    join(board.labels, found, lifted)
        return found

    def _moved(self, board: Board, place: Place, axes: Symbols, order: Array) -> dict[str, Array]:
        """Where positions of a place take their content from, by index."""
        found: dict[str, Array] = {}
        for codes in board.strands(place):
            moved = coordinates(board.labels.find(codes), order)
            for axis in labelled(codes):
                parts = [moved[axis]]
                if len(axes[axis]) > 1:
                    parts = list(np.unravel_index(moved[axis], [self.sizes[s] for s in axes[axis]]))
                for symbol, part in zip(axes[axis], parts, strict=True):
                    lifted = self._lift(part, axes)
                    assert lifted is not None
                    found[symbol] = lifted
        return found

    def _lift(self, codes: Array, axes: Symbols) -> Array | None:
        """An array in the shape of a value by index; None if an axis cannot be divided."""
        shape: list[int] = []
        for size, axis in zip(codes.shape, axes, strict=True):
            parts = [size] if len(axis) == 1 else [1] * len(axis) if size == 1 else [self.sizes.get(s, 0) for s in axis]
            if prod(parts) != size:
                return None
            shape += parts
        names = [s for axis in axes for s in axis]
        held = [s for s in self.symbols if s in names]
        turned = codes.reshape(shape).transpose([names.index(s) for s in held])
        return turned.reshape([shape[names.index(s)] if s in names else 1 for s in self.symbols])

    def _lower(self, labels: Labels, codes: Array, axes: Symbols) -> Array:
        """The inverse; labels along an index that the value lacks, or that has no room in it, become the same."""
        names = [s for axis in axes for s in axis]
        divided = {s for axis in axes if len(axis) > 1 for s in axis if not all(n in self.sizes for n in axis)}
        gone = [a for a in labelled(codes) if self.symbols[a] not in names or self.symbols[a] in divided]
        codes = alike(labels, codes, gone)
        held = [s for s in self.symbols if s in names]
        array = codes.reshape([codes.shape[self.symbols.index(s)] for s in held])
        array = array.transpose([held.index(s) for s in names])
        sizes, shape, start = [], [], 0
        for axis in axes:
            parts = list(array.shape[start : start + len(axis)])
            start += len(axis)
            if len(axis) > 1 and max(parts) > 1:
                parts = [self.sizes[s] for s in axis]
            sizes += parts
            shape.append(prod(parts))
        return np.broadcast_to(array, sizes).reshape(shape)
