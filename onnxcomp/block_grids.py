"""Scales and zero points of blocks of weights, and the searches for them: `w' = (q - zero_point) * scale`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.target import Array

Method = Literal["rtn", "mse", "hqq"]


@dataclass(frozen=True)
class Levels:
    """The integers that there are: 0 to `top`; `middle` stands for 0.0 if the grid is symmetric."""

    bits: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """What stands for 0.0 on a symmetric grid."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Grid:
    """Scale and zero point of each block, float32 (n, blocks)."""

    scale: Array
    zero: Array

    def integers(self, x: Array, levels: Levels) -> Array:
        """Integers as float32 for `x` (n, blocks, block_size)."""
        q = np.rint(x * (1 / self.scale)[..., None])
        q += self.zero[..., None]
        return np.clip(q, 0, levels.top, out=q)

    def values(self, q: Array) -> Array:
        """What integers `q` (n, blocks, block_size) stand for."""
        return np.asarray((q - self.zero[..., None]) * self.scale[..., None])

    def refit(self, x: Array, q: Array, importance: Array | None = None) -> Grid:
        """The grid with the scale that serves `x` best by least squares if its integers are `q`."""
        shifted = q - self.zero[..., None]
        counted = shifted if importance is None else shifted * importance
        products, squares = (np.einsum("nbk,nbk->nb", a, counted) for a in (x, shifted))
        usable = (products * np.sign(self.scale) > 0) & np.isfinite(products)
        return Grid(np.where(usable, products / np.where(usable, squares, 1), self.scale), self.zero)

    def where(self, better: Array, other: Grid) -> Grid:
        """This grid for the blocks that are `better`, the other one elsewhere."""
        return Grid(np.where(better, self.scale, other.scale), np.where(better, self.zero, other.zero))


def _extremes(x: Array, levels: Levels, importance: Array | None = None) -> Grid:
    """Round to nearest: the extremes of a block, and zero, are representable."""
    low, high = x.min(axis=-1), x.max(axis=-1)
    if levels.symmetric:
        scale = np.where(high > -low, high, low) / np.float32(-levels.middle)
        scale[np.abs(scale) < _VANISHING] = 1
        return Grid(scale, np.full_like(scale, levels.middle))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / np.float32(levels.top)
    scale[scale < _VANISHING] = 1
    return Grid(scale, np.clip(np.rint(-low / scale), 0, levels.top))


def _least_squares(x: Array, levels: Levels, importance: Array | None = None) -> Grid:
    """Least squared error over clips and zero points, each with the scale that suits the integers it leads to."""
    start = best = _extremes(x, levels)
    lowest = _squared_error(x, start, levels, importance)
    # A symmetric grid has one level more below zero than above: the other sign puts it on the other side.
    variants = [(1, 0), (-1, 0)] if levels.symmetric else [(1, -1), (1, 0), (1, 1)]
    for fraction in np.linspace(1.0, _LEAST_RANGE[levels.bits], 5, dtype=np.float32):
        for sign, shift in variants:
            zero = start.zero if levels.symmetric else np.clip(start.zero + shift, 0, levels.top)
            grid = Grid(start.scale * (sign * fraction), zero)
            grid = grid.refit(x, grid.integers(x, levels), importance)
            error = _squared_error(x, grid, levels, importance)
            better = error < lowest
            best, lowest = grid.where(better, best), np.where(better, error, lowest)
    return best


def _half_quadratic(x: Array, levels: Levels, importance: Array | None = None) -> Grid:
    """Least sum of `|error|**0.7` by half-quadratic splitting, after HQQ (Badri and Shaji, mobiusml.github.io, 2023).

    HQQ splits the error into a sparse part, found by shrinkage, and a rest, whose square is minimised. There the scale
    stays and the zero point is any float, for which runtimes have no fast kernel; here both are fitted in turn, the
    zero point as an integer, and the error is measured in steps, so that one penalty suits every block.
    """
    grid = best = _extremes(x, levels)
    lowest = _error(x, grid, levels)
    penalty = 10.0
    for _ in range(20):
        q = grid.integers(x, levels)
        error = (x - grid.values(q)) / grid.scale[..., None]
        size = np.abs(error) + np.float32(1e-6)
        sparse = np.sign(error) * np.maximum(size - size ** (_NORM - 1) / penalty, 0)
        rest = x - sparse * grid.scale[..., None]
        if not levels.symmetric:
            zero = np.rint((q - rest / grid.scale[..., None]).mean(axis=-1))
            grid = Grid(grid.scale, np.clip(zero, 0, levels.top))
        grid = grid.refit(rest, q)
        error_sum = _error(x, grid, levels)
        better = error_sum < lowest
        if not better.any():
            break
        best, lowest = grid.where(better, best), np.where(better, error_sum, lowest)
        penalty *= 1.01
    return best


def _squared_error(x: Array, grid: Grid, levels: Levels, importance: Array | None) -> Array:
    """Sum of the squared errors of each block (n, blocks)."""
    error = grid.values(grid.integers(x, levels)) - x
    counted = error if importance is None else error * importance
    return np.asarray(np.einsum("nbk,nbk->nb", error, counted))


def _error(x: Array, grid: Grid, levels: Levels) -> Array:
    """Sum of `|error|**_NORM` of each block (n, blocks)."""
    error = grid.values(grid.integers(x, levels)) - x
    return np.asarray((np.abs(error) ** np.float32(_NORM)).sum(axis=-1))


_NORM = 0.7
_VANISHING = 1e-30  # a scale whose inverse might overflow; its block counts as zeros
_LEAST_RANGE: Mapping[int, float] = {2: 0.5, 4: 0.7, 8: 0.97}
"""Bits to the smallest share of a block's range that is worth a try."""

SEARCHES: Mapping[Method, Callable[[Array, Levels, Array | None], Grid]] = {
    "rtn": _extremes,
    "mse": _least_squares,
    "hqq": _half_quadratic,
}
