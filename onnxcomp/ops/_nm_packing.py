"""N:M sparse matrices as values and packed indices."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import GraphError

LARGEST_GROUP = 256
"""Largest M, since indices take at most 8 bits."""

_CHUNK = 1 << 22  # weights that are worked on at a time
_Array = npt.NDArray[Any]


def index_bits(m: int) -> int:
    """Bits of an index within a group of `m`."""
    return max(1, (m - 1).bit_length())


def pack_nm(weight: _Array, n: int, m: int) -> tuple[_Array, _Array]:
    """Stores `n` of every `m` consecutive rows of each column, and where they stood.

    Slot `s` of a column belongs to group `s // n`; indices rise within a group. A slot that no weight needs holds 0 and
    the index of some other 0; where `m` does not divide K, that may be one of the rows that fill the last group up.

    An index takes `b = index_bits(m)` bits. Eight consecutive slots of a column make a little-endian word of `b` bytes,
    and byte `r` of word `w` is row `w * b + r`; slot `8 * w + i` has the bits from `i * b` on.

    Args:
        weight: `[K, N]`, of any type of numbers.
        n: Rows of a group that are stored.
        m: Rows of a group, 2 to 256.

    Returns:
        The values, `[S, N]` with `S = ceil(K / m) * n`, and the packed indices, uint8 `[ceil(S / 8) * b, N]`.

    Raises:
        GraphError: If a group has more than `n` nonzeros, the weight is empty, or `n` or `m` is out of range.
    """
    if not 1 <= n <= m or not 2 <= m <= LARGEST_GROUP:
        raise GraphError(f"{n}:{m} is no pattern; it takes 1 <= N <= M and 2 <= M <= {LARGEST_GROUP}")
    if weight.ndim != 2 or not weight.size:
        raise GraphError(f"a weight of shape {list(weight.shape)} cannot be packed; it has to be a matrix")
    rows, columns = weight.shape
    groups = -(-rows // m)
    values = np.empty((groups, n, columns), weight.dtype)
    places = np.empty((groups, n, columns), np.uint8)
    for part in _parts(groups, m * columns):
        grouped = _grouped(weight, part, m)
        stored = _stored(grouped, n)
        shape = (len(grouped), columns, n)
        values[part] = grouped[stored].reshape(shape).swapaxes(1, 2)
        places[part] = (np.flatnonzero(stored) % m).astype(np.uint8).reshape(shape).swapaxes(1, 2)
    return values.reshape(-1, columns), _pack_bits(places.reshape(-1, columns), index_bits(m))


def unpack_nm(values: _Array, indices: _Array, *, m: int, k: int) -> _Array:
    """The inverse of `pack_nm`.

    Args:
        values: `[S, N]`.
        indices: Packed, uint8.
        m: Size of a group.
        k: Rows of the weight.

    Returns:
        `[K, N]`, of the type of `values`.
    """
    groups, columns = -(-k // m), values.shape[1]
    places = _unpack_bits(indices, index_bits(m), len(values)).reshape(groups, -1, columns)
    grouped = values.reshape(groups, -1, columns)
    weight = np.zeros((groups, m, columns), values.dtype)
    for part in _parts(groups, m * columns):
        np.put_along_axis(weight[part], places[part].astype(np.intp), grouped[part], axis=1)
    return weight.reshape(-1, columns)[:k]


def _parts(groups: int, size: int) -> Iterator[slice]:
    """Slices of groups, each of `size` weights, so that what is computed from them stays small."""
    step = max(1, _CHUNK // size)
    yield from (slice(start, start + step) for start in range(0, groups, step))


def _grouped(weight: _Array, part: slice, m: int) -> _Array:
    """Groups of rows as `[groups, N, m]`, the last filled up with zeros."""
    rows = weight[part.start * m : part.stop * m]
    rows = np.pad(rows, [(0, -len(rows) % m), (0, 0)])
    return np.ascontiguousarray(rows.reshape(-1, m, weight.shape[1]).swapaxes(1, 2))


def _stored(grouped: _Array, n: int) -> _Array:
    """Which of each group are stored, exactly `n`: all nonzeros, then the first zeros."""
    nonzero = grouped != 0
    spare = n - nonzero.sum(axis=-1, keepdims=True, dtype=np.int16)
    if (spare < 0).any():
        raise GraphError(f"groups of {grouped.shape[-1]} weights have up to {n - spare.min()} nonzeros, more than {n}")
    zeros: _Array = nonzero | (np.cumsum(~nonzero, axis=-1, dtype=np.int16) <= spare)
    return zeros


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """For each of the eight slots of a word: slot, byte and bit within the byte where its index begins."""
    yield from ((slot, slot * bits // 8, slot * bits % 8) for slot in range(8))


def _pack_bits(places: _Array, bits: int) -> _Array:
    slots, columns = places.shape
    words = np.pad(places, [(0, -slots % 8), (0, 0)]).reshape(-1, 8, columns)
    packed = np.zeros((len(words), bits, columns), np.uint8)
    for slot, byte, bit in _places(bits):
        packed[:, byte] |= words[:, slot] << bit
        if bit + bits > 8:
            packed[:, byte + 1] |= words[:, slot] >> (8 - bit)
    return packed.reshape(-1, columns)


def _unpack_bits(packed: _Array, bits: int, slots: int) -> _Array:
    columns = packed.shape[1]
    packed = packed.reshape(-1, bits, columns)
    words = np.empty((len(packed), 8, columns), np.uint8)
    for slot, byte, bit in _places(bits):
        word = packed[:, byte] >> bit
        if bit + bits > 8:
            word = word | packed[:, byte + 1] << (8 - bit)
        words[:, slot] = word & ((1 << bits) - 1)
    return words.reshape(-1, columns)[:slots]
