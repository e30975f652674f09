"""Feeds: whether one fits the inputs of a session, and what to say if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxcomp.errors import DataError
from onnxcomp.target import Feed, TensorSpec


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
