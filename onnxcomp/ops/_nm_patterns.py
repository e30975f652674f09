"""Which N:M pattern a weight keeps to, and how many bytes that saves."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._nm_packing import index_bits

_CHUNK = 1 << 22  # weights that are looked at at a time
_LARGEST = 32
"""Largest M that is looked for: zeros that fall into place by chance only make N larger from there on."""

_Array = npt.NDArray[Any]


def packed_bytes(shape: tuple[int, ...], n: int, m: int, bits: int) -> int:
    """Bytes of the values and indices that `pack_nm` makes of a matrix.

    Args:
        shape: Of the matrix, `(K, N)`.
        n: Rows of a group that are stored.
        m: Rows of a group.
        bits: Of a value.
    """
    rows, columns = shape
    slots = -(-rows // m) * n
    return -(-slots * columns * bits // 8) + -(-slots // 8) * index_bits(m) * columns


def keeps_to(weight: _Array, n: int, m: int, zero: _Array | int = 0) -> bool:
    """Whether no `m` consecutive rows of a column have more than `n` nonzeros.

    Args:
        weight: `[K, N]`.
        n: Of the pattern.
        m: Of the pattern, at most 256.
        zero: What stands for 0, of all of the weight or `[K, N]`.
    """
    step = max(1, _CHUNK // (m * weight.shape[1])) * m
    for start in range(0, len(weight), step):
        nonzero = _filled(weight, zero, slice(start, start + step), m)
        if nonzero.reshape(-1, m, nonzero.shape[1]).sum(axis=1, dtype=np.int16).max(initial=0) > n:
            return False
    return True


def smallest_pattern(weight: _Array, bits: int, zero: _Array | int = 0) -> tuple[int, int] | None:
    """The pattern in which a weight takes the fewest bytes, of those with powers of two up to 16:32 and half zeros.

    Args:
        weight: `[K, N]`.
        bits: Of a stored value.
        zero: What stands for 0, of all of the weight or `[K, N]`.

    Returns:
        N and M, or None if it keeps to no pattern, or to none in which it is smaller than with its zeros.
    """
    most: dict[int, int] = {}
    step = max(1, _CHUNK // (_LARGEST * weight.shape[1])) * _LARGEST
    for start in range(0, len(weight), step):
        counts = _filled(weight, zero, slice(start, start + step), _LARGEST).view(np.uint8)
        size = 1
        while size < _LARGEST:
            counts, size = counts[::2] + counts[1::2], size * 2
            most[size] = max(most.get(size, 0), int(counts.max(initial=0)))
        if all(kept > size // 2 for size, kept in most.items()):
            return None
    patterns = [(1 << max(kept - 1, 0).bit_length(), size) for size, kept in most.items() if kept <= size // 2]
    takes = {pattern: packed_bytes(weight.shape, *pattern, bits) for pattern in patterns}
    best = min(takes, key=lambda pattern: takes[pattern], default=None)
    return best if best is not None and 8 * takes[best] < weight.size * bits else None


def _filled(weight: _Array, zero: _Array | int, rows: slice, m: int) -> _Array:
    """What of some rows is not zero, filled up to whole groups."""
    limits = zero[rows] if isinstance(zero, np.ndarray) else zero
    nonzero: _Array = weight[rows] != limits
    return np.pad(nonzero, [(0, -len(nonzero) % m), (0, 0)])
