"""Scales and zero points of groups of a row: a thread reads those of eight groups beside one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._integers import from_byte, from_half

_GROUPS = 8
_BITS = {"float32": 32, "float16": 16, "uint8": 8}
_MOST_BITS = 128
"""Of a load."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers of a type, (rows, groups), of which eight are read to words of 32 bits.

    Attributes:
        dtype: float32, float16 or uint8.
        groups: Numbers of a row.
    """

    dtype: str
    groups: int

    @property
    def piece(self) -> int:
        """Numbers of a load; fewer than 16 bytes where rows do not begin at a multiple of that."""
        sizes = [size for size in (8, 4) if self.groups % size == 0 and size * _BITS[self.dtype] <= _MOST_BITS]
        return sizes[0] if sizes else 1

    @property
    def words(self) -> int:
        """Words that eight of them take; one each where they cannot be read together."""
        return _GROUPS if self.piece == 1 else _GROUPS * _BITS[self.dtype] // 32

    @property
    def load(self) -> Any:
        """A macro `(read, at, numbers, row, first)` that fills words from `read[at]` on, as far as there are groups."""
        piece, groups, dtype = self.piece, self.groups, self.dtype
        count = piece * _BITS[dtype] // 32  # words of a load
        of_words = f"int32x{count}" if count > 1 else "int32"

        @T.inline
        def load(read, at, numbers, row, first):
            for i in T.unroll(_GROUPS // piece):
                there = T.meta_var(groups % _GROUPS == 0 or first + i * piece < groups)
                if piece == 1:
                    if dtype == "float32":
                        read[at + i] = T.if_then_else(
                            there, T.reinterpret("int32", numbers[row, T.min(first + i, groups - 1)]), 0
                        )
                    elif dtype == "float16":
                        read[at + i] = T.if_then_else(
                            there,
                            T.Cast("int32", T.reinterpret("uint16", numbers[row, T.min(first + i, groups - 1)])),
                            0,
                        )
                    else:
                        read[at + i] = T.if_then_else(
                            there, T.Cast("int32", numbers[row, T.min(first + i, groups - 1)]), 0
                        )
                elif count == 1:
                    read[at + i] = 0
                    if there:
                        read[at + i] = T.reinterpret(of_words, numbers[row, T.ramp(first + i * piece, 1, piece)])
                else:
                    read[T.ramp(at + i * count, 1, count)] = T.broadcast(0, count)
                    if there:
                        read[T.ramp(at + i * count, 1, count)] = T.reinterpret(
                            of_words, numbers[row, T.ramp(first + i * piece, 1, piece)]
                        )

        return load

    def value(self, read: Any, at: Any, index: Any, plus: int = 0) -> Any:
        """One of the eight as float32, and a number added."""
        if self.dtype == "float32":
            return T.reinterpret("float32", read[at + index])
        if self.piece == 1:
            word, place = read[at + index], 0
        else:
            of_word = 32 // _BITS[self.dtype]
            word, place = read[at + index // of_word], index % of_word
        return from_half(word, place) if self.dtype == "float16" else from_byte(word, place, plus)
