"""N:M patterns: which weights of every group of M stay, by scores that need no change of the others."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from typing_extensions import Self

from onnxcomp.errors import RecipeError
from onnxcomp.target import Array

Method: TypeAlias = Literal["magnitude", "wanda", "ria", "sparsegpt"]

Score: TypeAlias = Literal["magnitude", "wanda", "ria"]

SCORE_NAMES: Mapping[Score, str] = {
    "magnitude": "the sum of magnitudes",
    "wanda": "the score |W| ||x||",
    "ria": "the relative importance",
}

_RIA_POWER = 0.5  # of the norm of an input, as in the paper


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """At most `kept` of `size` consecutive weights along the reduction axis are not zero.

    Where `size` does not divide that axis, the last group counts as filled up with zeros, which is what a kernel does
    that pads it: it keeps `kept` weights, or all if it has no more.

    Attributes:
        kept: N.
        size: M.
    """

    kept: int
    size: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads "2:4".

        Raises:
            RecipeError: If it is no such thing, or nothing would be zero.
        """
        found = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise RecipeError(f"pattern {text!r} is not N:M with N < M, such as '2:4': N of M weights stay")
        return cls(kept=int(found[1]), size=int(found[2]))

    def __str__(self) -> str:
        return f"{self.kept}:{self.size}"

    def holds(self, nonzero: Array) -> bool:
        """Whether weights keep to it already; `nonzero` is bool (..., K)."""
        return bool((self._grouped(nonzero, fill=False).sum(axis=-1) <= self.kept).all())

    def choose(self, scores: Array, magnitudes: Array) -> Array:
        """The weights that stay.

        Args:
            scores: Float (..., K). NaN has no place here.
            magnitudes: Float (..., K), decides between equal scores; after that the place in the group does.

        Returns:
            Bool (..., K); every row keeps equally many.
        """
        grouped = self._grouped(scores, fill=-np.inf)
        order = np.lexsort((-self._grouped(magnitudes, fill=0.0), -grouped), axis=-1)[..., : self.kept]
        mask = np.zeros(grouped.shape, bool)
        np.put_along_axis(mask, order, values=True, axis=-1)
        return mask.reshape(*scores.shape[:-1], -1)[..., : scores.shape[-1]]

    def _grouped(self, array: Array, fill: float) -> Array:
        """Shape (..., groups, M); an incomplete group is filled up."""
        short = -array.shape[-1] % self.size
        if short:
            array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, short)], constant_values=fill)
        return array.reshape(*array.shape[:-1], -1, self.size)


def score_of(method: Method) -> Score:
    """What a weight is worth to a method before any of them is changed."""
    return "wanda" if method == "sparsegpt" else method


def scores_of(method: Score, weight: Array, squares: Array | None) -> Array:
    """How much each weight matters; scores are compared within a group of one row only.

    * magnitude: `|W|`.
    * wanda: `|W| * ||x||` (Sun et al., arXiv 2306.11695).
    * ria: `(|W| / sum of its row + |W| / sum of its column) * ||x||^0.5` (Zhang et al., "Plug-and-Play: An Efficient
      Post-training Pruning Method for Large Language Models", ICLR 2024): no channel is lost as a whole because its
      weights are small.

    Args:
        method: One of these.
        weight: Float (groups, N, K).
        squares: Mean square of each input, float (groups, K), in place of the norm, from which it differs by a factor
            that all inputs share; None for `magnitude`.

    Returns:
        Float, in the shape of `weight`.
    """
    magnitude = np.abs(weight)
    if method == "magnitude":
        return magnitude
    assert squares is not None
    norms = np.sqrt(squares)[:, None, :]
    if method == "wanda":
        return np.asarray(magnitude * norms)
    rows, columns = magnitude.sum(axis=2, keepdims=True), magnitude.sum(axis=1, keepdims=True)
    relative = sum(magnitude / np.where(total > 0.0, total, 1.0) for total in (rows, columns))
    return np.asarray(relative * norms**_RIA_POWER)
