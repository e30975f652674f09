"""Convolutions of 8-bit images, channels last, without a matrix of patches.

They are products whose rows are windows: words are read where they lie in the image, and those outside of it hold the
zero point. What bounds them is in `_dp4a_few` and `_dp4a_many`. The panels of a tile of windows read the same bytes;
all but the first find them in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import Rows, assembled, byte, filled
from onnxcomp.targets.tvm.gpu.kernels._int8_product import product
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.kernels.int8_conv import runs
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats


@cache
def conv(
    machine: Gpu,
    *,
    batch: int | None,
    window: Window,
    channels: int,
    n: int,
    dtype: str,
    zero: int,
    output: Codes | Floats,
    planar: bool = False,
) -> Any:
    """Kernel `(x (B, H * W * C), weight, offset, affine[, residual], y (B * OH * OW, N))`.

    Arguments and packing are those of the kernel for CPUs. Where there is no multiple of four channels, or where they
    come first (`planar`), words are put together of bytes.
    """
    panels = Panels(machine=machine, n=n)
    count, columns = panels.count, panels.columns
    flipped = int8_dot.flipped(machine, dtype)
    (high, wide), (out_high, out_wide) = window.size, window.output
    number, length = runs(window, channels)
    across = number // window.kernel[0]
    groups = -(-length // 4)
    b = tirx.Var("batch", "int64") if batch is None else batch
    pixels = out_high * out_wide

    pixel, plane = (1, high * wide) if planar else (channels, 1)  # how far apart neighbours lie, and channels

    def place(row: Any) -> Sequence[Any]:
        """Line and column of the window's first pixel, and where it lies."""
        at = row if batch == 1 else row % pixels
        line = at // out_wide * window.strides[0] - window.pads[0]
        column = at % out_wide * window.strides[1] - window.pads[1]
        start = (line * wide + column) * pixel
        return line, column, start if batch == 1 else start + row // pixels * (high * wide * channels)

    def filled_in(found: Any, line: Any, column: Any, filler: Any) -> Any:
        """`found`, or what stands outside of the image: as unsigned, what is below zero is beyond the end too."""
        near = []
        if window.pads[0] or window.pads[2]:
            near.append(T.reinterpret("uint32", line) < T.uint32(high))
        if window.pads[1] or window.pads[3]:
            near.append(T.reinterpret("uint32", column) < T.uint32(wide))
        return T.if_then_else(tirx.all(*near), found, filler) if near else found

    def word(x: Any, at: Sequence[Any], group: Any) -> Any:
        run, first = group // groups, group % groups * 4
        moved = at[2] + run // across * window.dilations[0] * (wide * pixel)
        line = at[0] + run // across * window.dilations[0]
        if channels % 4 == 0 and not planar:
            over = run % across * window.dilations[1] + first // channels
            found = T.reinterpret("int32", x[0, T.ramp(moved + over * pixel + first % channels, 1, 4)])
            found = filled_in(found, line, at[1] + over, filled(zero))
        else:
            over = run % across * window.dilations[1]
            found = assembled([code(x, moved, line, at[1], over, first + c) for c in range(4)])
        return int8_dot.flip(found) if flipped else found

    def code(x: Any, moved: Any, line: Any, column: Any, over: Any, at: Any) -> Any:
        """Byte `at` of a run; zero beyond its end."""
        over = over + at // channels
        found = byte(x[0, moved + over * pixel + at % channels * plane])
        found = filled_in(found, line, column + over, T.int32(zero & 255))
        return found if length % 4 == 0 else T.if_then_else(at < length, found, T.int32(0))

    source = Rows(groups=number * groups, places=3, place=place, word=word)
    body = product(machine, panels, None if batch is None else batch * pixels, b * pixels, source, output)
    weight_shape = panels.shape(number * groups * 4)

    if output.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (b, high * wide * channels), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            r = T.match_buffer(r_, (b * pixels, n), output.dtype)
            y = T.match_buffer(y_, (b * pixels, n), output.dtype)
            body(x, w, o, a, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (b, high * wide * channels), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            y = T.match_buffer(y_, (b * pixels, n), output.dtype)
            body(x, w, o, a, y, y)

    return kernel
