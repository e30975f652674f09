"""Block-wise integer quantization of weight matrices: the search for scale and zero point, and the packed layout.

A matrix of N rows (one an output channel) and K columns (the reduction axis) is cut along its rows into blocks, the
last of which may be padded. `w' = (q - zero_point) * scale` with `0 <= q < 2**bits`, scale and zero point a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from onnxcomp.block_grids import SEARCHES, Grid, Levels, Method
from onnxcomp.target import Array

# Elements that are worked on at a time: what a search needs then stays in the cache of a core.
_SLAB = 1 << 17
_READ = 1 << 21  # elements that are read at a time


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


@dataclass(frozen=True, kw_only=True)
class Source:
    """A matrix that is read part by part.

    Attributes:
        shape: (N, K).
        dtype: Float32 or float16.
        column_major: Columns lie together, so that a part of few columns and all rows is cheap to read.
        read: Returns the part of some rows and columns.
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    column_major: bool
    read: Callable[[slice, slice], Array]


Rounding: TypeAlias = Callable[[Array, Grid], Array]
"""Chooses integers for rows (n, K) on their grid; returns them as floats (n, K)."""


def quantize_blocks(
    weight: Array | Source,
    bits: int,
    block_size: int,
    *,
    symmetric: bool,
    method: Method,
    importance: Array | None = None,
    rounding: Rounding | None = None,
) -> Blocks:
    """Quantizes a matrix, part by part.

    Args:
        weight: Float32 or float16, finite, (N, K); a transposed view will do.
        bits: 2, 4 or 8.
        block_size: Columns in a block, a multiple of `8 / bits`.
        symmetric: No zero points: 0.0 is `2**(bits-1)`. Where the largest weight of a block is positive, its scale is
            negative, so that this weight gets the one level that only one side has.
        method: How scale and zero point are found: `rtn` takes them from the extremes of a block; `mse` minimises the
            squared error; `hqq` minimises a norm between L0 and L1, which lets go of outliers (see `block_grids`).
        importance: Of each column to the squared error that `mse` minimises, (K,), positive; all count alike if None.
        rounding: Chooses the integers; the nearest ones if None.

    Raises:
        NotFiniteError: If the matrix holds NaN or infinity.
    """
    source = _source(weight) if isinstance(weight, np.ndarray) else weight
    rows, columns = source.shape
    count = -(-columns // block_size)
    codes = np.empty((rows, count, block_size * bits // 8), np.uint8)
    scale = np.empty((rows, count), source.dtype)
    zero = np.empty((rows, count), np.uint8)
    noise = power = 0.0
    levels = Levels(bits, symmetric)
    counts: Array | None = None
    if importance is not None:
        counts = _blocks(importance[None], block_size)[0]
    for part, columns_part, tile in _tiles(source, block_size, whole_rows=rounding is not None):
        blocks = _blocks(tile, block_size)
        here = slice(columns_part.start // block_size, columns_part.start // block_size + blocks.shape[1])
        found = SEARCHES[method](blocks, levels, None if counts is None else counts[here])
        stored = _storable(found.scale, source.dtype)
        grid = Grid(stored.astype(np.float32), found.zero)
        if rounding is None:
            integers = grid.integers(blocks, levels)
        else:
            integers = np.repeat(grid.zero, block_size, axis=1)  # what stands for the zeros of the padding
            integers[:, :columns] = rounding(blocks.reshape(len(tile), -1)[:, :columns], grid)
            integers = integers.reshape(blocks.shape)
        codes[part, here] = pack(integers.astype(np.uint8), bits)
        scale[part, here], zero[part, here] = stored, found.zero
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


class NotFiniteError(ValueError):
    """A matrix holds NaN or infinity."""


def _source(weight: Array) -> Source:
    rows, columns = weight.shape
    return Source(
        shape=(rows, columns),
        dtype=weight.dtype,
        column_major=weight.strides[0] < weight.strides[1],
        read=lambda part, columns_part: np.asarray(weight[part, columns_part]),
    )


def _tiles(source: Source, block_size: int, *, whole_rows: bool) -> Iterator[tuple[slice, slice, Array]]:
    """Cuts a matrix into parts of whole blocks that are cheap to read and small enough to work on.

    Yields:
        Rows, columns, and what stands there, (n, k).
    """
    rows, columns = source.shape
    across = columns
    if source.column_major and not whole_rows:
        across = min(columns, max(1, _READ // (rows * block_size)) * block_size)
    down = rows if across < columns else max(1, _READ // max(columns, 1))
    for row in range(0, rows, down):
        for column in range(0, columns, across):
            part, columns_part = slice(row, min(row + down, rows)), slice(column, min(column + across, columns))
            read = source.read(part, columns_part)
            if not np.isfinite(read).all():
                raise NotFiniteError("it holds NaN or infinity")
            step = len(read) if whole_rows else max(1, _SLAB // read.shape[1])
            for start in range(0, len(read), step):
                piece = read[start : start + step]
                yield slice(row + start, row + start + len(piece)), columns_part, piece


def _blocks(tile: Array, block_size: int) -> Array:
    """A part of a matrix (n, k), padded with zeros to whole blocks: float32 (n, blocks, block_size)."""
    count = -(-tile.shape[1] // block_size)
    padded = np.zeros((len(tile), count * block_size), np.float32)
    padded[:, : tile.shape[1]] = tile
    return padded.reshape(len(tile), count, block_size)


def _storable(scale: Array, dtype: np.dtype[np.floating[Any]]) -> Array:
    """Scales as they are stored; one that vanishes there belongs to a block of zeros, which any scale serves."""
    stored = scale.astype(dtype)
    return np.where(stored == 0, np.ones_like(stored), stored)
