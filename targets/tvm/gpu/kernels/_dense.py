"""What float32 products of few and of many rows have in common: what they multiply, and how sums end.

Where there are fewer blocks than fill the GPU, the inner dimension is split: parts of the sums go to memory, and a
second launch adds them up, always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._scalar import activated
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue

_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product, or several side by side: groups.

    Attributes:
        machine: What it is for.
        rows: Of the output; an expression if they are not known.
        k: Inner dimension.
        n: Columns of the output, of a group.
        groups: How many.
        x_lanes: Values of x along the inner dimension that may be read at once: 4, or 1.
        w_columns: Columns that there are of w, of a group: a multiple of 4.
        x_at: Indices of `(group, row, k)` in x, of which the last may become a vector.
        x_inside: Whether x has a value at `(group, row, k)` with row and k in bounds; None for always.
        w_at: `(w, group, k, column, lanes)`, what is read there; 4 values may be.
        y_at: Indices of `(group, row, column)` in the output.
        epilogue: What is done to the sums.
    """

    machine: Gpu
    rows: Any
    k: int
    n: int
    groups: int = 1
    x_lanes: int
    w_columns: int
    x_at: Callable[..., tuple[Any, Any]]
    x_inside: Callable[..., Any] | None = None
    w_at: Callable[..., Any]
    y_at: Callable[..., tuple[Any, Any]]
    epilogue: Epilogue

    @property
    def whole(self) -> int:
        """Columns of the output, of all groups."""
        return self.groups * self.n


def finished(p: Product, value: Any, bias: Any, added: Any) -> Any:
    """A sum with bias, residual and activation."""
    value = value + bias
    return activated(value + added if p.epilogue.residual else value, p.epilogue)


def finish(p: Product, lanes: int) -> Any:
    """Macro `(sums, at, bias, residual, y, group, row, column)`: stores sums side by side, from `at` on, in the output.

    Args:
        p: The product.
        lanes: How many; 1, or 4 if that divides n.
    """

    @T.inline
    def store(sums, start, b, r, y, group, row, column):
        place = T.meta_var(p.y_at(group, row, column))
        ends = T.alloc_buffer((2 * lanes,), "float32", scope="local")
        ends[beside(0, lanes)] = b[beside(group * p.n + column, lanes)]
        if p.epilogue.residual:
            ends[beside(lanes, lanes)] = r[place[0], beside(place[1], lanes)]
        for c in T.unroll(lanes):
            sums[start + c] = finished(p, sums[start + c], ends[c], ends[lanes + c])
        y[place[0], beside(place[1], lanes)] = sums[beside(start, lanes)]

    return store


def add_up(p: Product, splits: int) -> Any:
    """Macro `(parts (splits, rows, groups * N), bias, residual, y)`: the launch that adds up parts of sums."""
    store = finish(p, 1)

    @T.inline
    def launch(parts, b, r, y):
        for block in T.thread_binding((p.rows * p.whole + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < p.rows * p.whole:
                    row: T.let = i // p.whole
                    group: T.let = i % p.whole // p.n
                    column: T.let = i % p.n
                    value = T.alloc_buffer((1,), "float32", scope="local")
                    value[0] = T.float32(0)
                    for split in T.unroll(splits):
                        value[0] = value[0] + parts[split, row, i % p.whole]
                    store(value, 0, b, r, y, group, row, column)

    return launch


def launched(p: Product, splits: int, compute: Any, most: int | None = None) -> Any:
    """Macro `(x, w, bias, residual, y)`: a macro `(x, w, bias, residual, y, parts)`, and the sum of parts behind it.

    Args:
        p: The product.
        splits: Parts of each sum.
        compute: The macro.
        most: Rows that there are at most where it is launched: memory for parts is taken before that is known.
    """
    total = add_up(p, splits)
    rows = p.rows if most is None else min(p.rows, most) if isinstance(p.rows, int) else T.min(p.rows, most)

    @T.inline
    def launches(x, w, b, r, y):
        if splits > 1:
            parts = T.alloc_buffer((splits, rows, p.whole), "float32")
            compute(x, w, b, r, y, parts)
            total(parts, b, r, y)
        else:
            compute(x, w, b, r, y, y)

    return launches
