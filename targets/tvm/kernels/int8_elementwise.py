"""Ops of 8-bit codes, value by value, and means of images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._rows import over_rows
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats, quantized, rounded
from onnxcomp.targets.tvm.machine import Machine

_CHUNK = 128
"""Vectors that a thread takes at a time."""


@cache
def quantize(machine: Machine, *, size: int | None, codes: Codes) -> Any:
    """Kernel `(x (size) float32, scale (1), y (size))`: `round(x / scale) + zero`, halves to even."""
    return _mapped(machine, size, "float32", codes.dtype, lambda x, scale: quantized(x / scale, codes))


@cache
def dequantize(machine: Machine, *, size: int | None, dtype: str, zero: int) -> Any:
    """Kernel `(x (size), scale (1), y (size) float32)`: `(x - zero) * scale`."""

    def value(x: Any, scale: Any) -> Any:
        return (_float(x) - vm.like(scale, float(zero))) * scale

    return _mapped(machine, size, dtype, "float32", value)


@cache
def table(machine: Machine, *, size: int | None, dtype: str, out: str) -> Any:
    """Kernel `(x (size), table (256), y (size))`: the entry for each byte, taken as unsigned."""
    n = tirx.Var("size", "int64") if size is None else size
    chunk = _CHUNK * 16

    @T.prim_func
    def kernel(x_: T.handle, t_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), dtype)
        t = T.match_buffer(t_, (256,), out)
        y = T.match_buffer(y_, (n,), out)
        for i in over_rows(n, 1)(n // chunk):
            for j in T.serial(chunk):
                y[i * chunk + j] = t[T.Cast("int32", T.reinterpret("uint8", x[i * chunk + j]))]
        for j in T.serial(n % chunk):
            y[n - n % chunk + j] = t[T.Cast("int32", T.reinterpret("uint8", x[n - n % chunk + j]))]

    return kernel


@cache
def add(
    machine: Machine, *, size: int | None, dtype: str, ratios: tuple[float, float], offset: float, codes: Codes
) -> Any:
    """Kernel `(a (size), b (size), y (size))`: `round(a * ratios[0] + b * ratios[1] + offset)`."""

    def total(a: Any, b: Any) -> Any:
        x, y = _float(a), _float(b)
        return _rounded(x * vm.like(x, ratios[0]) + (y * vm.like(x, ratios[1]) + vm.like(x, offset)), codes)

    return _mapped(machine, size, dtype, codes.dtype, total, pair=True)


@cache
def multiply(
    machine: Machine, *, size: int | None, dtype: str, zeros: tuple[int, int], scale: float, codes: Codes
) -> Any:
    """Kernel `(a (size), b (size), y (size))`: `round((a - zeros[0]) * (b - zeros[1]) * scale + zero)`."""

    def product(a: Any, b: Any) -> Any:
        x, y = _float(a), _float(b)
        found = (x - vm.like(x, float(zeros[0]))) * (y - vm.like(x, float(zeros[1]))) * vm.like(x, scale)
        # Between product and sum stands a clamp, so that they do not become one instruction that rounds once.
        found = T.min(T.max(found, vm.like(x, -1024.0)), vm.like(x, 1024.0))
        return _rounded(found + vm.like(x, float(codes.zero)), codes)

    return _mapped(machine, size, dtype, codes.dtype, product, pair=True)


@cache
def mean(
    machine: Machine,
    *,
    batch: int | None,
    pixels: int,
    channels: int,
    dtype: str,
    zero: int,
    output: Codes | Floats,
) -> Any:
    """Kernel `(x (B, pixels, C), scale (1), y (B, C))`: of the sum over pixels, less the zero point, times scale."""
    lanes = int8_dot.lanes(machine)
    b = tirx.Var("batch", "int64") if batch is None else batch
    vectors, left = divmod(channels, lanes)

    def many(kind: str, count: int) -> str:
        return f"{kind}x{count}" if count > 1 else kind

    def run(start: Any, count: int) -> Any:
        return T.ramp(start, 1, count) if count > 1 else start

    def affine(s: Any, count: int) -> Any:
        return lambda row: tirx.const(0.0, many("float32", count)) if row else spread(s[0], count)

    def spread(value: Any, count: int) -> Any:
        return T.broadcast(value, count) if count > 1 else value

    @T.inline
    def column(x, s, y, image, channel, count):
        total = T.alloc_buffer((1,), many("int32", count), scope="local")
        total[0] = tirx.const(-zero * pixels, many("int32", count))
        for i in T.serial(pixels):
            total[0] = total[0] + T.Cast(many("int32", count), x[image, i, run(channel, count)])
        y[image, run(channel, count)] = output(total[0], affine(s, count))

    @T.prim_func
    def kernel(x_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (b, pixels, channels), dtype)
        s = T.match_buffer(s_, (1,), "float32")
        y = T.match_buffer(y_, (b, channels), output.dtype)
        for image in over_rows(b, pixels * channels)(b):
            for vector in T.serial(vectors):
                column(x, s, y, image, vector * lanes, lanes)
            for c in T.serial(left):
                column(x, s, y, image, vectors * lanes + c, 1)

    return kernel


def _float(x: Any) -> Any:
    lanes = x.ty.dtype.lanes if hasattr(x.ty.dtype, "lanes") else 1
    return T.Cast(f"float32x{lanes}" if lanes > 1 else "float32", x)


def _rounded(x: Any, codes: Codes) -> Any:
    """Codes of float32 values that the zero point was added to."""
    integers = rounded(T.min(T.max(x, vm.like(x, float(codes.low))), vm.like(x, float(codes.high))))
    return T.Cast(str(integers.ty.dtype).replace("int32", codes.dtype), integers)


def _mapped(
    machine: Machine, size: int | None, dtype: str, out: str, function: Callable[..., Any], *, pair: bool = False
) -> Any:
    """Kernel that applies `function` to vectors and to single values of `a`, and of `b`: as long, or one scale."""
    lanes = machine.lanes
    n = tirx.Var("size", "int64") if size is None else size
    chunk = _CHUNK * lanes
    others = (dtype, n) if pair else ("float32", 1)

    def other(b: Any, at: Any, count: int) -> Any:
        return b[at] if pair else T.broadcast(b[0], count) if count > 1 else b[0]

    @T.inline
    def apply(a, b, y, at, count):
        y[at] = function(a[at], other(b, at, count))

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (n,), dtype)
        b = T.match_buffer(b_, (others[1],), others[0])
        y = T.match_buffer(y_, (n,), out)
        for i in over_rows(n, 1)(n // chunk):
            for j in T.serial(_CHUNK):
                apply(a, b, y, T.ramp(i * chunk + j * lanes, 1, lanes), lanes)
        for j in T.serial(n % chunk // lanes):
            apply(a, b, y, T.ramp(n - n % chunk + j * lanes, 1, lanes), lanes)
        for j in T.serial(n % lanes):
            apply(a, b, y, n - n % lanes + j, 1)

    return kernel
