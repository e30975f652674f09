"""Pooling of NHWC images: vectors over channels."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.depthwise import at, pieces
from onnxcomp.targets.tvm.machine import Machine

_SIDE_BY_SIDE = 4
"""Vectors of channels that are reduced at once, to hide how long one operation takes."""


@cache
def pool(
    machine: Machine,
    *,
    batch: int | None,
    window: Window,
    largest: bool,
    counted: tuple[int, int, int, int] | None = None,
    dtype: str = "float32",
) -> Any:
    """Kernel `(x (batch, H * W * C), y (batch, OH * OW * C))`.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: Sizes.
        largest: The largest value of each window instead of the mean.
        counted: Pads that the mean counts as zeros; those that it does not are negative infinity of area.
        dtype: Of both; float32 for a mean.
    """
    channels = window.channels
    lanes = machine.lanes * (4 // np.dtype(dtype).itemsize)
    out_height, out_width = window.out_height, window.out_width
    images = tirx.Var("batch", "int64") if batch is None else batch
    in_size, out_size = window.height * window.width * channels, out_height * out_width * channels
    edges = counted or (0, 0, 0, 0)
    parts: list[tuple[int, int, int, int]] = []
    for first, count, size in pieces(lanes, channels):
        if count >= _SIDE_BY_SIDE:
            parts.append((first, count // _SIDE_BY_SIDE, size, _SIDE_BY_SIDE))
            first, count = first + count // _SIDE_BY_SIDE * _SIDE_BY_SIDE * size, count % _SIDE_BY_SIDE
        if count:
            parts.append((first, count, size, 1))

    def spread(value: Any, size: int) -> Any:
        return value if size == 1 else T.broadcast(value, size)

    def begin(line: Any, axis: int) -> Any:
        dilation = window.dilations[axis]
        return T.max(0, (window.pads[axis] - line * window.strides[axis] + dilation - 1) // dilation)

    def end(line: Any, axis: int) -> Any:
        dilation = window.dilations[axis]
        length = (window.height, window.width)[axis]
        start = line * window.strides[axis] - window.pads[axis]
        return T.min(window.kernel[axis], (length - start + dilation - 1) // dilation)

    def area(line: Any, axis: int) -> Any:
        """How many places along an axis a mean divides by."""
        dilation = window.dilations[axis]
        length = (window.height, window.width)[axis]
        start = line * window.strides[axis] - window.pads[axis]
        low = T.max(0, (-edges[axis] - start + dilation - 1) // dilation)
        high = T.min(window.kernel[axis], (length + edges[axis + 2] - start + dilation - 1) // dilation)
        return high - low

    @T.inline
    def vector(x, y, image, line, column, channel, size, many, scale):
        best = T.alloc_buffer((many,), dtype if size == 1 else f"{dtype}x{size}", scope="local")
        for v in T.unroll(many):
            if largest:
                best[v] = spread(T.min_value(dtype), size)
            else:
                best[v] = spread(T.float32(0), size)
        top = begin(line, 0)
        left = begin(column, 1)
        for dy in T.serial(end(line, 0) - top):
            for dx in T.serial(end(column, 1) - left):
                row = line * window.strides[0] - window.pads[0] + (top + dy) * window.dilations[0]
                spot = column * window.strides[1] - window.pads[1] + (left + dx) * window.dilations[1]
                for v in T.unroll(many):
                    if largest:
                        best[v] = T.max(
                            best[v], x[image, at((row * window.width + spot) * channels + channel + v * size, size)]
                        )
                    else:
                        best[v] = (
                            best[v] + x[image, at((row * window.width + spot) * channels + channel + v * size, size)]
                        )
        for v in T.unroll(many):
            if largest:
                y[image, at((line * out_width + column) * channels + channel + v * size, size)] = best[v]
            else:
                y[image, at((line * out_width + column) * channels + channel + v * size, size)] = best[v] * spread(
                    scale, size
                )

    @T.inline
    def part(x, y, image, line, column, scale, first, count, size, many):
        for c in T.serial(count):
            vector(x, y, image, line, column, first + c * (size * many), size, many, scale)

    @T.inline
    def pixel(again, x, y, image, line, column, scale, index):
        if index < len(parts):
            part(x, y, image, line, column, scale, *parts[index])
            again(again, x, y, image, line, column, scale, index + 1)

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (images, in_size), dtype)
        y = T.match_buffer(y_, (images, out_size), dtype)
        for task in T.parallel(images * out_height):
            for column in T.serial(out_width):
                image = task // out_height
                line = task % out_height
                if largest:
                    pixel(pixel, x, y, image, line, column, T.float32(1), 0)
                else:
                    scale = T.float32(1) / T.Cast("float32", area(line, 0) * area(column, 1))
                    pixel(pixel, x, y, image, line, column, scale, 0)

    return kernel
