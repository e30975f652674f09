"""Inputs and outputs of a session: what they are, and whether a feed fits them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcomp.errors import DataError, UnsupportedError
from onnxcomp.target import Feed, TensorSpec

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


def check_feed(feed: Feed, specs: Mapping[str, TensorSpec]) -> None:
    """Refuses a feed that does not fit; NaN is allowed.

    Raises:
        DataError: With what is wrong and what the model expects.
    """
    if feed.keys() != specs.keys():
        missing = [n for n in specs if n not in feed]
        unknown = [n for n in feed if n not in specs]
        parts = [f"lacks input {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"has the unknown name {', '.join(map(repr, unknown))}"] if unknown else []
        raise DataError(f"the feed {' and '.join(parts)}; the model expects {describe(specs.values())}")
    for name, spec in specs.items():
        array = feed[name]
        if not isinstance(array, np.ndarray):
            raise DataError(
                f"input {name!r} is a {type(array).__name__}, not a NumPy array; it takes {_describe(spec)}"
            )
        if array.dtype != spec.dtype and not (spec.dtype.kind == "O" and array.dtype.kind in "UO"):
            raise DataError(f"input {name!r} has dtype {array.dtype}; the model expects {_describe(spec)}: use .astype")
        if spec.shape is None:
            continue
        fits = array.ndim == len(spec.shape) and all(
            d == e for d, e in zip(array.shape, spec.shape, strict=True) if isinstance(e, int)
        )
        if not fits:
            raise DataError(f"input {name!r} has shape {list(array.shape)}; the model expects {_describe(spec)}")


def describe(specs: Any) -> str:
    """Names, types and shapes, for messages."""
    return ", ".join(f"{s.name!r}: {_describe(s)}" for s in specs) or "no input"


def _describe(spec: TensorSpec) -> str:
    dtype = "string" if spec.dtype.kind == "O" else str(spec.dtype)
    if spec.shape is None:
        return dtype
    return f"{dtype}[{', '.join('?' if d is None else str(d) for d in spec.shape)}]"
