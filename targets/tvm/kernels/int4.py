"""Packed 4-bit integers, and how they become floats."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.machine import Machine

NIBBLES = 8
"""4-bit integers in a word."""

_SIXTEEN = 0x41800000
"""Bits of 16.0; a 4-bit integer in the highest bits of its mantissa adds as much to it."""


def int4_columns(machine: Machine) -> int:
    """Columns of a vector of words of 4-bit integers."""
    return NIBBLES * machine.lanes


def int4_shape(machine: Machine, rows: int, columns: int) -> tuple[int, int, int]:
    """Shape of packed 4-bit integers, int32: rows, vectors of words, lanes."""
    return rows, -(-columns // int4_columns(machine)), machine.lanes


def pack_int4(machine: Machine, weight: Array) -> Array:
    """4-bit integers so that one shift of a vector of words gives floats of columns that lie together.

    Args:
        machine: What for.
        weight: uint8 (R, C/2), low bits first.

    Returns:
        int32, see `int4_shape`; nibble `s` of lane `l` is that of column `s * lanes + l`.
    """
    codes = np.stack([weight & 15, weight >> 4], axis=-1).reshape(len(weight), -1).astype(np.uint32)
    rows, vectors, lanes = int4_shape(machine, *codes.shape)
    wide = np.pad(codes, [(0, 0), (0, vectors * int4_columns(machine) - codes.shape[1])])
    nibbles = wide.reshape(rows, vectors, NIBBLES, lanes)
    shifts = np.arange(0, 4 * NIBBLES, 4, dtype=np.uint32)[:, None]
    return np.bitwise_or.reduce(nibbles << shifts, axis=2).view(np.int32)


def sixteen_plus(words: Any, nibble: Any, lanes: int) -> Any:
    """16 + a nibble of each word of an int32 vector, as float32.

    Args:
        words: The vector.
        nibble: Which one, an expression that is constant once loops are unrolled.
        lanes: Words.
    """
    shift = 19 - 4 * nibble  # to the highest bits of a mantissa
    left = T.shift_left(words, T.broadcast(T.max(shift, 0), lanes))
    right = T.shift_right(words, T.broadcast(T.max(0 - shift, 0), lanes))
    moved = T.if_then_else(shift >= 0, left, right)
    bits = T.bitwise_or(T.bitwise_and(moved, T.broadcast(15 << 19, lanes)), T.broadcast(_SIXTEEN, lanes))
    return T.reinterpret(f"float32x{lanes}", bits)
