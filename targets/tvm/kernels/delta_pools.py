"""Pooling of changed pixels: windows that a change reaches, and whole images in which there is one."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.delta_pixels import Stage, flat, kind, send
from onnxcomp.targets.tvm.kernels.delta_places import clear, end_tap, first_tap, list_reached, listed
from onnxcomp.targets.tvm.kernels.depthwise import at, pieces
from onnxcomp.targets.tvm.machine import Machine

_TOGETHER = 32
"""Pixels that are summed apart, so that the error does not grow with all of them."""


def _vector(value: float, lanes: int) -> Any:
    return tirx.const(value, "float32" if lanes == 1 else f"float32x{lanes}")


@cache
def window_pool(machine: Machine, *, window: Window, largest: bool, counts_pads: bool, stage: Stage) -> Any:
    """Kernel `(x, mask, held, started () bool, step, sent)`, which updates `held` and fills the mask `sent`.

    Args:
        machine: What it is for.
        window: Sizes.
        largest: The largest value of each window instead of the mean.
        counts_pads: The mean takes pads for zeros; else they are left out.
        stage: Of the output.
    """
    (high, wide), (down, across), (dilation, spread) = window.kernel, window.strides, window.dilations
    top, left = window.pads[:2]
    height, width, out_height, out_width = window.height, window.width, window.out_height, window.out_width
    channels, images = window.channels, stage.images
    parts = pieces(machine.lanes, channels)
    deliver, reset = send(machine, stage), clear(stage.pixels)
    choose = listed(stage.pixels, list_reached(images, window))
    lowest = -math.inf if largest else 0.0

    @T.inline
    def part(x, values, origin, y0, x0, begin, many, lanes):
        for v in T.serial(many):
            channel = begin + v * lanes
            best = T.alloc_buffer((1,), kind(lanes), scope="local")
            best[0] = _vector(lowest, lanes)
            rows: T.let = end_tap(y0, dilation, high, height) - first_tap(y0, dilation)
            columns: T.let = end_tap(x0, spread, wide, width) - first_tap(x0, spread)
            for dy in T.serial(rows):
                for dx in T.serial(columns):
                    row = origin + y0 + (first_tap(y0, dilation) + dy) * dilation
                    spot = (row * width + x0 + (first_tap(x0, spread) + dx) * spread) * channels + channel
                    if largest:
                        best[0] = T.max(best[0], x[at(spot, lanes)])
                    else:
                        best[0] = best[0] + x[at(spot, lanes)]
            if largest:
                values[at(channel, lanes)] = best[0]
            else:
                count: T.let = T.Cast("float32", high * wide if counts_pads else rows * columns)
                values[at(channel, lanes)] = best[0] / (count if lanes == 1 else T.broadcast(count, lanes))

    @T.inline
    def pixel(again, x, values, origin, y0, x0, index):
        if index < len(parts):
            part(x, values, origin, y0, x0, *parts[index])
            again(again, x, values, origin, y0, x0, index + 1)

    @T.prim_func
    def kernel(x_: T.handle, m_: T.handle, h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (images, height, width, channels), "float32")
        mask_shaped = T.match_buffer(m_, (images, height, width), "uint8")
        held_shaped = T.match_buffer(h_, stage.shape, "float32")
        started_shaped = T.match_buffer(f_, (), "bool")
        step = T.match_buffer(q_, (stage.steps,), "float32")
        sent_shaped = T.match_buffer(s_, stage.shape[:3], "uint8")
        x = flat(x_shaped)
        mask = flat(mask_shaped)
        held = flat(held_shaped)
        started = flat(started_shaped)
        sent = flat(sent_shaped)
        reset(sent)
        places = T.alloc_buffer((stage.pixels + 1,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        values = T.alloc_buffer((channels,), "float32")
        choose(started[0], places, found, mask)
        for i in T.serial(found[0]):
            place: T.let = places[i]
            y0: T.let = place // out_width % out_height * down - top
            x0: T.let = place % out_width * across - left
            pixel(pixel, x, values, place // (out_height * out_width) * height, y0, x0, 0)
            deliver(values, 0, place, held, sent, step, started[0])

    return kernel


@cache
def global_pool(machine: Machine, *, size: tuple[int, int], largest: bool, stage: Stage) -> Any:
    """Kernel `(x, mask, held (N, 1, 1, C), started () bool, step, sent)`, which updates `held` and fills `sent`.

    It reads all of an image in which a pixel changed.

    Args:
        machine: What it is for.
        size: Height and width of an image.
        largest: The largest value instead of the mean.
        stage: Of the output.
    """
    images, channels = stage.images, stage.channels
    pixels = size[0] * size[1]
    parts = pieces(machine.lanes, channels)
    deliver = send(machine, stage)

    @T.inline
    def part(x, values, start, begin, many, lanes):
        for v in T.serial(many):
            channel = start * channels + begin + v * lanes
            best = T.alloc_buffer((1,), kind(lanes), scope="local")
            best[0] = _vector(-math.inf if largest else 0.0, lanes)
            if largest:
                for p in T.serial(pixels):
                    best[0] = T.max(best[0], x[at(channel + p * channels, lanes)])
            else:
                for chunk in T.serial((pixels + _TOGETHER - 1) // _TOGETHER):
                    sums = T.alloc_buffer((1,), kind(lanes), scope="local")
                    sums[0] = _vector(0.0, lanes)
                    for p in T.serial(T.min(_TOGETHER, pixels - chunk * _TOGETHER)):
                        sums[0] = sums[0] + x[at(channel + (chunk * _TOGETHER + p) * channels, lanes)]
                    best[0] = best[0] + sums[0]
                best[0] = best[0] / _vector(float(pixels), lanes)
            values[at(begin + v * lanes, lanes)] = best[0]

    @T.inline
    def image_of(again, x, values, start, index):
        if index < len(parts):
            part(x, values, start, *parts[index])
            again(again, x, values, start, index + 1)

    @T.prim_func
    def kernel(x_: T.handle, m_: T.handle, h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (images, *size, channels), "float32")
        mask_shaped = T.match_buffer(m_, (images, *size), "uint8")
        held_shaped = T.match_buffer(h_, stage.shape, "float32")
        started_shaped = T.match_buffer(f_, (), "bool")
        step = T.match_buffer(q_, (stage.steps,), "float32")
        sent_shaped = T.match_buffer(s_, stage.shape[:3], "uint8")
        x = flat(x_shaped)
        mask = flat(mask_shaped)
        held = flat(held_shaped)
        started = flat(started_shaped)
        sent = flat(sent_shaped)
        values = T.alloc_buffer((channels,), "float32")
        for image in T.serial(images):
            sent[image] = T.uint8(0)
            any_changed = T.alloc_buffer((1,), "int32", scope="local")
            any_changed[0] = T.Select(started[0], 0, 1)
            for i in T.serial(pixels):
                any_changed[0] = T.bitwise_or(any_changed[0], T.Cast("int32", mask[image * pixels + i]))
            if any_changed[0] != 0:
                image_of(image_of, x, values, image * pixels, 0)
                deliver(values, 0, image, held, sent, step, started[0])

    return kernel
