"""Values beside one another, which a thread loads and stores at once."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def beside(at: Any, count: int) -> Any:
    """Index of `count` values from `at` on, which has to be seen to be a multiple of `count`."""
    return T.ramp(at, 1, count) if count > 1 else at


def zeros(count: int) -> Any:
    """As many zeros."""
    return T.broadcast(T.float32(0), count) if count > 1 else T.float32(0)
