"""Quantization of activations by their range at run time: uint8, one scale for all, as DynamicQuantizeLinear has it."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.machine import Machine

_CHAINS = 4
"""Vectors of running extremes, so that one need not wait for the one before."""


@cache
def value_range(machine: Machine, *, size: int | None) -> Any:
    """Kernel `(x (size) float32, zero (1), y (2))`: scale and zero point, both float32.

    The range has `zero`, which is 0, in it. A range of nothing but zero has the scale 1.
    """
    lanes = machine.lanes
    n = tirx.Var("size", "int64") if size is None else size
    step = lanes * _CHAINS
    vector = f"float32x{lanes}"

    @T.prim_func
    def kernel(x_: T.handle, z_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), "float32")
        z = T.match_buffer(z_, (1,), "float32")
        y = T.match_buffer(y_, (2,), "float32")
        least = T.alloc_buffer((_CHAINS,), vector, scope="local")
        most = T.alloc_buffer((_CHAINS,), vector, scope="local")
        line = T.alloc_buffer((lanes,), "float32", scope="local")
        ends = T.alloc_buffer((2,), "float32", scope="local")
        for c in T.unroll(_CHAINS):
            least[c] = T.broadcast(z[0], lanes)
            most[c] = T.broadcast(z[0], lanes)
        for i in T.serial(n // step):
            for c in T.unroll(_CHAINS):
                least[c] = T.min(least[c], x[T.ramp(i * step + c * lanes, 1, lanes)])
                most[c] = T.max(most[c], x[T.ramp(i * step + c * lanes, 1, lanes)])
        ends[0] = z[0]
        ends[1] = z[0]
        for c in T.unroll(_CHAINS):
            line[T.ramp(0, 1, lanes)] = least[c]
            for i in T.serial(lanes):
                ends[0] = T.min(ends[0], line[i])
            line[T.ramp(0, 1, lanes)] = most[c]
            for i in T.serial(lanes):
                ends[1] = T.max(ends[1], line[i])
        for i in T.serial(n % step):
            ends[0] = T.min(ends[0], x[n - n % step + i])
            ends[1] = T.max(ends[1], x[n - n % step + i])
        y[0] = T.Select(ends[1] == ends[0], T.float32(1), (ends[1] - ends[0]) / T.float32(255))
        y[1] = T.nearbyint(T.min(T.max(z[0] - ends[0] / y[0], T.float32(0)), T.float32(255)))

    return kernel


@cache
def quantize(machine: Machine, *, size: int | None) -> Any:
    """Kernel `(x (size) float32, parameters (2), y (size) uint8)`, the parameters those of `value_range`."""
    lanes = machine.lanes
    n = tirx.Var("size", "int64") if size is None else size

    def code(x: Any, scale: Any, zero: Any, suffix: str) -> Any:
        least, most = tirx.const(0.0, f"float32{suffix}"), tirx.const(255.0, f"float32{suffix}")
        found = T.min(T.max(T.nearbyint(x / scale) + zero, least), most)
        return T.Cast(f"uint8{suffix}", T.Cast(f"int32{suffix}", found))

    @T.prim_func
    def kernel(x_: T.handle, p_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), "float32")
        p = T.match_buffer(p_, (2,), "float32")
        y = T.match_buffer(y_, (n,), "uint8")
        for i in T.serial(n // lanes):
            y[T.ramp(i * lanes, 1, lanes)] = code(
                x[T.ramp(i * lanes, 1, lanes)], T.broadcast(p[0], lanes), T.broadcast(p[1], lanes), f"x{lanes}"
            )
        for i in T.serial(n % lanes):
            y[n - n % lanes + i] = code(x[n - n % lanes + i], p[0], p[1], "")

    return kernel


@cache
def offset(machine: Machine, *, columns: int) -> Any:
    """Kernel `(parameters (2), totals (columns) int32, y (columns) int32)`: what sums start from.

    Args:
        machine: What it is for.
        columns: Columns of the weight, in whole panels; `totals` are its sums over rows.
    """
    shift = int8_dot.zero_point(machine, "uint8", 0)

    @T.prim_func
    def kernel(p_: T.handle, t_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        p = T.match_buffer(p_, (2,), "float32")
        t = T.match_buffer(t_, (columns,), "int32")
        y = T.match_buffer(y_, (columns,), "int32")
        for i in T.serial(columns):
            y[i] = t[i] * (-shift - T.Cast("int32", p[1]))

    return kernel


@cache
def affine(machine: Machine, *, columns: int) -> Any:
    """Kernel `(parameters (2), affine (2, columns), y (2, columns))`: scales of sums, and the bias as it is."""

    @T.prim_func
    def kernel(p_: T.handle, a_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        p = T.match_buffer(p_, (2,), "float32")
        a = T.match_buffer(a_, (2, columns), "float32")
        y = T.match_buffer(y_, (2, columns), "float32")
        for i in T.serial(columns):
            y[0, i] = a[0, i] * p[0]
        for i in T.serial(columns):
            y[1, i] = a[1, i]

    return kernel
