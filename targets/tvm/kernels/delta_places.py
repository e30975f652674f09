"""Which pixels a kernel of changed pixels has to compute: lists of places, the indices of pixels.

A mask (N, H, W) has a byte a pixel, 1 where it changed, and is seen as one row of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._window import Window

_WORD = 8
"""Pixels whose bytes of a mask are looked at together."""


def word(mask: Any, start: Any) -> Any:
    """The bytes of `_WORD` pixels as one integer."""
    return T.reinterpret("uint64", mask[T.ramp(start, 1, _WORD)])


def first_tap(start: Any, step: int) -> Any:
    """The first tap on the map of a window that begins at `start`, with taps `step` apart."""
    return T.max(0, (step - 1 - start) // step)


def end_tap(start: Any, step: int, taps: int, length: int) -> Any:
    """The first tap behind a map of that length, or of those that there are."""
    return T.min(taps, (length - start + step - 1) // step)


def clear(count: int) -> Any:
    """A macro that sets `count` bytes of a mask to zero."""

    @T.inline
    def run(mask):
        for i in T.serial(count // 64):
            mask[T.ramp(i * 64, 1, 64)] = T.broadcast(T.uint8(0), 64)
        for i in T.serial(count % 64):
            mask[count // 64 * 64 + i] = T.uint8(0)

    return run


def list_marked(count: int) -> Any:
    """A macro that lists marked pixels, of `count`, in order.

    Its arguments are the marks, the place of their first one in them, the place that this one stands for, the list,
    which has room for one more place than there are, and how many are in it: one int32, counted up.
    """

    @T.inline
    def run(marks, start, first, places, found):
        for i in T.serial(count // _WORD):
            if word(marks, start + i * _WORD) != T.uint64(0):
                for j in T.unroll(_WORD):
                    places[found[0]] = first + i * _WORD + j
                    found[0] = found[0] + T.Cast("int32", marks[start + i * _WORD + j])
        for i in T.serial(count % _WORD):
            places[found[0]] = first + count // _WORD * _WORD + i
            found[0] = found[0] + T.Cast("int32", marks[start + count // _WORD * _WORD + i])

    return run


def list_either(count: int) -> Any:
    """A macro that lists the pixels, of `count`, that either of two masks marks; it takes them, list and its length."""
    list_changed = list_marked(count)

    @T.inline
    def run(first, second, places, found):
        both = T.alloc_buffer((count,), "uint8")
        for i in T.serial(count):
            both[i] = T.bitwise_or(first[i], second[i])
        list_changed(both, 0, 0, places, found)

    return run


def list_all(count: int) -> Any:
    """A macro that lists `count` pixels: it takes the list and how many are in it."""

    @T.inline
    def run(places, found):
        for i in T.serial(count):
            places[i] = i
        found[0] = count

    return run


def list_reached(images: int, window: Window) -> Any:
    """A macro that lists the pixels of the output whose window has a marked pixel in it.

    Its arguments are the mask, the list, and how many are in it.
    """
    height, width = window.height, window.width
    out_height, out_width = window.out_height, window.out_width
    (high, wide), (down, across), (dilation, spread) = window.kernel, window.strides, window.dilations
    top, left = window.pads[:2]
    # A line with what windows see beyond the map to both sides.
    line = max((out_width - 1) * across + (wide - 1) * spread + 1, left + width)
    room = -(-out_width // _WORD) * _WORD
    list_row = list_marked(room)
    point = (wide, across, left) == (1, 1, 0)

    @T.inline
    def any_of(mask, start, seen):
        seen[0] = T.uint64(0)
        for i in T.serial(width // _WORD):
            seen[0] = T.bitwise_or(seen[0], word(mask, start + i * _WORD))
        for i in T.serial(width % _WORD):
            seen[0] = T.bitwise_or(seen[0], T.Cast("uint64", mask[start + width // _WORD * _WORD + i]))

    @T.inline
    def run(mask, places, found):
        rows = T.alloc_buffer((images * height,), "uint8")
        seen = T.alloc_buffer((1,), "uint64", scope="local")
        for row in T.serial(images * height):
            any_of(mask, row * width, seen)
            rows[row] = T.Select(seen[0] != T.uint64(0), T.uint8(1), T.uint8(0))
        together = T.alloc_buffer((line,), "uint8")
        marks = T.alloc_buffer((room,), "uint8")
        for i in T.serial(line):
            together[i] = T.uint8(0)
        for i in T.serial(room):
            marks[i] = T.uint8(0)
        for out_row in T.serial(images * out_height):
            image = out_row // out_height
            y = out_row % out_height * down - top
            some = T.alloc_buffer((1,), "int32", scope="local")
            some[0] = 0
            for k in T.serial(high):
                row = image * height + y + k * dilation
                inside = T.And(y + k * dilation >= 0, y + k * dilation < height)
                if T.And(inside, rows[T.max(0, T.min(row, images * height - 1))] != T.uint8(0)):
                    if some[0] == 0:
                        for x in T.serial(width):
                            together[left + x] = mask[row * width + x]
                    else:
                        for x in T.serial(width):
                            together[left + x] = T.bitwise_or(together[left + x], mask[row * width + x])
                    some[0] = 1
            if some[0] != 0:
                if point:
                    for x in T.serial(out_width):
                        marks[x] = together[x]
                else:
                    for x in T.serial(out_width):
                        marks[x] = together[x * across]
                    for k in T.serial(wide - 1):
                        for x in T.serial(out_width):
                            marks[x] = T.bitwise_or(marks[x], together[x * across + (k + 1) * spread])
                list_row(marks, 0, out_row * out_width, places, found)

    return run


def listed(pixels: int, mark: Callable[..., Any]) -> Any:
    """A macro that lists all pixels in the first step, and those that `mark(*sources, places, found)` lists in others.

    Its arguments are whether the stream has started, the list, how many are in it, and the sources.
    """
    everything = list_all(pixels)

    @T.inline
    def run(started, places, found, *sources):
        found[0] = 0
        if started:
            mark(*sources, places, found)
        else:
            everything(places, found)

    return run
