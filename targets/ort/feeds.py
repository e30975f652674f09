"""Inputs and outputs of an onnxruntime session: what they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcomp.errors import UnsupportedError
from onnxcomp.target import TensorSpec

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(string)": np.dtype(object),
    **{
        f"tensor({name})": np.dtype(name)
        for name in ("bool", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
}


def tensor_spec(node: Any) -> TensorSpec:
    """Spec of an onnxruntime NodeArg.

    Raises:
        UnsupportedError: If it is no tensor, or NumPy has no such element type.
    """
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise UnsupportedError(
            f"{node.name!r} is a {node.type}; models can be run whose inputs and outputs are tensors of float16, "
            "float32, float64, integers, bool or strings: insert a Cast"
        )
    shape = tuple(node.shape) if isinstance(node.shape, list | tuple) else None
    return TensorSpec(name=node.name, dtype=dtype, shape=shape)
