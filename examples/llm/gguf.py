"""Reads GGUF files: metadata, and tensors of the types F32, F16, Q4_0, Q4_1 and Q8_0 as float32.

Layout (little endian): magic, version, number of tensors and of metadata entries; the entries; name, shape, type and
offset of every tensor; padding; data. A quantized row is cut into blocks of 32 values with one or two float16 each.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

_BLOCK = 32
_STRING, _ARRAY = 8, 9
_SCALARS = dict(enumerate(["<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "<?"])) | {10: "<u8", 11: "<i8", 12: "<f8"}


@dataclass(frozen=True)
class _Info:
    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufFile:
    """An open GGUF file; tensors are read when they are asked for.

    Args:
        path: The file.

    Raises:
        ValueError: If it is no GGUF file of version 2 or 3.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        magic, version, tensors, entries = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"{path} is no GGUF file of version 2 or 3")
        self.metadata: dict[str, Any] = {self._string(): self._value(*self._unpack("<I")) for _ in range(entries)}
        self._infos = dict(self._info() for _ in range(tensors))
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-self._at // alignment) * alignment

    @property
    def names(self) -> list[str]:
        """Names of the tensors."""
        return list(self._infos)

    def tensor(self, name: str) -> np.ndarray:
        """Tensor `name` as float32; a matrix as (outputs, inputs).

        Raises:
            ValueError: If its type is none that this module knows.
        """
        info = self._infos[name]
        if info.kind not in _KINDS:
            raise ValueError(f"tensor {name!r} has the GGUF type {info.kind}, which cannot be read here")
        block, size, decode = _KINDS[info.kind]
        count = prod(info.shape)
        at = self._start + info.offset
        raw = np.frombuffer(self._data, np.uint8, count // block * size, at).reshape(-1, size)
        return decode(raw).reshape(info.shape)

    def _info(self) -> tuple[str, _Info]:
        name = self._string()
        (rank,) = self._unpack("<I")
        shape = self._unpack(f"<{rank}Q")[::-1]  # GGUF names the fastest axis first
        return name, _Info(shape, *self._unpack("<IQ"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(kind, 1)[0].item()
        inner, count = self._unpack("<IQ")
        if inner in (_STRING, _ARRAY):
            return [self._value(inner) for _ in range(count)]
        return self._numbers(inner, count).tolist()

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        values = np.frombuffer(self._data, _SCALARS[kind], count, self._at)
        self._at += values.nbytes
        return values

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8", errors="replace")

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values


def _half(raw: np.ndarray) -> np.ndarray:
    """Float16 in two bytes a row, as a float32 column."""
    return raw.copy().view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """32 values a row from 16 bytes: first all low halves, then all high ones."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


# GGUF type: values in a block, bytes in a block, decoder of blocks.
_KINDS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (1, 4, lambda raw: raw.copy().view("<f4")),
    1: (1, 2, _half),
    2: (_BLOCK, 18, lambda raw: (_nibbles(raw[:, 2:]) - 8) * _half(raw[:, :2])),
    3: (_BLOCK, 20, lambda raw: _nibbles(raw[:, 4:]) * _half(raw[:, :2]) + _half(raw[:, 2:4])),
    8: (_BLOCK, 34, lambda raw: raw[:, 2:].copy().view(np.int8) * _half(raw[:, :2])),
}
