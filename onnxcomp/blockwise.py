"""Block-wise integer quantization of weight matrices: the search for scale and zero point, and the packed layout.

A matrix of N rows (one an output channel) and K columns (the reduction axis) is cut along its rows into blocks, the
last of which may be padded. `w' = (q - zero_point) * scale` with `0 <= q < 2**bits`, scale and zero point a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxcomp.target import Array

Method = Literal["rtn", "mse", "hqq"]

# Elements that are worked on at a time: what a search needs then stays in the cache of a core.
_SLAB = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A matrix (N, K) in integers.

    Attributes:
        bits: Bits of an integer.
        block_size: Columns in a block.
        columns: K, without padding.
        codes: Packed integers, uint8, (N, blocks, block_size * bits / 8); the low bits of a byte come first.
        scale: (N, blocks), in the type of the weight.
        zero_point: uint8, (N, blocks); None where it is `2**(bits-1)` throughout.
        error: Root of the squared error relative to that of the squared weights.
    """

    bits: int
    block_size: int
    columns: int
    codes: Array
    scale: Array
    zero_point: Array | None
    error: float

    def integers(self) -> Array:
        """The integers, one a byte: uint8, (N, K)."""
        return unpack(self.codes, self.bits).reshape(len(self.codes), -1)[:, : self.columns]

    def dequantize(self) -> Array:
        """The matrix that the integers stand for: float32, (N, K)."""
        zero = 1 << (self.bits - 1) if self.zero_point is None else self.zero_point[..., None].astype(np.float32)
        values = (unpack(self.codes, self.bits) - np.float32(zero)) * self.scale[..., None].astype(np.float32)
        return np.asarray(values.reshape(len(values), -1)[:, : self.columns], np.float32)


def pack(codes: Array, bits: int) -> Array:
    """Packs integers below `2**bits` along the last axis, which is padded with zeros to a whole byte; low bits first.

    Args:
        codes: uint8, (..., n).
        bits: 2, 4 or 8.

    Returns:
        uint8, (..., ceil(n * bits / 8)).
    """
    each = 8 // bits
    missing = -codes.shape[-1] % each
    if missing:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    parts = codes.reshape(*codes.shape[:-1], codes.shape[-1] // each, each)
    packed = np.zeros(parts.shape[:-1], np.uint8)
    for i in range(each):
        packed |= parts[..., i] << np.uint8(i * bits)
    return packed


def unpack(packed: Array, bits: int) -> Array:
    """Integers that `pack` packed: uint8, (..., n) to (..., n * 8 / bits)."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return np.asarray(codes.reshape(*packed.shape[:-1], -1), np.uint8)


def quantize_blocks(weight: Array, bits: int, block_size: int, *, symmetric: bool, method: Method) -> Blocks:
    """Quantizes a matrix, some rows at a time.

    Args:
        weight: Float32 or float16, finite, (N, K); a transposed view will do.
        bits: 2, 4 or 8.
        block_size: Columns in a block, a multiple of `8 / bits`.
        symmetric: No zero points: 0.0 is `2**(bits-1)`. Where the largest weight of a block is positive, its scale is
            negative, so that this weight gets the one level that only one side has.
        method: How scale and zero point are found: `rtn` takes them from the extremes of a block; `mse` minimises the
            squared error; `hqq` minimises a norm between L0 and L1, which lets go of outliers (see `_half_quadratic`).
    """
    rows, columns = weight.shape
    count = -(-columns // block_size)
    codes = np.empty((rows, count, block_size * bits // 8), np.uint8)
    scale = np.empty((rows, count), weight.dtype)
    zero = np.empty((rows, count), np.uint8)
    noise = power = 0.0
    levels = _Levels(bits, symmetric)
    step = max(1, _SLAB // (count * block_size))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        slab = np.zeros((min(step, rows - start), count * block_size), np.float32)
        slab[:, :columns] = weight[part]
        blocks = slab.reshape(len(slab), count, block_size)
        found = _SEARCHES[method](blocks, levels)
        scale[part], zero[part] = _storable(found.scale, weight.dtype), found.zero
        grid = _Grid(scale[part].astype(np.float32), found.zero)
        integers = grid.integers(blocks, levels)
        codes[part] = pack(integers.astype(np.uint8), bits)
        noise += float(np.square(grid.values(integers) - blocks, dtype=np.float64).sum())
        power += float(np.square(blocks, dtype=np.float64).sum())
    return Blocks(
        bits=bits,
        block_size=block_size,
        columns=columns,
        codes=codes,
        scale=scale,
        zero_point=None if symmetric else zero,
        error=(noise / power) ** 0.5 if power else 0.0,
    )


@dataclass(frozen=True)
class _Levels:
    """The integers that there are: 0 to `top`; `middle` stands for 0.0 if the grid is symmetric."""

    bits: int
    symmetric: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class _Grid:
    """Scale and zero point of each block, float32 (n, blocks)."""

    scale: Array
    zero: Array

    def integers(self, x: Array, levels: _Levels) -> Array:
        """Integers as float32 for `x` (n, blocks, block_size)."""
        q = np.rint(x * (1 / self.scale)[..., None])
        q += self.zero[..., None]
        return np.clip(q, 0, levels.top, out=q)

    def values(self, q: Array) -> Array:
        return np.asarray((q - self.zero[..., None]) * self.scale[..., None])

    def refit(self, x: Array, q: Array) -> _Grid:
        """The grid with the scale that serves `x` best by least squares if its integers are `q`."""
        shifted = q - self.zero[..., None]
        products, squares = (np.einsum("nbk,nbk->nb", a, shifted) for a in (x, shifted))
        usable = (products * np.sign(self.scale) > 0) & np.isfinite(products)
        return _Grid(np.where(usable, products / np.where(usable, squares, 1), self.scale), self.zero)

    def where(self, better: Array, other: _Grid) -> _Grid:
        """This grid for the blocks that are `better`, the other one elsewhere."""
        return _Grid(np.where(better, self.scale, other.scale), np.where(better, self.zero, other.zero))


def _storable(scale: Array, dtype: np.dtype[np.floating[Any]]) -> Array:
    """Scales as they are stored; one that vanishes there belongs to a block of zeros, which any scale serves."""
    stored = scale.astype(dtype)
    return np.where(stored == 0, np.ones_like(stored), stored)


def _extremes(x: Array, levels: _Levels) -> _Grid:
    """Round to nearest: the extremes of a block, and zero, are representable."""
    low, high = x.min(axis=-1), x.max(axis=-1)
    if levels.symmetric:
        scale = np.where(high > -low, high, low) / np.float32(-levels.middle)
        scale[np.abs(scale) < _VANISHING] = 1
        return _Grid(scale, np.full_like(scale, levels.middle))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / np.float32(levels.top)
    scale[scale < _VANISHING] = 1
    return _Grid(scale, np.clip(np.rint(-low / scale), 0, levels.top))


def _least_squares(x: Array, levels: _Levels) -> _Grid:
    """Least squared error over clips and zero points, each with the scale that suits the integers it leads to."""
    start = best = _extremes(x, levels)
    lowest = _error(x, start, levels, 2.0)
    # A symmetric grid has one level more below zero than above: the other sign puts it on the other side.
    variants = [(1, 0), (-1, 0)] if levels.symmetric else [(1, -1), (1, 0), (1, 1)]
    for fraction in np.linspace(1.0, _LEAST_RANGE[levels.bits], 5, dtype=np.float32):
        for sign, shift in variants:
            zero = start.zero if levels.symmetric else np.clip(start.zero + shift, 0, levels.top)
            grid = _Grid(start.scale * (sign * fraction), zero)
            grid = grid.refit(x, grid.integers(x, levels))
            error = _error(x, grid, levels, 2.0)
            better = error < lowest
            best, lowest = grid.where(better, best), np.where(better, error, lowest)
    return best


def _half_quadratic(x: Array, levels: _Levels) -> _Grid:
    """Least sum of `|error|**0.7` by half-quadratic splitting, after HQQ (Badri and Shaji, mobiusml.github.io, 2023).

    HQQ splits the error into a sparse part, found by shrinkage, and a rest, whose square is minimised. There the scale
    stays and the zero point is any float, for which runtimes have no fast kernel; here both are fitted in turn, the
    zero point as an integer, and the error is measured in steps, so that one penalty suits every block.
    """
    grid = best = _extremes(x, levels)
    lowest = _error(x, grid, levels, _NORM)
    penalty = 10.0
    for _ in range(20):
        q = grid.integers(x, levels)
        error = (x - grid.values(q)) / grid.scale[..., None]
        size = np.abs(error) + np.float32(1e-6)
        sparse = np.sign(error) * np.maximum(size - size ** (_NORM - 1) / penalty, 0)
        rest = x - sparse * grid.scale[..., None]
        if not levels.symmetric:
            zero = np.rint((q - rest / grid.scale[..., None]).mean(axis=-1))
            grid = _Grid(grid.scale, np.clip(zero, 0, levels.top))
        grid = grid.refit(rest, q)
        error_sum = _error(x, grid, levels, _NORM)
        better = error_sum < lowest
        if not better.any():
            break
        best, lowest = grid.where(better, best), np.where(better, error_sum, lowest)
        penalty *= 1.01
    return best


def _error(x: Array, grid: _Grid, levels: _Levels, norm: float) -> Array:
    """Sum of `|error|**norm` of each block (n, blocks)."""
    error = grid.values(grid.integers(x, levels)) - x
    if norm == 2.0:
        return np.asarray(np.einsum("nbk,nbk->nb", error, error))
    return np.asarray((np.abs(error) ** np.float32(norm)).sum(axis=-1))


_NORM = 0.7
_VANISHING = 1e-30  # a scale whose inverse might overflow; its block counts as zeros
_LEAST_RANGE: Mapping[int, float] = {2: 0.5, 4: 0.7, 8: 0.97}
"""Bits to the smallest share of a block's range that is worth a try."""

_SEARCHES: Mapping[Method, Callable[[Array, _Levels], _Grid]] = {
    "rtn": _extremes,
    "mse": _least_squares,
    "hqq": _half_quadratic,
}
