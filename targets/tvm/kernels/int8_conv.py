"""Convolutions of 8-bit images, channels last, without a matrix of patches: a row of the window is a run of bytes."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import Panels, block, over_tasks
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.kernels.int8_gemm import spread
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats
from onnxcomp.targets.tvm.machine import Machine

_PIXELS = 16
"""Pixels that are interleaved at once."""


def runs(window: Window, channels: int) -> tuple[int, int]:
    """How many runs of bytes a window consists of, and their length."""
    high, wide = window.kernel
    return (high, wide * channels) if window.dilations[1] == 1 or wide == 1 else (high * wide, channels)


def rows(window: Window, channels: int) -> int:
    """Rows of the weight as a matrix, each run filled up to whole groups."""
    count, length = runs(window, channels)
    return count * -(-length // 4) * 4


def matrix(window: Window, weight: Array) -> Array:
    """Weight of shape (O, C, KH, KW) as the matrix (rows, O) that `Panels.pack` takes."""
    outputs, channels = weight.shape[:2]
    count, length = runs(window, channels)
    wide = np.zeros((count, -(-length // 4) * 4, outputs), weight.dtype)
    wide[:, :length] = weight.transpose(2, 3, 1, 0).reshape(count, length, outputs)
    return wide.reshape(-1, outputs)


@cache
def conv(
    machine: Machine,
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

    Weight, offset, affine and residual are those of `int8_gemm.gemm`, the weight made of `matrix`.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: The window.
        channels: Of the images.
        n: Outputs.
        dtype: Of `x`: `uint8` or `int8`.
        zero: Zero point of `x`, which stands in the padding.
        output: What is stored.
        planar: Channels of `x` come first, (B, C * H * W): they are interleaved on the way.
    """
    panels = Panels(machine=machine, n=n)
    count, columns = panels.count, panels.columns
    flipped = int8_dot.flipped(machine, dtype)
    (high, wide), (out_high, out_wide) = window.size, window.output
    number, length = runs(window, channels)
    groups = -(-length // 4)
    across = number // window.kernel[0]
    direct = batch == 1 and not planar and not any(window.pads) and length % 4 == 0
    pitch = window.padded[1] * channels
    top, left = window.pads[:2]
    # The last word of the last run may reach beyond the image by three bytes.
    size = window.padded[0] * pitch + 4
    used = "uint8" if int8_dot.unsigned(machine) else "int8"
    filler = tirx.const(int8_dot.zero_point(machine, dtype, zero), used)
    b = tirx.Var("batch", "int64") if batch is None else batch

    def word(x: Any, base: Any, i: Any, run: Any, j: Any) -> Any:
        at = base + i * (window.strides[1] * channels) + j * 4
        at = at + run // across * (window.dilations[0] * pitch) + run % across * (window.dilations[1] * channels)
        read = x[0, T.ramp(at, 1, 4)] if direct else x[T.ramp(at, 1, 4)]
        found = T.reinterpret("int32", read)
        return int8_dot.flip(found) if direct and flipped else found

    def turned(codes: Any) -> Any:
        """Codes as they are multiplied."""
        if not flipped:
            return codes
        flip = tirx.const(-128 if dtype == "int8" else 128, codes.ty.dtype)
        return T.reinterpret(str(codes.ty.dtype).replace(dtype, used), codes ^ flip)

    def interleaved(x: Any, image: Any, line: Any, column: Any) -> Any:
        planes = [x[image, T.ramp((c * high + line) * wide + column, 1, _PIXELS)] for c in range(channels)]
        order = [c * _PIXELS + i for i in range(_PIXELS) for c in range(channels)]
        return turned(tirx.Shuffle(planes, [tirx.const(i, "int32") for i in order]))

    loop = over_tasks(out_high * out_wide * n * channels * window.kernel[0] * window.kernel[1])
    weight_shape = panels.shape(number * groups * 4)
    blocks, low, extra = spread(out_wide, panels.high)
    upper = block(panels, low + 1, number, groups, output, word=word)
    lower = block(panels, low, number, groups, output, word=word)

    @T.inline
    def copy(x, image, work):
        for i in loop(window.padded[0]):
            if i < top or i >= top + high:
                for j in T.serial(pitch):
                    work[i * pitch + j] = filler
            else:
                for j in T.serial(left * channels):
                    work[i * pitch + j] = filler
                if planar:
                    for j in T.serial(wide // _PIXELS):
                        at = i * pitch + (left + j * _PIXELS) * channels
                        work[T.ramp(at, 1, _PIXELS * channels)] = interleaved(x, image, i - top, j * _PIXELS)
                    for j in T.serial(wide % _PIXELS):
                        for c in T.serial(channels):
                            work[i * pitch + (left + wide - wide % _PIXELS + j) * channels + c] = turned(
                                x[image, (c * high + i - top) * wide + wide - wide % _PIXELS + j]
                            )
                else:
                    for j in T.serial(wide * channels):
                        work[i * pitch + left * channels + j] = turned(x[image, (i - top) * wide * channels + j])
                for j in T.serial(window.pads[3] * channels):
                    work[i * pitch + (left + wide) * channels + j] = filler
        for j in T.serial(4):
            work[size - 4 + j] = filler

    @T.inline
    def compute(source, image, w, o, a, r, y):
        for task in loop(count * out_high):
            panel = task // out_high
            line = task % out_high
            start = line * (window.strides[0] * pitch)
            row = (image * out_high + line) * out_wide
            step = window.strides[1] * channels
            if extra > 0:
                for i in T.serial(extra):
                    upper(source, w, o, a, r, y, start + i * (low + 1) * step, row + i * (low + 1), panel)
            for i in T.serial(blocks - extra):
                lower(source, w, o, a, r, y, start + (i * low + extra * (low + 1)) * step,
                      row + i * low + extra * (low + 1), panel)  # fmt: skip

    @T.inline
    def body(x, w, o, a, r, y):
        if direct:
            compute(x, 0, w, o, a, r, y)
        else:
            work = T.alloc_buffer((size,), used)
            for image in T.serial(b):
                copy(x, image, work)
                compute(work, image, w, o, a, r, y)

    if output.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (b, high * wide * channels), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            r = T.match_buffer(r_, (b * out_high * out_wide, n), output.dtype)
            y = T.match_buffer(y_, (b * out_high * out_wide, n), output.dtype)
            body(x, w, o, a, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (b, high * wide * channels), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            y = T.match_buffer(y_, (b * out_high * out_wide, n), output.dtype)
            body(x, w, o, a, y, y)

    return kernel
