"""Weights that stay on disk: read part by part, and written back part by part once they are quantized.

Files are read and not mapped, since mapped pages count as memory of the process for as long as the map stands.
"""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.blockwise import Source
from onnxcomp.target import Array

_SMALL = 1 << 16  # bytes that are not worth a place in a file


def source_on_disk(value: ir.Value, *, transposed: bool) -> Source | None:
    """A matrix that lies in a file, or None if it does not.

    Args:
        value: Initializer.
        transposed: It is stored as (N, K) and not as (K, N).
    """
    tensor = value.const_value
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    sizes = tensor.shape.numpy()
    dtype = np.dtype(tensor.dtype.numpy())
    path, start, width = tensor.path, tensor.offset or 0, sizes[1]

    def read(part: slice, columns: slice) -> Array:
        outer, inner = (part, columns) if transposed else (columns, part)
        first = start + outer.start * width * dtype.itemsize
        count = (outer.stop - outer.start) * width
        stored = np.fromfile(path, dtype.newbyteorder("<"), count, offset=first).reshape(-1, width)[:, inner]
        return stored if transposed else stored.T

    return Source(
        shape=(sizes[0], sizes[1]) if transposed else (sizes[1], sizes[0]),
        dtype=dtype,
        column_major=not transposed,
        read=read,
    )


class Spool:
    """A temporary file for new weights; it goes when no weight refers to it any more."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="onnxcomp-")
        self._path = Path(self._folder.name, "weights")

    def take(self, value: ir.Value) -> None:
        """Moves an initializer to the file, unless it is small."""
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _SMALL or isinstance(tensor, ir.LazyTensor | ir.ExternalTensor):
            return
        with self._path.open("ab") as file:
            start = file.tell()
            file.write(tensor.tobytes())
        value.const_value = ir.LazyTensor(
            partial(self._read, start, tensor.dtype, tuple(tensor.shape.numpy())),
            dtype=tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name,
        )

    def _read(self, start: int, dtype: ir.DataType, sizes: tuple[int, ...]) -> ir.TensorProtocol:
        if dtype.bitwidth < 8:
            packed = np.fromfile(self._path, np.uint8, -(-math.prod(sizes) * dtype.bitwidth // 8), offset=start)
            return ir.PackedTensor(packed, dtype, shape=ir.Shape(sizes))
        stored = np.fromfile(self._path, dtype.numpy(), math.prod(sizes), offset=start)
        return ir.Tensor(stored.reshape(sizes), dtype=dtype)
