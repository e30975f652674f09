"""Ops of 8-bit codes, value by value, and means of images. Rounding is that of the kernels for CPUs, step for step."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._int8_output import divided, fused, plus, quantized, rounded, times, value
from onnxcomp.targets.tvm.gpu.kernels._int8_values import mapped
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

_WARPS = 8
"""Warps that share the pixels of an image."""


@cache
def quantize(machine: Gpu, *, size: int | None, codes: Codes) -> Any:
    """Kernel `(x (size) float32, scale (1), y (size))`: `round(x / scale) + zero`, halves to even."""

    def code(x: Any, scale: Any) -> Any:
        return quantized(divided(x, scale[0]), codes)

    return mapped(size, "float32", codes.dtype, code, other=("float32", 1))


@cache
def dequantize(machine: Gpu, *, size: int | None, dtype: str, zero: int) -> Any:
    """Kernel `(x (size), scale (1), y (size) float32)`: `(x - zero) * scale`."""

    def number(x: Any, scale: Any) -> Any:
        return times(T.Cast("float32", x - zero), scale[0])

    return mapped(size, dtype, "float32", number, other=("float32", 1))


@cache
def table(machine: Gpu, *, size: int | None, dtype: str, out: str) -> Any:
    """Kernel `(x (size), table (256), y (size))`: the entry for each byte, taken as unsigned.

    The table is two lines of the cache.
    """

    def entry(x: Any, entries: Any) -> Any:
        return T.Cast("int32", entries[T.bitwise_and(x, T.int32(255))])

    return mapped(size, dtype, out, entry, other=(out, 256))


@cache
def add(machine: Gpu, *, size: int | None, dtype: str, ratios: tuple[float, float], offset: float, codes: Codes) -> Any:
    """Kernel `(a (size), b (size), y (size))`: `round(a * ratios[0] + b * ratios[1] + offset)`."""

    def total(a: Any, b: Any) -> Any:
        second = fused(T.Cast("float32", b), T.float32(ratios[1]), T.float32(offset))
        return _kept(fused(T.Cast("float32", a), T.float32(ratios[0]), second), codes)

    return mapped(size, dtype, codes.dtype, total)


@cache
def multiply(machine: Gpu, *, size: int | None, dtype: str, zeros: tuple[int, int], scale: float, codes: Codes) -> Any:
    """Kernel `(a (size), b (size), y (size))`: `round((a - zeros[0]) * (b - zeros[1]) * scale + zero)`."""

    def product(a: Any, b: Any) -> Any:
        exact = T.Cast("float32", (a - zeros[0]) * (b - zeros[1]))
        return _kept(plus(times(exact, T.float32(scale)), T.float32(codes.zero)), codes)

    return mapped(size, dtype, codes.dtype, product)


@cache
def mean(
    machine: Gpu,
    *,
    batch: int | None,
    pixels: int,
    channels: int,
    dtype: str,
    zero: int,
    output: Codes | Floats,
) -> Any:
    """Kernel `(x (B, pixels, C), scale (1), y (B, C))`: of the sum over pixels, less the zero point, times scale.

    A block sums 32 channels, each warp every eighth pixel: it reads 32 bytes at a time, which memory is read by.
    """
    b = tirx.Var("batch", "int64") if batch is None else batch
    images = T.Cast("int32", b) if batch is None else batch

    @T.prim_func
    def kernel(x_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (b, pixels, channels), dtype)
        s = T.match_buffer(s_, (1,), "float32")
        y = T.match_buffer(y_, (b, channels), output.dtype)
        for image in T.thread_binding(T.max(images, 1), thread="blockIdx.x"):
            for chunk in T.thread_binding(-(-channels // WARP), thread="blockIdx.y"):
                for t in T.thread_binding(_WARPS * WARP, thread="threadIdx.x"):
                    parts = T.alloc_buffer((_WARPS * WARP,), "int32", scope="shared")
                    total = T.alloc_buffer((1,), "int32", scope="local")
                    channel: T.let = chunk * WARP + t % WARP
                    total[0] = 0
                    if image < images and channel < channels:
                        for i in T.serial(-(-pixels // _WARPS)):
                            if i * _WARPS + t // WARP < pixels:
                                total[0] = total[0] + T.Cast("int32", x[image, i * _WARPS + t // WARP, channel])
                    parts[t] = total[0]
                    T.tvm_storage_sync("shared")
                    if t < WARP and image < images and channel < channels:
                        total[0] = -zero * pixels
                        for i in T.unroll(_WARPS):
                            total[0] = total[0] + parts[i * WARP + t]
                        y[image, channel] = T.Cast(output.dtype, value(total[0], s[0], T.float32(0), None, output))

    return kernel


def _kept(x: Any, codes: Codes) -> Any:
    """Code, as an int32, of a float32 expression that the zero point was added to."""
    return rounded(T.min(T.max(x, T.float32(codes.low)), T.float32(codes.high)))
