"""Pooling of NHWC images: channels across threads.

It is bound by memory. A thread reduces the window of a few channels. Where that makes too few threads, as of a pool
over the whole image, those of a block share a window out and meet in shared memory; where that makes too few blocks, so
do blocks, by a second launch. The order of a sum is always the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels._window import Window

_THREADS = 256

_BLOCKS = 4
"""Blocks of a multiprocessor at a time: leaves registers for values on their way."""

_BUSY = 256
"""Threads that a multiprocessor should have before each reduces a window of its own."""

_AHEAD = 4
"""Values of a window that a thread reads before it needs the first."""

_LEAST = 8
"""Values of a window that a thread should reduce before blocks share the window out."""


@cache
def pool(
    machine: Gpu,
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
    out_height, out_width = window.out_height, window.out_width
    pixels, wide = out_height * out_width, window.kernel[1]
    images = tirx.Var("batch", "int64") if batch is None else batch
    in_size, out_size = window.height * window.width * channels, pixels * channels
    edges = counted or (0, 0, 0, 0)
    lanes = 4 if channels % 4 == 0 else 1
    vectors = channels // lanes
    area = window.kernel[0] * wide
    side = min(WARP, 1 << (vectors - 1).bit_length())
    spans = -(-vectors // side)
    share = _THREADS // side
    alone = area < 2 * share or (batch or 1) * pixels * vectors >= machine.multiprocessors * _BUSY
    blocks = (batch or 1) * pixels * spans
    slices = 1 if alone else max(1, min(2 * machine.multiprocessors // blocks, area // (share * _LEAST)))
    turns = area // (slices * share)
    padded = any(window.pads)

    def combined(a: Any, b: Any) -> Any:
        return T.Select(b > a, b, a) if largest else a + b  # as ONNX Runtime, which passes over NaN

    def least() -> Any:
        return T.min_value(dtype) if largest else T.float32(0)

    def places(line: Any, axis: int) -> Any:
        """How many places along an axis a mean divides by."""
        dilation = window.dilations[axis]
        length = (window.height, window.width)[axis]
        start = line * window.strides[axis] - window.pads[axis]
        low = T.max(0, (-edges[axis] - start + dilation - 1) // dilation)
        high = T.min(window.kernel[axis], (length + edges[axis + 2] - start + dilation - 1) // dilation)
        return high - low

    def result(value: Any, pixel: Any) -> Any:
        if largest:
            return value
        return value * (T.float32(1) / T.Cast("float32", places(pixel // out_width, 0) * places(pixel % out_width, 1)))

    @T.inline
    def look(x, best, image, pixel, channel, tap):
        line: T.let = pixel // out_width * window.strides[0] - window.pads[0] + tap // wide * window.dilations[0]
        spot: T.let = pixel % out_width * window.strides[1] - window.pads[1] + tap % wide * window.dilations[1]
        inside = T.meta_var(T.And(T.And(line >= 0, line < window.height), T.And(spot >= 0, spot < window.width)))
        values = T.alloc_buffer((lanes,), dtype, scope="local")
        place = T.meta_var(beside((line * window.width + spot) * channels + channel, lanes))
        if padded:
            for e in T.unroll(lanes):
                values[e] = least()
            if inside:
                values[beside(0, lanes)] = x[image, place]
        else:
            values[beside(0, lanes)] = x[image, place]
        for e in T.unroll(lanes):
            best[e] = combined(best[e], values[e])

    @T.inline
    def by_thread(x, y):
        for block in T.thread_binding((images * (pixels * vectors) + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with resident(_BLOCKS):
                    i: T.let = block * _THREADS + thread
                    if i < images * (pixels * vectors):
                        channel: T.let = i % vectors * lanes
                        pixel: T.let = i // vectors % pixels
                        image: T.let = i // (vectors * pixels)
                        best = T.alloc_buffer((lanes,), dtype, scope="local")
                        for e in T.unroll(lanes):
                            best[e] = least()
                        for tap in T.serial(area, annotations={"pragma_unroll": _AHEAD}):
                            look(x, best, image, pixel, channel, tap)
                        for e in T.unroll(lanes):
                            best[e] = result(best[e], pixel)
                        y[image, beside(pixel * channels + channel, lanes)] = best[beside(0, lanes)]

    @T.inline
    def by_block(x, y, parts):
        for block in T.thread_binding(images * (pixels * spans), thread="blockIdx.x"):
            for part in T.thread_binding(slices, thread="blockIdx.y"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with resident(_BLOCKS):
                        shared = T.alloc_buffer((_THREADS * lanes,), dtype, scope="shared")
                        best = T.alloc_buffer((lanes,), dtype, scope="local")
                        first: T.let = block % spans * (side * lanes)
                        pixel: T.let = block // spans % pixels
                        image: T.let = block // (spans * pixels)
                        channel: T.let = T.min(first + thread % side * lanes, channels - lanes)
                        for e in T.unroll(lanes):
                            best[e] = least()
                        for turn in T.serial(turns, annotations={"pragma_unroll": _AHEAD}):
                            look(x, best, image, pixel, channel, (turn * slices + part) * share + thread // side)
                        tap: T.let = (turns * slices + part) * share + thread // side
                        if tap < area:
                            look(x, best, image, pixel, channel, tap)
                        shared[beside(thread * lanes, lanes)] = best[beside(0, lanes)]
                        T.tvm_storage_sync("shared")
                        for turn in T.serial(-(-side * lanes // _THREADS)):
                            place: T.let = turn * _THREADS + thread
                            if T.And(place < side * lanes, first + place < channels):
                                best[0] = least()
                                for i in T.serial(share):
                                    best[0] = combined(best[0], shared[i * (side * lanes) + place])
                                if slices > 1:
                                    parts[part, image, pixel * channels + first + place] = best[0]
                                else:
                                    y[image, pixel * channels + first + place] = result(best[0], pixel)

    @T.inline
    def together(parts, y):
        for block in T.thread_binding((images * out_size + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < images * out_size:
                    best = T.alloc_buffer((1,), dtype, scope="local")
                    best[0] = least()
                    for part in T.serial(slices):
                        best[0] = combined(best[0], parts[part, i // out_size, i % out_size])
                    y[i // out_size, i % out_size] = result(best[0], i % out_size // channels)

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (images, in_size), dtype)
        y = T.match_buffer(y_, (images, out_size), dtype)
        if images > 0:
            if alone:
                by_thread(x, y)
            elif slices > 1:
                parts = T.alloc_buffer((slices, images, out_size), dtype)
                by_block(x, y, parts)
                together(parts, y)
            else:
                by_block(x, y, y)

    return kernel
