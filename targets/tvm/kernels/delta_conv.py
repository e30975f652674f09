"""Convolutions of changed pixels: what lies under their windows is gathered, and multiplied as rows of a matrix.

The weight lies in panels of `PANEL` columns, whatever the machine. Every sum is one chain, in the order of the weight's
rows, whatever pixels are computed with it: a pixel that has not changed does not differ in its last bits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._panels import ON_STACK
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.delta_pixels import Stage, copy, fill, flat, send
from onnxcomp.targets.tvm.kernels.delta_places import clear, list_marked, list_reached, listed
from onnxcomp.targets.tvm.machine import Machine

PANEL = 32
"""Columns of a panel of the weight: a whole number of vectors on every machine."""

_BLOCK = 96
"""Pixels that are computed together, at most; a multiple of every height of a tile."""

_GATHERED = 110_000
"""Values that are gathered for a block, at most: they stay in the second cache."""


def packed_shape(k: int, n: int, group: int) -> tuple[int, int, int, int]:
    """Shape of a packed weight: groups, panels, rows, columns of a panel."""
    return group, -(-(n // group) // PANEL), k, PANEL


def pack(weight: Array, group: int) -> Array:
    """Weight of shape (KH, KW, C / group, N) in the order of `packed_shape`, the last panel filled up with zeros."""
    n = weight.shape[-1]
    k = weight.size // n
    _, panels, _, columns = packed_shape(k, n, group)
    wide = np.zeros((group, k, panels * columns), np.float32)
    wide[:, :, : n // group] = weight.reshape(k, group, n // group).transpose(1, 0, 2)
    return np.ascontiguousarray(wide.reshape(group, k, panels, columns).transpose(0, 2, 1, 3)).reshape(-1)


def pack_bias(bias: Array, group: int) -> Array:
    """Bias of shape (N,), filled up to whole panels in each group."""
    n = len(bias)
    _, panels, _, columns = packed_shape(0, n, group)
    wide = np.zeros((group, panels * columns), np.float32)
    wide[:, : n // group] = bias.reshape(group, n // group)
    return wide.reshape(-1)


def heights(machine: Machine) -> tuple[int, ...]:
    """Pixels of a tile: as many as fit in registers, and powers of two for what is left."""
    return (12, 8, 4, 2) if machine.registers >= 32 and machine.lanes >= 16 else (6, 4, 2)


@cache
def conv(machine: Machine, *, window: Window, n: int, group: int, stage: Stage, epilogue: Epilogue) -> Any:
    """Kernel `(x, mask, weight, bias, held, started () bool, step, sent)`; it updates `held` and fills `sent`.

    Args:
        machine: What it is for.
        window: Sizes.
        n: Output channels.
        group: Groups of channels.
        stage: Of the output.
        epilogue: What is done to the sums.
    """
    images, lanes = stage.images, machine.lanes
    together = 4 if machine.registers >= 32 and lanes < 16 else 2
    tall = heights(machine)
    each, inner = n // group, window.channels // group
    (high, wide), (down, across), (dilation, spread) = window.kernel, window.strides, window.dilations
    top, left = window.pads[:2]
    k = high * wide * inner
    _, panels, _, _ = packed_shape(k, n, group)
    vectors = -(-each // lanes)
    groups, ends = vectors // together, vectors % together
    pitch = (group - 1) * each + vectors * lanes
    height, width, out_height, out_width = window.height, window.width, window.out_height, window.out_width
    channels = window.channels
    room = max(tall[0], min(_BLOCK, _GATHERED // k) // tall[0] * tall[0])
    merged = group == 1 and spread == 1 and wide > 1
    point = window.is_point
    take, empty = copy(machine, inner), fill(machine, inner)
    take_row, empty_row = copy(machine, wide * inner), fill(machine, wide * inner)
    deliver = send(machine, stage)
    reset = clear(stage.pixels)
    list_changed = list_marked(stage.pixels) if point else list_reached(images, window)

    @T.inline
    def mark(mask, places, found):
        if point:
            list_changed(mask, 0, 0, places, found)
        else:
            list_changed(mask, places, found)

    choose = listed(stage.pixels, mark)

    @T.inline
    def tile(rows, first, w, g, column, b, values, height, count):
        sums = T.alloc_buffer((height * count * lanes,), "float32", annotations=ON_STACK)
        for i in T.unroll(height * count):
            sums[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        start = ((g * panels + column // PANEL) * k) * PANEL + column % PANEL
        for j in T.serial(k):
            for i in T.unroll(height):
                for v in T.unroll(count):
                    place = T.meta_var(T.ramp((i * count + v) * lanes, 1, lanes))
                    sums[place] = (
                        sums[place]
                        + T.broadcast(rows[(first + i) * k + j], lanes)
                        * w[T.ramp(start + j * PANEL + v * lanes, 1, lanes)]
                    )
        for i in T.unroll(height):
            for v in T.unroll(count):
                values[T.ramp((first + i) * pitch + g * each + column + v * lanes, 1, lanes)] = epilogue(
                    sums[T.ramp((i * count + v) * lanes, 1, lanes)]
                    + b[T.ramp(g * panels * PANEL + column + v * lanes, 1, lanes)]
                )

    @T.inline
    def rest(again, rows, some, w, g, column, b, values, count, index):
        if index < len(tall):
            # What is left after the tiles before, rounded up: there is room for pixels that do not count.
            left_over = (some % tall[0] + 1) // 2 * 2
            if T.bitwise_and(left_over, tall[index]) != 0:
                first = some // tall[0] * tall[0] + left_over // (2 * tall[index]) * (2 * tall[index])
                tile(rows, first, w, g, column, b, values, tall[index], count)
            again(again, rows, some, w, g, column, b, values, count, index + 1)

    @T.inline
    def multiply(rows, some, w, g, column, b, values, count):
        for i in T.serial(some // tall[0]):
            tile(rows, i * tall[0], w, g, column, b, values, tall[0], count)
        rest(rest, rows, some, w, g, column, b, values, count, 1)

    @T.inline
    def under(x, rows, i, place, g):
        """Gathers what lies under the window of a pixel."""
        if point:
            take(rows, i * k, x, place * channels + g * inner)
        else:
            image = place // (out_height * out_width)
            y0 = place // out_width % out_height * down - top
            x0 = place % out_width * across - left
            for dy in T.serial(high):
                inside = T.And(y0 + dy * dilation >= 0, y0 + dy * dilation < height)
                line = (image * height + y0 + dy * dilation) * width
                if merged:
                    if T.And(inside, T.And(x0 >= 0, x0 + wide <= width)):
                        take_row(rows, i * k + dy * wide * inner, x, (line + x0) * channels)
                    elif inside:
                        for dx in T.serial(wide):
                            if T.And(x0 + dx >= 0, x0 + dx < width):
                                take(rows, i * k + (dy * wide + dx) * inner, x, (line + x0 + dx) * channels)
                            else:
                                empty(rows, i * k + (dy * wide + dx) * inner)
                    else:
                        empty_row(rows, i * k + dy * wide * inner)
                else:
                    for dx in T.serial(wide):
                        spot = x0 + dx * spread
                        if T.And(inside, T.And(spot >= 0, spot < width)):
                            take(rows, i * k + (dy * wide + dx) * inner, x, (line + spot) * channels + g * inner)
                        else:
                            empty(rows, i * k + (dy * wide + dx) * inner)

    @T.inline
    def block(x, w, b, held, started, step, sent, places, begin, some):
        rows = T.alloc_buffer((room * k,), "float32")
        values = T.alloc_buffer((room * pitch + lanes,), "float32")
        for g in T.serial(group):
            for i in T.serial(some):
                under(x, rows, i, places[begin + i], g)
            if groups > 0:
                for part in T.serial(groups):
                    multiply(rows, some, w, g, part * (together * lanes), b, values, together)
            if ends > 0:
                multiply(rows, some, w, g, groups * together * lanes, b, values, ends)
        for i in T.serial(some):
            deliver(values, i * pitch, places[begin + i], held, sent, step, started)

    @T.prim_func
    def kernel(
        x_: T.handle, m_: T.handle, w_: T.handle, b_: T.handle,
        h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (images, height, width, channels), "float32")
        mask_shaped = T.match_buffer(m_, (images, height, width), "uint8")
        w = T.match_buffer(w_, (group * panels * k * PANEL,), "float32")
        b = T.match_buffer(b_, (group * panels * PANEL,), "float32")
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
        choose(started[0], places, found, mask)
        count: T.let = found[0]
        if count > 0:
            for task in T.parallel((count + room - 1) // room):
                some: T.let = T.min(room, count - task * room)
                block(x, w, b, held, started[0], step, sent, places, task * room, some)

    return kernel
