"""Depthwise convolutions of 8-bit images, channels last.

A thread makes a few neighbouring pixels of four channels: it reads the bytes of a column, four channels at once, turns
four lines of four channels into a word a channel, and multiplies these by DP4A for all its pixels that see the column.
Neighbouring threads have neighbouring channels, so that a warp reads side by side. What bounds it is memory: the image
is read once, and what several windows see comes from the cache.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import assembled, byte, dp4a, filled
from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD, store
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.kernels.int8_depthwise import packed_shape
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

_THREADS = 128

_RESIDENT = 512
"""Threads that each multiprocessor should have before they make more pixels."""


@cache
def depthwise(
    machine: Gpu, *, batch: int | None, window: Window, channels: int, dtype: str, zero: int, output: Codes | Floats
) -> Any:
    """Kernel `(x (B, H, W, C), weight, offset, affine, y (B, OH, OW, C))`.

    Arguments and packing are those of the kernel for CPUs. Where there is no multiple of four channels, a thread reads
    and writes its four by the byte.
    """
    vectors, words, size = packed_shape(machine, window, channels)
    (high, wide), (out_high, out_wide) = window.size, window.output
    kernel_high, kernel_wide = window.kernel
    (down, across), (spread_down, spread) = window.strides, window.dilations
    flipped = int8_dot.flipped(machine, dtype)
    quads = -(-channels // WORD)
    b = tirx.Var("batch", "int64") if batch is None else batch
    images = T.Cast("int32", b) if batch is None else batch
    strip = _strip(machine, (batch or 1) * out_high * out_wide * quads, out_wide)
    strips = -(-out_wide // strip)
    total = images * (out_high * strips * quads)
    tables, put = store(channels, output)

    def inside(line: Any, column: Any) -> Any:
        found = []
        if window.pads[0] or window.pads[2]:
            found += [line >= 0, line < high]
        if window.pads[1] or window.pads[3] or out_wide % strip:
            found += [column >= 0, column < wide]
        return tirx.all(*found) if found else None

    def read(x: Any, image: Any, line: Any, column: Any, quad: Any) -> Any:
        """Four channels of a pixel as they are multiplied; outside of the image, the zero point."""
        if channels % WORD == 0:
            found = T.reinterpret("int32", x[image, line, column, T.ramp(quad * WORD, 1, WORD)])
        else:
            at = [quad * WORD + c for c in range(WORD)]
            found = assembled([T.if_then_else(c < channels, byte(x[image, line, column, c]), T.int32(0)) for c in at])
        near = inside(line, column)
        if near is not None:
            found = T.if_then_else(near, found, filled(zero))
        return T.reinterpret("uint32", int8_dot.flip(found) if flipped else found)

    def picked(a: Any, b: Any, order: int) -> Any:
        return T.call_pure_extern("uint32", "__byte_perm", a, b, T.uint32(order))

    @T.inline
    def gather(x, lines, image, line, column, quad, group):
        for i in T.unroll(4):
            if group * 4 + i < kernel_high:
                lines[i] = read(x, image, line + (group * 4 + i) * spread_down, column, quad)
            else:
                lines[i] = T.uint32(0)

    @T.inline
    def turn(lines, halves, pixel):
        for i in T.unroll(2):
            halves[i] = picked(lines[2 * i], lines[2 * i + 1], 0x5140)
            halves[2 + i] = picked(lines[2 * i], lines[2 * i + 1], 0x7362)
        for i in T.unroll(2):
            pixel[2 * i] = T.reinterpret("int32", picked(halves[2 * i], halves[2 * i + 1], 0x5410))
            pixel[2 * i + 1] = T.reinterpret("int32", picked(halves[2 * i], halves[2 * i + 1], 0x7632))

    @T.inline
    def multiply(w, pixel, taps, sums, p, quad, index):
        taps[T.ramp(0, 1, WORD)] = T.reinterpret(
            f"int32x{WORD}", w[quad * 16 // size, index, T.ramp(quad * 16 % size, 1, 16)]
        )
        for c in T.unroll(WORD):
            sums[p * WORD + c] = dp4a(pixel[c], taps[c], sums[p * WORD + c])

    @T.prim_func
    def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (b, high, wide, channels), dtype)
        w = T.match_buffer(w_, (vectors, words, size), "int8")
        o = T.match_buffer(o_, (vectors * size // 4,), "int32")
        a = T.match_buffer(a_, (2, vectors * size // 4), "float32")
        y = T.match_buffer(y_, (b, out_high, out_wide, channels), output.dtype)
        flat = T.decl_buffer((b * (out_high * out_wide), channels), output.dtype, data=y.data)
        for block in T.thread_binding(T.max((total + _THREADS - 1) // _THREADS, 1), thread="blockIdx.x"):
            for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                lines = T.alloc_buffer((4,), "uint32", scope="local")
                halves = T.alloc_buffer((4,), "uint32", scope="local")
                pixel = T.alloc_buffer((WORD,), "int32", scope="local")
                taps = T.alloc_buffer((WORD,), "int32", scope="local")
                sums = T.alloc_buffer((strip * WORD,), "int32", scope="local")
                starts = T.alloc_buffer((WORD,), "int32", scope="local")
                scales = T.alloc_buffer((WORD,), "float32", scope="local")
                biases = T.alloc_buffer((WORD,), "float32", scope="local")
                at: T.let = block * _THREADS + t
                quad: T.let = at % quads
                start: T.let = at // quads % strips * strip
                line: T.let = at // (quads * strips) % out_high
                image: T.let = at // (quads * strips * out_high)
                if at < total:
                    for i in T.unroll(strip * WORD):
                        sums[i] = 0
                    for group in T.unroll(-(-kernel_high // 4)):
                        for j in T.unroll((strip - 1) * across + (kernel_wide - 1) * spread + 1):
                            gather(
                                x, lines, image, line * down - window.pads[0],
                                start * across - window.pads[1] + j, quad, group,
                            )  # fmt: skip
                            turn(lines, halves, pixel)
                            for p in T.unroll(strip):
                                # Which tap of the window of pixel `p` column `j` is under, if any.
                                tap: T.let = (j - p * across) // spread
                                if tap >= 0 and tap < kernel_wide and p * across + tap * spread == j:
                                    multiply(w, pixel, taps, sums, p, quad, group * kernel_wide + tap)
                    tables(o, a, starts, scales, biases, 0, quad * WORD)
                    for p in T.unroll(strip):
                        if start + p < out_wide:
                            put(
                                sums, p * WORD, starts, scales, biases, 0, flat, flat,
                                (image * out_high + line) * out_wide + start + p, quad * WORD,
                            )  # fmt: skip

    return kernel


def _strip(machine: Gpu, threads: int, out_wide: int) -> int:
    """Pixels of a thread: several share what they read, but not where a GPU would be left idle.

    Args:
        machine: What it is for.
        threads: If each makes one pixel.
        out_wide: Pixels of a line.
    """
    fits = [p for p in (4, 2) if p <= out_wide and threads // p >= _RESIDENT * machine.multiprocessors]
    return fits[0] if fits else 1
