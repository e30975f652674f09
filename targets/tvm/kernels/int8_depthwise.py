"""Depthwise convolutions of 8-bit images, channels last.

Four rows of the window are summed at once: for each line of the output, and one vector of channels after the other,
the bytes that lie above each other are put into words; those of a column serve all windows that the column is in.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import over_tasks
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.kernels.int8_gemm import spread
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats
from onnxcomp.targets.tvm.machine import Machine


def packed_shape(machine: Machine, window: Window, channels: int) -> tuple[int, int, int]:
    """Shape of a packed weight: vectors of channels, words of a window, bytes."""
    lanes = int8_dot.lanes(machine)
    return -(-channels // lanes), -(-window.kernel[0] // 4) * window.kernel[1], 4 * lanes


def pack(machine: Machine, window: Window, weight: Array) -> Array:
    """Weight of shape (C, 1, KH, KW), packed."""
    channels, (high, wide) = weight.shape[0], window.kernel
    vectors, words, size = packed_shape(machine, window, channels)
    full = np.zeros((words // wide * 4, wide, vectors * size // 4), np.int8)
    full[:high, :, :channels] = weight[:, 0].transpose(1, 2, 0)
    taps = full.reshape(-1, 4, wide, vectors * size // 4).transpose(0, 2, 1, 3)
    packed = int8_dot.pack(machine, taps.reshape(words * 4, -1))
    return np.ascontiguousarray(packed.transpose(1, 0, 2))


def pack_offset(machine: Machine, values: Array) -> Array:
    """Integers that sums start from, (C,), filled up to whole vectors, int32."""
    return np.pad(values.astype(np.int64), (0, -len(values) % int8_dot.lanes(machine))).astype(np.int32)


def pack_affine(machine: Machine, channels: int, scale: Array, bias: Array | None = None) -> Array:
    """Scale and bias, (C,) or one for all, as the two rows of an array that is filled up to whole vectors."""
    wide = np.zeros((2, channels + -channels % int8_dot.lanes(machine)), np.float32)
    wide[0, :channels] = scale
    if bias is not None:
        wide[1, :channels] = bias
    return wide


HIGHEST = 8
"""Rows of a window, at most."""


@cache
def depthwise(
    machine: Machine, *, batch: int | None, window: Window, channels: int, dtype: str, zero: int, output: Codes | Floats
) -> Any:
    """Kernel `(x (B, H, W, C), weight, offset, affine, y (B, OH, OW, C))`.

    Weight, offset and affine are what `pack`, `pack_offset` and `pack_affine` make; the offset accounts for the zero
    point of `x` as it is multiplied.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: The window.
        channels: Of the images.
        dtype: Of `x`: `uint8` or `int8`.
        zero: Zero point of `x`, which stands in the padding.
        output: What is stored.
    """
    lanes = int8_dot.lanes(machine)
    vectors, words, size = packed_shape(machine, window, channels)
    (high, wide), (out_high, out_wide) = window.size, window.output
    kernel_high, kernel_wide = window.kernel
    top, left = window.pads[:2]
    padded, ragged = window.padded[1], channels % lanes
    groups = -(-kernel_high // 4)
    flipped = int8_dot.flipped(machine, dtype)
    byte = zero & 255
    ints = f"int32x{lanes}"
    b = tirx.Var("batch", "int64") if batch is None else batch
    blocks, low, extra = spread(out_wide, 12 if machine.registers >= 32 else 6)
    empty = sum(byte << (8 * i) for i in range(4))
    empty -= (empty >> 31) << 32

    loop = over_tasks(None if batch is None else 2 * batch * out_high * out_wide * channels * kernel_high * kernel_wide)

    def turn(found: Any) -> Any:
        return int8_dot.flip(found) if flipped else found

    def rows_of(group: int) -> list[int]:
        return list(range(group * 4, min(group * 4 + 4, kernel_high)))

    def pick(x: Any, image: Any, first: Any, column: Any, channel: Any, k: int, count: int, checked: bool) -> Any:
        line = first + k * window.dilations[0]
        at = T.ramp(channel, 1, count) if count > 1 else channel
        kind = f"uint8x{count}" if count > 1 else "uint8"
        if not checked:
            return T.reinterpret(kind, x[image, line, column, at])
        near = T.max(T.min(line, high - 1), 0)
        return T.Select(
            T.And(line >= 0, line < high), T.reinterpret(kind, x[image, near, column, at]), tirx.const(byte, kind)
        )

    def stacked(x: Any, image: Any, first: Any, column: Any, channel: Any, group: int, checked: bool) -> Any:
        found = None
        for i, k in enumerate(rows_of(group)):
            one = T.Cast(ints, pick(x, image, first, column, channel, k, lanes, checked))
            one = T.shift_left(one, tirx.const(8 * i, ints)) if i else one
            found = one if found is None else found | one
        return turn(found)

    def single(x: Any, image: Any, first: Any, column: Any, channel: Any, group: int, checked: bool) -> Any:
        found = tirx.const(0, "int32")
        for i, k in enumerate(rows_of(group)):
            one = T.Cast("int32", pick(x, image, first, column, channel, k, 1, checked))
            found = found | T.shift_left(one, T.int32(8 * i))
        return turn(found)

    def weights(w: Any, vector: Any, index: int) -> Any:
        return lambda start, count: w[vector, index, T.ramp(start, 1, count)]

    def summed(strip: Any, w: Any, vector: Any, sums: Any, column: Any) -> Any:
        for index in range(words):
            group, k = index // kernel_wide, index % kernel_wide
            at = (group * padded + column + k * window.dilations[1]) * lanes
            sums = int8_dot.dot(machine, sums, strip[T.ramp(at, 1, lanes)], weights(w, vector, index))
        return sums

    def address(group: int, column: Any) -> Any:
        return (group * padded + left + column) * lanes

    @T.inline
    def gather_group(x, image, first, vector, strip, checked, count, column, group):
        if count == lanes:
            strip[T.ramp(address(group, column), 1, lanes)] = stacked(
                x, image, first, column, vector * lanes, group, checked
            )
        else:
            for c in T.serial(count):
                strip[address(group, column) + c] = single(x, image, first, column, vector * lanes + c, group, checked)

    @T.inline
    def gather(x, image, first, vector, strip, checked, count):
        for column in T.serial(wide):
            gather_group(x, image, first, vector, strip, checked, count, column, 0)
            if groups > 1:
                gather_group(x, image, first, vector, strip, checked, count, column, 1)

    def affine(values: Any, at: Any) -> Any:
        return lambda row: values[row, T.ramp(at, 1, lanes)]

    @T.inline
    def pixels(strip, w, offset, values, y, image, line, vector, start, height, count):
        sums = T.alloc_buffer((height,), ints, scope="local")
        for i in T.unroll(height):
            sums[i] = summed(
                strip, w, vector,
                offset[T.ramp(vector * lanes, 1, lanes)],
                (start + i) * window.strides[1],
            )  # fmt: skip
        for i in T.unroll(height):
            if count == lanes:
                y[image, line, start + i, T.ramp(vector * lanes, 1, lanes)] = output(
                    sums[i], affine(values, vector * lanes)
                )
            else:
                some = T.alloc_buffer((lanes,), output.dtype, scope="local")
                some[T.ramp(0, 1, lanes)] = output(sums[i], affine(values, vector * lanes))
                for c in T.serial(count):
                    y[image, line, start + i, vector * lanes + c] = some[c]

    @T.inline
    def one(x, w, offset, values, y, strip, image, line, vector, count):
        first = line * window.strides[0] - top
        if first >= 0 and first + (kernel_high - 1) * window.dilations[0] < high:
            gather(x, image, first, vector, strip, False, count)
        else:
            gather(x, image, first, vector, strip, True, count)
        if extra > 0:
            for i in T.serial(extra):
                pixels(strip, w, offset, values, y, image, line, vector, i * (low + 1), low + 1, count)
        for i in T.serial(blocks - extra):
            pixels(strip, w, offset, values, y, image, line, vector, i * low + extra * (low + 1), low, count)

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (b, high, wide, channels), dtype)
        w = T.match_buffer(w_, (vectors, words, size), "int8")
        offset = T.match_buffer(o_, (vectors * lanes,), "int32")
        values = T.match_buffer(a_, (2, vectors * lanes), "float32")
        y = T.match_buffer(y_, (b, out_high, out_wide, channels), output.dtype)
        for task in loop(b * out_high):
            strip = T.alloc_buffer((groups * padded * lanes,), "int32")
            for i in T.serial(groups * padded):
                strip[T.ramp(i * lanes, 1, lanes)] = turn(tirx.const(empty, ints))
            for vector in T.serial(channels // lanes):
                one(x, w, offset, values, y, strip, task // out_high, task % out_high, vector, lanes)
            if ragged > 0:
                one(x, w, offset, values, y, strip, task // out_high, task % out_high, channels // lanes, ragged)

    return kernel
