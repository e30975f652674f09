"""Loops over rows, and which row of a smaller tensor belongs to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

_WORTH_THREADS = 1 << 14
"""Values from which on threads are started: below, that takes longer than the work."""


def over_rows(rows: Any, length: Any) -> Callable[..., Any]:
    """The loop over rows of a kernel: parallel, unless it is known to be small."""
    if isinstance(rows, int) and (rows == 1 or (isinstance(length, int) and rows * length < _WORTH_THREADS)):
        return T.serial
    return T.parallel


def spread(index: Any, sizes: Sequence[Any], has: Sequence[bool]) -> Any:
    """Place in a tensor that is spread over another one.

    Args:
        index: Place in the other one, whose axes have `sizes`.
        sizes: An int or an expression each.
        has: Of which axes the tensor has the size; it has 1 of the others.
    """
    place, stride = tirx.const(0, "int64"), tirx.const(1, "int64")
    for axis in range(len(sizes) - 1, -1, -1):
        if has[axis]:
            place = place + (index % sizes[axis] if axis else index) * stride
            stride = stride * sizes[axis]
        index = index // sizes[axis]
    return place
