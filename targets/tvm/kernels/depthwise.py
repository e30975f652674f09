"""Float32 depthwise convolutions of NHWC images: vectors over channels, several pixels of a row at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window, blocks
from onnxcomp.targets.tvm.machine import Machine

_BAND = 16
"""Rows that are computed together, block by block of their columns: so much of the image stays in the first cache."""


def pack(weight: Array) -> Array:
    """Weight of shape (C, 1, KH, KW) as (KH * KW * C)."""
    return np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0)).reshape(-1)


def pieces(lanes: int, channels: int) -> list[tuple[int, int, int]]:
    """Vectors that cover all channels: first channel, how many, lanes; those after the first run get narrower."""
    found = [(0, channels // lanes, lanes)] if channels >= lanes else []
    at, width = channels // lanes * lanes, lanes // 2
    while at < channels:
        if channels - at >= width:
            found.append((at, 1, width))
            at += width
        width //= 2
    return found


def at(start: Any, lanes: int) -> Any:
    """Index of a vector, or of one value."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


@cache
def depthwise(machine: Machine, *, batch: int | None, window: Window, epilogue: Epilogue) -> Any:
    """Kernel `(x (batch, H * W * C), weight, bias (C,)[, residual as y], y (batch, OH * OW * C))`, all float32.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: Sizes.
        epilogue: What is done to the sums.
    """
    channels = window.channels
    down, across = window.strides
    high, wide = window.kernel
    out_height, out_width = window.out_height, window.out_width
    top, left = window.pads[:2]
    dilation, step = window.dilations
    residual = epilogue.residual
    images = tirx.Var("batch", "int64") if batch is None else batch
    in_size, out_size = window.height * window.width * channels, out_height * out_width * channels
    band = min(out_height, _BAND, max(4, -(-out_height // 4)))  # enough bands for the threads of a small CPU
    bands = -(-out_height // band)
    size, many, less = blocks(out_width, 8 if machine.registers >= 32 else 4)
    starts = [(i * size, size) for i in range(many)]
    starts += [(many * size + i * (size - 1), size - 1) for i in range(less)]
    # Runs of blocks of one size that need no look at the border, and single blocks that do.
    runs: list[tuple[int, int, int, bool]] = []
    for start, length in starts:
        free = window.inside(start) and window.inside(start + length - 1)
        if free and runs and runs[-1][2:] == (length, True):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length, True)
        else:
            runs.append((start, 1, length, free))

    parts = pieces(machine.lanes, channels)

    @T.inline
    def block(x, w, b, r, y, image, line, column, channel, lanes, length, free):
        sums = T.alloc_buffer((length,), "float32" if lanes == 1 else f"float32x{lanes}", scope="local")
        for i in T.unroll(length):
            sums[i] = b[at(channel, lanes)]
        first = T.max(0, (top - line * down + dilation - 1) // dilation)
        end = T.min(high, (window.height + top - line * down + dilation - 1) // dilation)
        for k in T.serial(end - first):
            dy = first + k
            start = (line * down - top + dy * dilation) * window.width
            for dx in T.unroll(wide):
                for i in T.unroll(length):
                    spot = (column + i) * across - left + dx * step
                    if free:
                        sums[i] = (
                            sums[i]
                            + x[image, at((start + spot) * channels + channel, lanes)]
                            * w[at((dy * wide + dx) * channels + channel, lanes)]
                        )
                    else:
                        if T.And(spot >= 0, spot < window.width):
                            sums[i] = (
                                sums[i]
                                + x[image, at((start + spot) * channels + channel, lanes)]
                                * w[at((dy * wide + dx) * channels + channel, lanes)]
                            )
        for i in T.unroll(length):
            out = (line * out_width + column + i) * channels + channel
            if residual:
                sums[i] = sums[i] + r[image, at(out, lanes)]
            y[image, at(out, lanes)] = epilogue(sums[i])

    @T.inline
    def piece(x, w, b, r, y, image, line, column, length, free, first, count, lanes):
        for c in T.serial(count):
            block(x, w, b, r, y, image, line, column, first + c * lanes, lanes, length, free)

    @T.inline
    def strip(again, x, w, b, r, y, image, line, column, length, free, index):
        if index < len(parts):
            piece(x, w, b, r, y, image, line, column, length, free, *parts[index])
            again(again, x, w, b, r, y, image, line, column, length, free, index + 1)

    @T.inline
    def section(x, w, b, r, y, image, part, start, count, length, free):
        if free:
            for i in T.serial(count):
                for line in T.serial(T.min(band, out_height - part * band)):
                    strip(strip, x, w, b, r, y, image, part * band + line, start + i * length, length, free, 0)
        else:
            for line in T.serial(T.min(band, out_height - part * band)):
                strip(strip, x, w, b, r, y, image, part * band + line, start, length, free, 0)

    @T.inline
    def all_sections(again, x, w, b, r, y, image, part, index):
        if index < len(runs):
            section(x, w, b, r, y, image, part, *runs[index])
            again(again, x, w, b, r, y, image, part, index + 1)

    @T.inline
    def body(x, w, b, r, y):
        for task in T.parallel(images * bands):
            all_sections(all_sections, x, w, b, r, y, task // bands, task % bands, 0)

    if residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (high * wide * channels,), "float32")
            b = T.match_buffer(b_, (channels,), "float32")
            r = T.match_buffer(r_, (images, out_size), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            body(x, w, b, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (high * wide * channels,), "float32")
            b = T.match_buffer(b_, (channels,), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            body(x, w, b, x, y)

    return kernel
