"""Float32 convolutions of NHWC images with constant weights, with bias, residual and activation.

An implicit product of matrices: its rows are neighbouring pixels of the output, its columns output channels, and the
sums of a block of them stay in registers while the window is walked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window, blocks
from onnxcomp.targets.tvm.machine import Machine

_BAND = 256 * 1024
"""Bytes of the image that all output channels are computed of before the next part of it, and a fourth of those that
they may take: both stay in cache."""

_APART = 6
"""Bands from which on each is padded by the thread that computes it."""

_HIGHEST = 16
"""Pixels in a block, at most: more do not hide more latency, and the code grows."""


@dataclass(frozen=True, kw_only=True)
class Panels:
    """Panels of the same width, side by side.

    Attributes:
        first: Index of the first one.
        count: How many.
        column: First output channel.
        full: Whole vectors in each.
        tail: Lanes of one more vector, or 0.
        filled: Output channels in that vector.
        lanes: Of a whole vector.
    """

    first: int
    count: int
    column: int
    full: int
    tail: int
    filled: int
    lanes: int

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.full * self.lanes + self.tail


def _high(machine: Machine, vectors: int) -> int:
    """Pixels of a block of so many vectors; some registers are left for weights, for pixels, and for LLVM."""
    if _by_lane(machine):
        return (machine.registers - 2 - vectors) // (vectors + 1)
    return min(_HIGHEST, (machine.registers - machine.registers // 10 - vectors) // vectors)


def _by_lane(machine: Machine) -> bool:
    """Whether a product takes one lane of a vector, as on NEON, where to spread a value costs as much as a product."""
    return machine.lanes == 4 and machine.registers >= 32


def choose(machine: Machine, row: int, n: int) -> list[int]:
    """Vectors of each panel of `n` output channels (of a group) that compute rows of `row` pixels fastest."""
    total = -(-n // machine.lanes)
    if machine.dot == "dp4a":
        return [total]  # a GPU cuts the columns as it likes
    best: tuple[float, list[int]] | None = None
    for vectors in (2, 3, 1, 4, 6, 8):
        if _high(machine, vectors) < 1 or (vectors > 2 and vectors > total):
            continue
        count = -(-total // vectors)
        sizes = [total // count + (i < total % count) for i in range(count)]
        cost = 0.0
        for size in sizes:
            high, many, less = blocks(row, _high(machine, size))
            for h, repeats in ((high, many), (high - 1, less)):
                # Two products or loads a cycle, of four cycles each.
                cost += repeats * (max(h * size, h + size, 8) / 2 + 1)
        if best is None or cost < best[0] * 0.97:
            best = cost, sizes
    assert best is not None
    return best[1]


def panels(machine: Machine, sizes: Sequence[int], n: int) -> list[Panels]:
    """Runs of equal panels, of the sizes that `choose` found."""
    lanes, column = machine.lanes, 0
    runs: list[Panels] = []
    for index, size in enumerate(sizes):
        left = n - column
        full = min(size, left // lanes)
        filled = left - full * lanes if full < size else 0
        tail = max(2, lanes // 8, 1 << (filled - 1).bit_length()) if filled else 0
        last = runs[-1] if runs else None
        if last is not None and (last.full, last.tail) == (full, tail):
            runs[-1] = Panels(**{**vars(last), "count": last.count + 1})
        else:
            runs.append(Panels(first=index, count=1, column=column, full=full, tail=tail, filled=filled, lanes=lanes))
        column += full * lanes + tail
    return runs


def columns(machine: Machine, sizes: Sequence[int], n: int) -> int:
    """Columns of all panels: output channels of a group, and what fills up the last vector."""
    return sum(run.width * run.count for run in panels(machine, sizes, n))


def pack(machine: Machine, sizes: Sequence[int], weight: Array, group: int) -> Array:
    """Weight of shape (N, C / group, KH, KW) as one vector: group, panel, row of the window, column, channel, lane."""
    n, channels, high, wide = weight.shape
    each = n // group
    rows = weight.reshape(group, each, channels, high, wide).transpose(0, 3, 4, 2, 1).reshape(group, -1, each)
    filled = np.zeros((group, rows.shape[1], columns(machine, sizes, each)), np.float32)
    filled[:, :, :each] = rows
    parts = []
    for one in filled:
        for run in panels(machine, sizes, each):
            for i in range(run.count):
                start = run.column + i * run.width
                parts.append(one[:, start : start + run.width].reshape(-1))
    return np.concatenate(parts)


def pack_bias(machine: Machine, sizes: Sequence[int], bias: Array | None, n: int, group: int) -> Array:
    """Bias of shape (N,), or zeros, and as many more at the end as the last vector of a group reads past it."""
    each = n // group
    filled = np.zeros(n + columns(machine, sizes, each) - each, np.float32)
    if bias is not None:
        filled[:n] = bias
    return filled


def row_of(window: Window) -> int:
    """Pixels of the output that stand side by side in memory and are computed of such: what a row is cut from."""
    return folded(window).out_width


def folded(window: Window) -> Window:
    """The same window over fewer, longer rows where each output pixel depends on one input pixel only."""
    if not window.is_point:
        return window
    high = window.height
    while high > 1 and (high * window.width * window.channels * 4 > _BAND or window.height % high):
        high -= 1
    return Window(
        height=window.height // high, width=window.width * high, channels=window.channels, kernel=window.kernel
    )


@cache
def conv(
    machine: Machine,
    *,
    batch: int | None,
    window: Window,
    n: int,
    group: int,
    sizes: tuple[int, ...],
    epilogue: Epilogue,
) -> Any:
    """Kernel `(x (batch, H * W * C), weight, bias[, residual as y], y (batch, OH * OW * N))`, all float32.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: Sizes.
        n: Output channels.
        group: Groups of channels.
        sizes: Vectors of each panel, for which the weight was packed.
        epilogue: What is done to the sums.
    """
    window = folded(window)
    lanes, each = machine.lanes, n // group
    runs = panels(machine, sizes, each)
    columns_ = columns(machine, sizes, each)
    top, left, bottom, right = window.pads
    padded = any(window.pads)
    channels, wide = window.channels // group, (window.width + left + right) * window.channels
    high = window.height + top + bottom
    across = window.strides[1] * window.channels
    out_height, out_width = window.out_height, window.out_width
    # Side by side in memory, pixels of a window are one run of values.
    merged = group == 1 and window.dilations[1] == 1
    steps, depth = (1, window.kernel[1] * channels) if merged else (window.kernel[1], channels)
    taps = window.kernel[0] * window.kernel[1] * channels
    band = max(1, min(out_height, _BAND // (window.strides[0] * wide * 4), 4 * _BAND // (out_width * n * 4)))
    bands = -(-out_height // band)
    # Enough bands for all threads: each pads its own part of the image, which stays in its cache.
    apart = bands >= _APART
    reach = (band - 1) * window.strides[0] + (window.kernel[0] - 1) * window.dilations[0] + 1
    vector = f"float32x{lanes}"
    residual = epilogue.residual
    images = tirx.Var("batch", "int64") if batch is None else batch
    in_size, out_size = window.height * window.width * window.channels, out_height * out_width * n
    count = len(sizes)

    def load(x: Any, image: Any, at: Any) -> Any:
        return x[at] if padded else x[image, at]

    def alone(x: Any, image: Any, at: Any) -> Callable[[Any], Any]:
        return lambda i: load(x, image, at + i * across)

    def of_lane(pixels: Any, lane: int) -> Callable[[Any], Any]:
        return lambda i: tirx.Shuffle([pixels[i]], [tirx.const(lane, "int32")])

    @T.inline
    def step(w, sums, ends, row, height, run, pixel):
        for i in T.unroll(height):
            for v in T.unroll(run.full):
                sums[i * run.full + v] = (
                    sums[i * run.full + v] + T.broadcast(pixel(i), lanes) * w[T.ramp(row + v * lanes, 1, lanes)]
                )
            if run.tail > 0:
                ends[i] = ends[i] + T.broadcast(pixel(i), run.tail) * w[T.ramp(row + run.full * lanes, 1, run.tail)]

    @T.inline
    def block(x, w, b, r, y, image, start, weight, bias, out, height, run):
        sums = T.alloc_buffer((max(1, height * run.full),), vector, scope="local")
        ends = T.alloc_buffer((height,), f"float32x{max(2, run.tail)}", scope="local")
        for i in T.unroll(height):
            for v in T.unroll(run.full):
                sums[i * run.full + v] = T.broadcast(T.float32(0), lanes)
            if run.tail > 0:
                ends[i] = T.broadcast(T.float32(0), run.tail)
        for dy in T.serial(window.kernel[0]):
            for dx in T.serial(steps):
                first = start + dy * window.dilations[0] * wide + dx * window.dilations[1] * window.channels
                tap = (dy * steps + dx) * depth
                if _by_lane(machine) and depth % lanes == 0:
                    pixels = T.alloc_buffer((height,), vector, scope="local")
                    for j in T.serial(depth // lanes):
                        for i in T.unroll(height):
                            pixels[i] = load(x, image, T.ramp(first + i * across + j * lanes, 1, lanes))
                        row = weight + (tap + j * lanes) * run.width
                        step(w, sums, ends, row, height, run, of_lane(pixels, 0))
                        step(w, sums, ends, row + run.width, height, run, of_lane(pixels, 1))
                        step(w, sums, ends, row + 2 * run.width, height, run, of_lane(pixels, 2))
                        step(w, sums, ends, row + 3 * run.width, height, run, of_lane(pixels, 3))
                else:
                    for j in T.serial(depth):
                        row = weight + (tap + j) * run.width
                        step(w, sums, ends, row, height, run, alone(x, image, first + j))
        for i in T.unroll(height):
            for v in T.unroll(run.full):
                sums[i * run.full + v] = sums[i * run.full + v] + b[T.ramp(bias + v * lanes, 1, lanes)]
                if residual:
                    sums[i * run.full + v] = (
                        sums[i * run.full + v] + r[image, T.ramp(out + i * n + v * lanes, 1, lanes)]
                    )
                y[image, T.ramp(out + i * n + v * lanes, 1, lanes)] = epilogue(sums[i * run.full + v])
            if run.tail > 0:
                end = out + i * n + run.full * lanes
                ends[i] = ends[i] + b[T.ramp(bias + run.full * lanes, 1, run.tail)]
                if run.tail == run.filled:
                    if residual:
                        ends[i] = ends[i] + r[image, T.ramp(end, 1, run.tail)]
                    y[image, T.ramp(end, 1, run.tail)] = epilogue(ends[i])
                else:
                    line = T.alloc_buffer((run.tail,), "float32", scope="local")
                    if residual:
                        for c in T.serial(run.filled):
                            line[c] = r[image, end + c]
                        ends[i] = ends[i] + line[T.ramp(0, 1, run.tail)]
                    line[T.ramp(0, 1, run.tail)] = epilogue(ends[i])
                    for c in T.serial(run.filled):
                        y[image, end + c] = line[c]

    @T.inline
    def row(x, w, b, r, y, image, start, weight, bias, out, run, cut):
        for i in T.serial(cut[1]):
            at = i * cut[0]
            block(x, w, b, r, y, image, start + at * across, weight, bias, out + at * n, cut[0], run)
        if cut[2] > 0:
            for i in T.serial(cut[2]):
                at = cut[1] * cut[0] + i * (cut[0] - 1)
                block(x, w, b, r, y, image, start + at * across, weight, bias, out + at * n, cut[0] - 1, run)

    @T.inline
    def panel(x, w, b, r, y, image, part, origin, g, index, run):
        column = run.column + (index - run.first) * run.width
        for line in T.serial(T.min(band, out_height - part * band)):
            row(
                x,
                w,
                b,
                r,
                y,
                image,
                ((part * band + line) * window.strides[0] - origin) * wide + g * channels,
                (g * columns_ + column) * taps,
                g * each + column,
                (part * band + line) * out_width * n + g * each + column,
                run,
                blocks(out_width, _high(machine, run.full + (run.tail > 0))),
            )

    @T.inline
    def one(x, w, b, r, y, image, part, origin, g, index):
        if len(runs) == 1:
            panel(x, w, b, r, y, image, part, origin, g, index, runs[0])
        elif len(runs) == 2:
            if index < runs[1].first:
                panel(x, w, b, r, y, image, part, origin, g, index, runs[0])
            else:
                panel(x, w, b, r, y, image, part, origin, g, index, runs[1])
        else:
            if index < runs[1].first:
                panel(x, w, b, r, y, image, part, origin, g, index, runs[0])
            elif index < runs[2].first:
                panel(x, w, b, r, y, image, part, origin, g, index, runs[1])
            else:
                panel(x, w, b, r, y, image, part, origin, g, index, runs[2])

    @T.inline
    def whole(x, w, b, r, y, image):
        for task in T.parallel(bands * group * count):
            one(x, w, b, r, y, image, task // (group * count), 0, task // count % group, task % count)

    @T.inline
    def fill(to, start, count):
        for i in T.serial(count // lanes):
            to[T.ramp(start + i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for i in T.serial(count % lanes):
            to[start + count // lanes * lanes + i] = T.float32(0)

    @T.inline
    def copy(to, start, x, image, begin, count):
        for i in T.serial(count // lanes):
            to[T.ramp(start + i * lanes, 1, lanes)] = x[image, T.ramp(begin + i * lanes, 1, lanes)]
        for i in T.serial(count % lanes):
            to[start + count // lanes * lanes + i] = x[image, begin + count // lanes * lanes + i]

    @T.inline
    def pad(to, at, x, image, line):
        if T.And(line >= top, line < top + window.height):
            fill(to, at, left * window.channels)
            begin = (line - top) * window.width * window.channels
            copy(to, at + left * window.channels, x, image, begin, window.width * window.channels)
            fill(to, at + (left + window.width) * window.channels, right * window.channels)
        else:
            fill(to, at, wide)

    @T.inline
    def body(x, w, b, r, y):
        for image in T.serial(images):
            if not padded:
                whole(x, w, b, r, y, image)
            elif apart:
                for part in T.parallel(bands):
                    space = T.alloc_buffer((reach * wide,), "float32")
                    first = part * band * window.strides[0]
                    for line in T.serial(T.min(reach, high - first)):
                        pad(space, line * wide, x, image, first + line)
                    for task in T.serial(group * count):
                        one(space, w, b, r, y, image, part, first, task // count, task % count)
            else:
                space = T.alloc_buffer((high * wide,), "float32")
                for line in T.parallel(high):
                    pad(space, line * wide, x, image, line)
                whole(space, w, b, r, y, image)

    if residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (group * columns_ * taps,), "float32")
            b = T.match_buffer(b_, (n + columns_ - each,), "float32")
            r = T.match_buffer(r_, (images, out_size), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            body(x, w, b, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (group * columns_ * taps,), "float32")
            b = T.match_buffer(b_, (n + columns_ - each,), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            body(x, w, b, x, y)

    return kernel
