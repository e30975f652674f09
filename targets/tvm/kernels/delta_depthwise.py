"""Depthwise convolutions of changed pixels: vectors over channels, and four neighbours at once where all changed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.delta_pixels import Stage, flat, kind, send
from onnxcomp.targets.tvm.kernels.delta_places import clear, end_tap, first_tap, list_reached, listed
from onnxcomp.targets.tvm.kernels.depthwise import at, pieces
from onnxcomp.targets.tvm.machine import Machine

_NEIGHBOURS = 4
"""Pixels of a row that are computed together: what their windows have in common is read once."""

_TOGETHER = 4
"""Vectors of channels of a pixel that are computed together."""

_TASK = 128
"""Pixels that a thread takes at once."""


def pack(weight: Array) -> Array:
    """Weight of shape (KH, KW, 1, C) as (KH * KW * C,)."""
    return np.ascontiguousarray(weight).reshape(-1)


@cache
def depthwise(machine: Machine, *, window: Window, stage: Stage, epilogue: Epilogue) -> Any:
    """Kernel `(x, mask, weight, bias (C,), held, started () bool, step, sent)`, which updates `held` and fills `sent`.

    Args:
        machine: What it is for.
        window: Sizes.
        stage: Of the output.
        epilogue: What is done to the sums.
    """
    (high, wide), (down, across), (dilation, spread) = window.kernel, window.strides, window.dilations
    top, left = window.pads[:2]
    height, width, out_height, out_width = window.height, window.width, window.out_height, window.out_width
    channels, images = window.channels, stage.images
    parts = pieces(machine.lanes, channels)
    reach = (wide - 1) * spread + 1
    joined_parts: list[tuple[int, int, int, int]] = []
    for start, count, lanes in parts:
        joined = count // _TOGETHER
        if joined:
            joined_parts.append((start, joined, lanes, _TOGETHER))
        if count % _TOGETHER:
            joined_parts.append((start + joined * _TOGETHER * lanes, count % _TOGETHER, lanes, 1))
    deliver = send(machine, stage)
    reset = clear(stage.pixels)
    choose = listed(stage.pixels, list_reached(images, window))

    @T.inline
    def row_of(x, w, b, values, origin, top_tap, rows, channel, many, lanes):
        """Neighbours whose windows lie on the map from left to right; the first one begins at `origin`."""
        for c in T.serial(many):
            at_c = channel + c * lanes
            sums = T.alloc_buffer((_NEIGHBOURS,), kind(lanes), scope="local")
            for i in T.unroll(_NEIGHBOURS):
                sums[i] = b[at(at_c, lanes)]
            for k in T.serial(rows):
                dy = top_tap + k
                for dx in T.unroll(wide):
                    for i in T.unroll(_NEIGHBOURS):
                        spot = origin + dy * dilation * width + dx * spread + i * across
                        sums[i] = (
                            sums[i]
                            + x[at(spot * channels + at_c, lanes)] * w[at((dy * wide + dx) * channels + at_c, lanes)]
                        )
            for i in T.unroll(_NEIGHBOURS):
                values[at(i * channels + at_c, lanes)] = epilogue(sums[i])

    @T.inline
    def one(x, w, b, values, origin, top_tap, rows, left_tap, columns, channel, many, lanes, length):
        """A pixel whose window may be cut; so many vectors of channels at once."""
        for c in T.serial(many):
            at_c = channel + c * lanes * length
            sums = T.alloc_buffer((length,), kind(lanes), scope="local")
            for i in T.unroll(length):
                sums[i] = b[at(at_c + i * lanes, lanes)]
            for k in T.serial(rows):
                for m in T.serial(columns):
                    spot = (origin + (top_tap + k) * dilation * width + (left_tap + m) * spread) * channels + at_c
                    tap = ((top_tap + k) * wide + left_tap + m) * channels + at_c
                    for i in T.unroll(length):
                        sums[i] = sums[i] + x[at(spot + i * lanes, lanes)] * w[at(tap + i * lanes, lanes)]
            for i in T.unroll(length):
                values[at(at_c + i * lanes, lanes)] = epilogue(sums[i])

    @T.inline
    def neighbours(again, x, w, b, values, origin, top_tap, rows, index):
        if index < len(parts):
            row_of(x, w, b, values, origin, top_tap, rows, *parts[index])
            again(again, x, w, b, values, origin, top_tap, rows, index + 1)

    @T.inline
    def alone(again, x, w, b, values, origin, top_tap, rows, left_tap, columns, index):
        if index < len(joined_parts):
            one(x, w, b, values, origin, top_tap, rows, left_tap, columns, *joined_parts[index])
            again(again, x, w, b, values, origin, top_tap, rows, left_tap, columns, index + 1)

    @T.inline
    def some(x, w, b, held, started, step, sent, places, begin, end):
        """The pixels of a part of the list."""
        values = T.alloc_buffer((_NEIGHBOURS * channels,), "float32")
        done = T.alloc_buffer((1,), "int32", scope="local")
        done[0] = begin
        while done[0] < end:
            place: T.let = places[done[0]]
            image: T.let = place // (out_height * out_width)
            y0: T.let = place // out_width % out_height * down - top
            x0: T.let = place % out_width * across - left
            origin: T.let = (image * height + y0) * width + x0
            top_tap: T.let = first_tap(y0, dilation)
            rows: T.let = end_tap(y0, dilation, high, height) - top_tap
            last_x: T.let = x0 + (_NEIGHBOURS - 1) * across + reach
            listed_all: T.let = places[done[0] + _NEIGHBOURS - 1] == place + _NEIGHBOURS - 1
            if T.And(T.And(x0 >= 0, last_x <= width), T.And(done[0] + _NEIGHBOURS <= end, listed_all)):
                neighbours(neighbours, x, w, b, values, origin, top_tap, rows, 0)
                for i in T.serial(_NEIGHBOURS):
                    deliver(values, i * channels, place + i, held, sent, step, started)
                done[0] = done[0] + _NEIGHBOURS
            else:
                left_tap: T.let = first_tap(x0, spread)
                columns: T.let = end_tap(x0, spread, wide, width) - left_tap
                alone(alone, x, w, b, values, origin, top_tap, rows, left_tap, columns, 0)
                deliver(values, 0, place, held, sent, step, started)
                done[0] = done[0] + 1

    @T.prim_func
    def kernel(
        x_: T.handle, m_: T.handle, w_: T.handle, b_: T.handle,
        h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (images, height, width, channels), "float32")
        mask_shaped = T.match_buffer(m_, (images, height, width), "uint8")
        w = T.match_buffer(w_, (high * wide * channels,), "float32")
        b = T.match_buffer(b_, (channels,), "float32")
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
        places = T.alloc_buffer((stage.pixels + _NEIGHBOURS,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        choose(started[0], places, found, mask)
        count: T.let = found[0]
        if count > 0:
            for task in T.parallel((count + _TASK - 1) // _TASK):
                some(x, w, b, held, started[0], step, sent, places, task * _TASK, T.min(count, (task + 1) * _TASK))

    return kernel
