"""Float32 depthwise convolutions of NHWC images: channels across threads, several pixels of a row each.

There are few products a value, so it is bound by memory, and by how often a value is read again from cache: a thread
keeps the columns that its pixels share in registers, rows are read again from cache. Threads beside each other read
channels beside each other, 16 bytes each where the number of channels allows it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._scalar import activated
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside, zeros
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window

_THREADS = 128

_BLOCKS = 6
"""Blocks of a multiprocessor at a time: leaves registers for the columns that pixels share."""

_BUSY = 512
"""Threads that a multiprocessor should have before they take more than one pixel each."""

_TAPS = 8
"""Columns of the window that are walked at once, at most."""


@cache
def depthwise(machine: Gpu, *, batch: int | None, window: Window, epilogue: Epilogue) -> Any:
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
    lanes = 4 if channels % 4 == 0 else 2 if channels % 2 == 0 else 1
    vectors = channels // lanes
    enough = machine.multiprocessors * _BUSY
    length = next((p for p in (4, 2) if (batch or 1) * out_height * -(-out_width // p) * vectors >= enough), 1)
    strips = -(-out_width // length)
    total = images * (out_height * strips * vectors)
    shared = step == 1 and across < wide and length > 1
    taps = min(wide, _TAPS)
    padded = any((left, window.pads[3])) or out_width % length > 0

    @T.inline
    def load(x, values, slot, image, start, spot, channel):
        if padded:
            values[beside(slot * lanes, lanes)] = zeros(lanes)
            if T.And(spot >= 0, spot < window.width):
                values[beside(slot * lanes, lanes)] = x[image, beside((start + spot) * channels + channel, lanes)]
        else:
            values[beside(slot * lanes, lanes)] = x[image, beside((start + spot) * channels + channel, lanes)]

    @T.inline
    def walk(x, w, sums, image, start, column, channel, dy, dx, count):
        values = T.alloc_buffer((((length - 1) * across + count if shared else 1) * lanes,), "float32", scope="local")
        weights = T.alloc_buffer((lanes,), "float32", scope="local")
        if shared:
            for c in T.unroll((length - 1) * across + count):
                load(x, values, c, image, start, column * across - left + dx + c, channel)
        for t in T.unroll(count):
            weights[beside(0, lanes)] = w[beside((dy * wide + dx + t) * channels + channel, lanes)]
            for i in T.unroll(length):
                if not shared:
                    load(x, values, 0, image, start, (column + i) * across - left + (dx + t) * step, channel)
                for e in T.unroll(lanes):
                    value = T.meta_var(values[((i * across + t) * lanes if shared else 0) + e])
                    sums[i * lanes + e] = sums[i * lanes + e] + value * weights[e]

    @T.inline
    def block(x, w, b, r, y, image, line, column, channel):
        sums = T.alloc_buffer((length * lanes,), "float32", scope="local")
        for i in T.unroll(length):
            sums[beside(i * lanes, lanes)] = b[beside(channel, lanes)]
        first: T.let = T.max(0, (top - line * down + dilation - 1) // dilation)
        end: T.let = T.min(high, (window.height + top - line * down + dilation - 1) // dilation)
        for k in T.serial(end - first):
            start: T.let = (line * down - top + (first + k) * dilation) * window.width
            for part in T.serial(wide // taps):
                walk(x, w, sums, image, start, column, channel, first + k, part * taps, taps)
            if wide % taps > 0:
                walk(x, w, sums, image, start, column, channel, first + k, wide // taps * taps, wide % taps)
        for i in T.unroll(length):
            if column + i < out_width:
                out: T.let = (line * out_width + column + i) * channels + channel
                if residual:
                    sums[beside(i * lanes, lanes)] = sums[beside(i * lanes, lanes)] + r[image, beside(out, lanes)]
                for e in T.unroll(lanes):
                    sums[i * lanes + e] = activated(sums[i * lanes + e], epilogue)
                y[image, beside(out, lanes)] = sums[beside(i * lanes, lanes)]

    @T.inline
    def body(x, w, b, r, y):
        for group in T.thread_binding((total + _THREADS - 1) // _THREADS, thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                with resident(_BLOCKS):
                    i: T.let = group * _THREADS + thread
                    if i < total:
                        strip: T.let = i // vectors % strips
                        line: T.let = i // (vectors * strips) % out_height
                        image: T.let = i // (vectors * strips * out_height)
                        block(x, w, b, r, y, image, line, strip * length, i % vectors * lanes)

    if residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (high * wide * channels,), "float32")
            b = T.match_buffer(b_, (channels,), "float32")
            r = T.match_buffer(r_, (images, out_size), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            if images > 0:
                body(x, w, b, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (high * wide * channels,), "float32")
            b = T.match_buffer(b_, (channels,), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            if images > 0:
                body(x, w, b, x, y)

    return kernel
