"""Layers of changed pixels that read one pixel of each input: sums, products, activations, and moves of values."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels.delta_pixels import Stage, copy, flat, send
from onnxcomp.targets.tvm.kernels.delta_places import clear, list_either, list_marked, listed
from onnxcomp.targets.tvm.kernels.depthwise import at, pieces
from onnxcomp.targets.tvm.machine import Machine


@cache
def unary(machine: Machine, *, channels: int, begin: int, stage: Stage, epilogue: Epilogue) -> Any:
    """Kernel `(x, mask, held, started () bool, step, sent)`, which updates `held` and fills the mask `sent`.

    Args:
        machine: What it is for.
        channels: Of the input.
        begin: First of them that is read; as many follow as the output has.
        stage: Of the output.
        epilogue: The activation.
    """
    pixels, size = stage.pixels, stage.channels
    deliver, reset = send(machine, stage), clear(pixels)
    list_changed = list_marked(pixels)
    apply = _applied(machine, size, epilogue)

    @T.inline
    def mark(mask, places, found):
        list_changed(mask, 0, 0, places, found)

    choose = listed(stage.pixels, mark)

    @T.prim_func
    def kernel(x_: T.handle, m_: T.handle, h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (*stage.shape[:3], channels), "float32")
        mask_shaped = T.match_buffer(m_, stage.shape[:3], "uint8")
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
        places = T.alloc_buffer((pixels + 1,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        values = T.alloc_buffer((size,), "float32")
        choose(started[0], places, found, mask)
        for i in T.serial(found[0]):
            apply(values, x, places[i] * channels + begin)
            deliver(values, 0, places[i], held, sent, step, started[0])

    return kernel


@cache
def binary(machine: Machine, *, product: bool, single: bool, stage: Stage, epilogue: Epilogue) -> Any:
    """Kernel `(a, mask of a, b, mask of b, held, started () bool, step, sent)`; it updates `held` and fills `sent`.

    Args:
        machine: What it is for.
        product: The two are multiplied instead of added.
        single: `b` has one pixel an image.
        stage: Of the output.
        epilogue: The activation.
    """
    pixels, channels = stage.pixels, stage.channels
    images = stage.images
    plane = pixels // images
    other = (images, 1, 1, channels) if single else stage.shape
    deliver, reset = send(machine, stage), clear(pixels)
    list_image, list_changed = list_marked(plane), list_either(pixels)
    parts = pieces(machine.lanes, channels)

    @T.inline
    def mark(a_mask, b_mask, places, found):
        if single:
            for image in T.serial(images):
                if b_mask[image] != T.uint8(0):
                    for i in T.serial(plane):
                        places[found[0] + i] = image * plane + i
                    found[0] = found[0] + plane
                else:
                    list_image(a_mask, image * plane, image * plane, places, found)
        else:
            list_changed(a_mask, b_mask, places, found)

    choose = listed(stage.pixels, mark)

    @T.inline
    def part(values, a, b, place, first, many, lanes):
        for v in T.serial(many):
            channel = first + v * lanes
            from_b = place // plane * channels if single else place * channels
            if product:
                values[at(channel, lanes)] = epilogue(
                    a[at(place * channels + channel, lanes)] * b[at(from_b + channel, lanes)]
                )
            else:
                values[at(channel, lanes)] = epilogue(
                    a[at(place * channels + channel, lanes)] + b[at(from_b + channel, lanes)]
                )

    @T.inline
    def combine(again, values, a, b, place, index):
        if index < len(parts):
            part(values, a, b, place, *parts[index])
            again(again, values, a, b, place, index + 1)

    @T.prim_func
    def kernel(
        a_: T.handle, am_: T.handle, b_: T.handle, bm_: T.handle,
        h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        a_shaped = T.match_buffer(a_, stage.shape, "float32")
        a_mask_shaped = T.match_buffer(am_, stage.shape[:3], "uint8")
        b_shaped = T.match_buffer(b_, other, "float32")
        b_mask_shaped = T.match_buffer(bm_, other[:3], "uint8")
        held_shaped = T.match_buffer(h_, stage.shape, "float32")
        started_shaped = T.match_buffer(f_, (), "bool")
        step = T.match_buffer(q_, (stage.steps,), "float32")
        sent_shaped = T.match_buffer(s_, stage.shape[:3], "uint8")
        a = flat(a_shaped)
        a_mask = flat(a_mask_shaped)
        b = flat(b_shaped)
        b_mask = flat(b_mask_shaped)
        held = flat(held_shaped)
        started = flat(started_shaped)
        sent = flat(sent_shaped)
        reset(sent)
        places = T.alloc_buffer((pixels + 1,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        values = T.alloc_buffer((channels,), "float32")
        choose(started[0], places, found, a_mask, b_mask)
        for i in T.serial(found[0]):
            combine(combine, values, a, b, places[i], 0)
            deliver(values, 0, places[i], held, sent, step, started[0])

    return kernel


@cache
def concat(machine: Machine, *, sizes: tuple[int, int], stage: Stage) -> Any:
    """Kernel `(a, mask of a, b, mask of b, held, started () bool, step, sent)`; it updates `held` and fills `sent`.

    Args:
        machine: What it is for.
        sizes: Channels of both inputs.
        stage: Of the output.
    """
    pixels = stage.pixels
    deliver, reset = send(machine, stage), clear(pixels)
    take_a, take_b = (copy(machine, size) for size in sizes)

    choose = listed(pixels, list_either(pixels))

    @T.prim_func
    def kernel(
        a_: T.handle, am_: T.handle, b_: T.handle, bm_: T.handle,
        h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        a_shaped = T.match_buffer(a_, (*stage.shape[:3], sizes[0]), "float32")
        a_mask_shaped = T.match_buffer(am_, stage.shape[:3], "uint8")
        b_shaped = T.match_buffer(b_, (*stage.shape[:3], sizes[1]), "float32")
        b_mask_shaped = T.match_buffer(bm_, stage.shape[:3], "uint8")
        held_shaped = T.match_buffer(h_, stage.shape, "float32")
        started_shaped = T.match_buffer(f_, (), "bool")
        step = T.match_buffer(q_, (stage.steps,), "float32")
        sent_shaped = T.match_buffer(s_, stage.shape[:3], "uint8")
        a = flat(a_shaped)
        a_mask = flat(a_mask_shaped)
        b = flat(b_shaped)
        b_mask = flat(b_mask_shaped)
        held = flat(held_shaped)
        started = flat(started_shaped)
        sent = flat(sent_shaped)
        reset(sent)
        places = T.alloc_buffer((pixels + 1,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        values = T.alloc_buffer((stage.channels,), "float32")
        choose(started[0], places, found, a_mask, b_mask)
        for i in T.serial(found[0]):
            take_a(values, 0, a, places[i] * sizes[0])
            take_b(values, sizes[0], b, places[i] * sizes[1])
            deliver(values, 0, places[i], held, sent, step, started[0])

    return kernel


@cache
def resize(machine: Machine, *, size: tuple[int, int], stage: Stage) -> Any:
    """Kernel `(x, mask, held, started () bool, step, sent)`, which updates `held` and fills the mask `sent`.

    Every pixel is repeated: output pixel (y, x) is input pixel (y // factor, x // factor).

    Args:
        machine: What it is for.
        size: Height and width of the input.
        stage: Of the output.
    """
    pixels, channels = stage.pixels, stage.channels
    (height, width), (_, out_height, out_width, _) = size, stage.shape
    down, across, rows = out_height // height, out_width // width, stage.images * height
    deliver, reset = send(machine, stage), clear(pixels)
    take = copy(machine, channels)
    list_row = list_marked(out_width)

    @T.inline
    def mark(mask, places, found):
        marks = T.alloc_buffer((out_width,), "uint8")
        for row in T.serial(rows * down):
            for i in T.serial(out_width):
                marks[i] = mask[row // down * width + i // across]
            list_row(marks, 0, row * out_width, places, found)

    choose = listed(stage.pixels, mark)

    @T.prim_func
    def kernel(x_: T.handle, m_: T.handle, h_: T.handle, f_: T.handle, q_: T.handle, s_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x_shaped = T.match_buffer(x_, (stage.images, height, width, channels), "float32")
        mask_shaped = T.match_buffer(m_, (stage.images, height, width), "uint8")
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
        places = T.alloc_buffer((pixels + 1,), "int32")
        found = T.alloc_buffer((1,), "int32", scope="local")
        values = T.alloc_buffer((channels,), "float32")
        choose(started[0], places, found, mask)
        for i in T.serial(found[0]):
            place: T.let = places[i]
            take(values, 0, x, (place // (out_width * down) * width + place % out_width // across) * channels)
            deliver(values, 0, place, held, sent, step, started[0])

    return kernel


def _applied(machine: Machine, size: int, epilogue: Epilogue) -> Any:
    """A macro that applies an activation to `size` values of x from a place on, into a buffer."""
    parts = pieces(machine.lanes, size)

    @T.inline
    def part(values, x, start, first, many, lanes):
        for v in T.serial(many):
            values[at(first + v * lanes, lanes)] = epilogue(x[at(start + first + v * lanes, lanes)])

    @T.inline
    def rest(again, values, x, start, index):
        if index < len(parts):
            part(values, x, start, *parts[index])
            again(again, values, x, start, index + 1)

    @T.inline
    def run(values, x, start):
        rest(rest, values, x, start, 0)

    return run
