"""Products of 8-bit activations and a constant matrix of 8-bit integers."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import Panels, block, over_tasks
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats
from onnxcomp.targets.tvm.machine import Machine

_PARTS = 8
"""Pieces that work is cut into at least, where there is that much of it, for threads to share."""


@cache
def gemm(machine: Machine, *, rows: int | None, k: int, n: int, dtype: str, output: Codes | Floats) -> Any:
    """Kernel `(x (rows, K), weight, offset, affine[, residual (rows, N)], y (rows, N))`.

    Weight, offset and affine are what the methods of `Panels` make, the rows of the weight filled up to whole groups
    with zeros. The offset accounts for the zero point of `x` as it is multiplied.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        n: Outputs.
        dtype: Of `x`: `uint8` or `int8`.
        output: What is stored.
    """
    panels = Panels(machine=machine, n=n)
    high, count, columns = panels.high, panels.count, panels.columns
    turn = int8_dot.flip if int8_dot.flipped(machine, dtype) else lambda words: words
    left = k % 4

    def word(x: Any, base: Any, i: Any, run: Any, j: Any) -> Any:
        return turn(T.reinterpret("int32", x[base + i, T.ramp(j * 4, 1, 4)]))

    def rest(x: Any, base: Any, i: Any) -> Any:
        unsigned = [T.Cast("int32", T.reinterpret("uint8", x[base + i, k - left + c])) for c in range(left)]
        found = unsigned[0]
        for c in range(1, left):
            found = found | T.shift_left(unsigned[c], T.int32(8 * c))
        return turn(found)

    def made(height: int) -> Any:
        return block(panels, height, 1, k // 4, output, word=word, tail=rest if left else None)

    weight_shape = panels.shape(k)
    loop = over_tasks(None if rows is None else rows * k * n)
    m = tirx.Var("rows", "int64") if rows is None else rows

    if rows is None:
        tall, four, single = made(high), made(4), made(1)

        @T.inline
        def body(x, w, o, a, r, y, m):
            for panel in loop(count):
                for i in T.serial(m // high):
                    tall(x, w, o, a, r, y, i * high, i * high, panel)
                for i in T.serial(m % high // 4):
                    four(x, w, o, a, r, y, m // high * high + i * 4, m // high * high + i * 4, panel)
                for i in T.serial(m % high % 4):
                    single(x, w, o, a, r, y, m - m % high % 4 + i, m - m % high % 4 + i, panel)

    else:
        blocks, low, extra = spread(rows, high)
        upper, lower = made(low + 1), made(low)
        pieces = max(1, min(blocks, -(-_PARTS // count)))
        each = -(-blocks // pieces)

        @T.inline
        def body(x, w, o, a, r, y, m):
            for task in loop(count * pieces):
                for i in T.serial(each):
                    if extra > 0:  # noqa: SIM102 - the first one is decided here, the second one where it runs
                        if task % pieces * each + i < extra:
                            at = (task % pieces * each + i) * (low + 1)
                            upper(x, w, o, a, r, y, at, at, task // pieces)
                    if task % pieces * each + i >= extra and task % pieces * each + i < blocks:
                        at = (task % pieces * each + i) * low + extra
                        lower(x, w, o, a, r, y, at, at, task // pieces)

    if output.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            r = T.match_buffer(r_, (m, n), output.dtype)
            y = T.match_buffer(y_, (m, n), output.dtype)
            body(x, w, o, a, r, y, m)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            y = T.match_buffer(y_, (m, n), output.dtype)
            body(x, w, o, a, y, y, m)

    return kernel


def spread(rows: int, high: int) -> tuple[int, int, int]:
    """Rows as blocks of about equal height, at most `high`.

    Returns:
        Blocks, rows of a lower one, and how many of the first are one row higher.
    """
    blocks = -(-rows // high)
    return blocks, rows // blocks, rows % blocks
