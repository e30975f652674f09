"""Indices that the axes of a shape have in common with those of another shape of as many elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from onnxcomp.passes._permutation_relations import Symbols
from onnxcomp.passes._turns import Sizes

_Size = int | str | None


def common_indices(old: Sizes, new: Sizes) -> tuple[Symbols, Symbols, dict[str, int], frozenset[str]]:
    """Takes axes apart into indices that both shapes have, from the front as far as that goes and from the back.

    What is left between is one index for each axis where one of the shapes has a single axis there.

    Returns:
        The indices of both, sizes as far as they are known, and the indices that they do not have in common.
    """
    found = _matched(old, new)
    middle, apart = found.middle()
    first, second = (
        tuple((*f, *m, *b[::-1]) for f, m, b in zip(found.front[s], middle[s], found.back[s], strict=True))
        for s in (0, 1)
    )
    return first, second, found.sizes, apart


def single_size(old: Sizes, new: Sizes) -> tuple[str, int] | None:
    """A symbolic size that follows because everything else is known, by name; None if there is none."""
    found = _matched(old, new)
    left = [[size for size in rest if size != 1] for rest in found.rest]
    for one, other in (left, left[::-1]):
        if len(one) == 1 and isinstance(one[0], str):
            numbers = [size for size in other if isinstance(size, int)]
            if numbers and len(numbers) == len(other):
                return one[0], prod(numbers)
    return None


def _matched(old: Sizes, new: Sizes) -> _Indices:
    found = _Indices(rest=(list(old), list(new)), front=_empty(old, new), back=_empty(old, new))
    found.match(front=True)
    found.match(front=False)
    return found


@dataclass(kw_only=True, eq=False)
class _Indices:
    """Indices by axis of the old and the new shape.

    Attributes:
        rest: What is left of each axis.
        front: Indices found from the front.
        back: Indices found from the back, the fastest first.
        sizes: Their sizes, as far as they are known.
    """

    rest: tuple[list[_Size], list[_Size]]
    front: tuple[list[list[str]], list[list[str]]]
    back: tuple[list[list[str]], list[list[str]]]
    sizes: dict[str, int] = field(default_factory=dict)

    def match(self, *, front: bool) -> None:
        """Goes through both shapes from one side until sizes have no factor in common."""
        count = [len(r) for r in self.rest]
        at = [0, 0]
        while at[0] < count[0] and at[1] < count[1]:
            places = [a if front else -1 - a for a in at]
            sizes = [r[p] for r, p in zip(self.rest, places, strict=True)]
            if 1 not in sizes:
                common = _common(*sizes)
                if common is None:
                    return
                name = f"{'front' if front else 'back'}{at[0]}.{at[1]}"
                if isinstance(common, int):
                    self.sizes[name] = common
                for side, (size, place) in enumerate(zip(sizes, places, strict=True)):
                    (self.front if front else self.back)[side][place].append(name)
                    self.rest[side][place] = size // common if isinstance(size, int) and isinstance(common, int) else 1
            at = [a + (self.rest[side][p] == 1) for side, (a, p) in enumerate(zip(at, places, strict=True))]

    def middle(self) -> tuple[list[list[list[str]]], frozenset[str]]:
        """Indices of what no side reached, and those that the shapes do not have in common."""
        left = [[(axis, size) for axis, size in enumerate(r) if size != 1] for r in self.rest]
        found: list[list[list[str]]] = [[[] for _ in r] for r in self.rest]
        one = next((side for side in (0, 1) if len(left[side]) == 1 and left[1 - side]), None)
        for side in (0, 1):
            if side == one:
                continue
            for axis, size in left[side]:
                name = f"{('old', 'new')[side]}{axis}"
                if isinstance(size, int):
                    self.sizes[name] = size
                found[side][axis].append(name)
                if one is not None:
                    found[one][left[one][0][0]].append(name)
        names = (name for side in found for axis in side for name in axis)
        return found, frozenset() if one is not None else frozenset(names)


def _common(one: _Size, other: _Size) -> _Size:
    """A size that both are multiples of, of which one is the whole; None if there is none."""
    if one is not None and one == other:
        return one
    if not isinstance(one, int) or not isinstance(other, int) or not one or not other:
        return None
    small, large = sorted((one, other))
    return small if large % small == 0 else None


def _empty(one: Sequence[_Size], other: Sequence[_Size]) -> tuple[list[list[str]], list[list[str]]]:
    first: list[list[str]] = [[] for _ in one]
    second: list[list[str]] = [[] for _ in other]
    return first, second
