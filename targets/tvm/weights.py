"""The file in which the weights of an artifact lie, as kernels read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.skeleton import release
from onnxcomp.target import Array
from onnxcomp.targets.tvm.manifest import ALIGNMENT


def write(path: Path, weights: Mapping[str, ir.TensorProtocol]) -> list[dict[str, Any]]:
    """Writes weights one after another, and returns their entries in the manifest.

    One weight at a time is in memory.
    """
    entries = []
    with path.open("wb") as file:
        for name, tensor in weights.items():
            array = np.ascontiguousarray(tensor.numpy())
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            entries.append(
                {
                    "name": name,
                    "dtype": str(array.dtype),
                    "shape": list(array.shape),
                    "offset": file.tell(),
                    "bytes": array.nbytes,
                }
            )
            file.write(array.data)
            if isinstance(tensor, ir.ExternalTensor):
                release(tensor)
    return entries


def mapped(path: Path, entries: list[Mapping[str, Any]]) -> list[Array]:
    """The weights of a file, read when they are first used; what is written to them stays in this process."""
    if not entries or not path.stat().st_size:
        return [np.zeros(entry["shape"], entry["dtype"]) for entry in entries]
    whole = np.memmap(path, np.uint8, "c")
    return [np.ndarray(entry["shape"], entry["dtype"], buffer=whole.data, offset=entry["offset"]) for entry in entries]
