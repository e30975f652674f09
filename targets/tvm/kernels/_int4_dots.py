"""Dot products of rows of 4-bit integers and one vector of floats, by VPDPBUSD.

The vector is made fixed-point: each 32 values share a step, and a value is an integer of 24 bits in three bytes. So the
products lose no more than those of floats do, and take half of the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.ops import GROUP
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._prefetch import fetch
from onnxcomp.targets.tvm.kernels.int4 import int4_columns, int4_shape
from onnxcomp.targets.tvm.machine import Machine

_AHEAD = 8
"""Rows until the one whose weights are asked for."""

_BYTES = 3
"""Of a fixed-point value, the highest first."""

_MOST = 8e6
"""The largest fixed-point value: three signed bytes hold a little more."""

_TINY = 1e-30
"""The largest value of a group that counts as zero; below, there may be no finite inverse of a step."""

_INFINITY = 0x7F800000


def has_dots(machine: Machine) -> bool:
    """Whether a machine has the instruction."""
    return machine.dot in ("vnni512", "vnni256")


def pack_int4_rows(machine: Machine, weight: Array) -> Array:
    """4-bit integers in the order that they have, in whole vectors: of two that share a byte, the even one is lower.

    Args:
        machine: What for.
        weight: uint8 (R, C/2), low bits first.

    Returns:
        int32, see `int4.int4_shape`.
    """
    rows, vectors, lanes = int4_shape(machine, len(weight), 2 * weight.shape[1])
    padded = np.pad(weight, [(0, 0), (0, 4 * vectors * lanes - weight.shape[1])])
    return padded.view(np.int32).reshape(rows, vectors, lanes)


def int4_dots(machine: Machine, *, rows: int | None, k: int, f: int, scale: str, zeros: bool) -> Any:
    """Kernel of `gated_mlp.neurons_int4`, of weights as `pack_int4_rows` packs them; the arguments are the same."""
    lanes = machine.lanes
    vectors, groups = int4_shape(machine, f, k)[1], k // GROUP
    own = int4_columns(machine) // GROUP  # groups of a vector
    m = tirx.Var("rows", "int64") if rows is None else rows
    floats, words, size = f"float32x{lanes}", f"int32x{lanes}", 4 * lanes
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"

    def word(value):
        return T.broadcast(T.int32(value), lanes)

    def dot(total, unsigned, signed):
        return T.call_llvm_pure_intrin(words, name, total, T.reinterpret(f"int8x{size}", unsigned), signed)

    def spread(few):  # of the groups of a vector, each to its lanes
        times = lanes // own
        return tirx.Shuffle([few] * times, [i // times for i in range(lanes)])

    @T.inline
    def fixed(x, parts, steps, sums, row):
        for i in T.serial(vectors * _BYTES * 2 * size):
            parts[i] = T.int8(0)
        for g in T.serial(groups):
            most = T.alloc_buffer((1,), "int32")
            total = T.alloc_buffer((1,), "int32")
            most[0] = 0
            total[0] = 0
            for i in T.serial(GROUP):
                bits: T.let = T.reinterpret("int32", x[row, g * GROUP + i])
                most[0] = T.max(most[0], T.bitwise_and(bits, T.int32(0x7FFFFFFF)))
            finite: T.let = most[0] < _INFINITY
            largest: T.let = T.reinterpret("float32", most[0])
            inverse: T.let = T.Select(
                T.bitwise_and(finite, largest > T.float32(_TINY)), T.float32(_MOST) / largest, T.float32(0)
            )
            # What is not finite makes its step, and so all sums, NaN.
            steps[g] = T.Select(finite, largest * T.float32(1 / _MOST), T.reinterpret("float32", T.int32(0x7FC00000)))
            first: T.let = g // own * (_BYTES * 2 * size) + g % own * (GROUP // 2)
            for i in T.serial(GROUP // 2):
                for half in T.unroll(2):
                    scaled: T.let = T.Select(finite, x[row, g * GROUP + 2 * i + half] * inverse, T.float32(0))
                    value: T.let = T.Cast("int32", T.nearbyint(scaled))
                    total[0] = total[0] + value
                    low: T.let = T.Cast("int8", value)
                    above: T.let = T.shift_right(value - T.Cast("int32", low), 8)
                    middle: T.let = T.Cast("int8", above)
                    high: T.let = T.shift_right(above - T.Cast("int32", middle), 8)
                    parts[first + half * size + i] = T.Cast("int8", high)
                    parts[first + (2 + half) * size + i] = middle
                    parts[first + (4 + half) * size + i] = low
            sums[g] = T.Cast("float32", total[0]) * steps[g]

    @T.inline
    def product(up, parts, factor, sums, at, ahead, j):
        fetch(up[ahead, j, 0])
        pairs: T.let = up[at, j, T.ramp(0, 1, lanes)]
        even: T.let = T.bitwise_and(pairs, word(0x0F0F0F0F))
        odd: T.let = T.bitwise_and(T.shift_right(pairs, word(4)), word(0x0F0F0F0F))
        total = T.alloc_buffer((lanes,), "int32")
        lane = T.meta_var(T.ramp(0, 1, lanes))
        total[lane] = word(0)
        for b in T.unroll(_BYTES):
            place = T.meta_var((j * _BYTES + b) * 2 * size)
            total[lane] = dot(T.shift_left(total[lane], word(8)), even, parts[T.ramp(place, 1, size)])
            total[lane] = dot(total[lane], odd, parts[T.ramp(place + size, 1, size)])
        each: T.let = spread(factor[T.ramp(j * own, 1, own)])
        sums[lane] = sums[lane] + T.Cast(floats, total[lane]) * each

    @T.prim_func
    def kernel(
        g_: T.handle, p_: T.handle, c_: T.handle, x_: T.handle, u_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        gates = T.match_buffer(g_, (m, f), "float32")
        places = T.match_buffer(p_, (m, f), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        x = T.match_buffer(x_, (m, k), "float32")
        up = T.match_buffer(u_, (f, vectors, lanes), "int32")
        scale_ = T.match_buffer(s_, (f, groups), scale)
        zero = T.match_buffer(z_, (f, groups) if zeros else (1,), "uint8")
        y = T.match_buffer(y_, (m, f), "float32")
        parts = T.alloc_buffer((vectors * _BYTES * 2 * size,), "int8")
        steps = T.alloc_buffer((groups,), "float32")
        sums_of_x = T.alloc_buffer((groups,), "float32")
        for row in T.serial(m):
            fixed(x, parts, steps, sums_of_x, row)
            for i in T.parallel(counts[row]):
                factor = T.alloc_buffer((vectors * own,), "float32")
                sums = T.alloc_buffer((lanes,), "float32")
                rest = T.alloc_buffer((1,), "float32")
                at: T.let = T.Cast("int64", places[row, i])
                ahead: T.let = T.Cast("int64", places[row, T.min(i + _AHEAD, counts[row] - 1)])
                sums[T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                rest[0] = T.float32(0)
                if zeros:
                    fetch(zero[ahead, 0])
                # Factors, and what the zero points have added.
                for v in T.serial(groups // lanes):
                    g = T.meta_var(T.ramp(v * lanes, 1, lanes))
                    fetch(scale_[ahead, v * lanes])
                    own_scale: T.let = T.Cast(floats, scale_[at, g])
                    factor[g] = own_scale * steps[g]
                    sums[T.ramp(0, 1, lanes)] = sums[T.ramp(0, 1, lanes)] - own_scale * sums_of_x[g] * (
                        T.Cast(floats, zero[at, g]) if zeros else T.broadcast(T.Cast("float32", zero[0]), lanes)
                    )
                for g_of_rest in T.serial(groups % lanes):
                    g = T.meta_var(groups // lanes * lanes + g_of_rest)
                    last: T.let = T.Cast("float32", scale_[at, g])
                    factor[g] = last * steps[g]
                    rest[0] = rest[0] - last * sums_of_x[g] * T.Cast("float32", zero[at, g] if zeros else zero[0])
                for g in T.serial(vectors * own - groups):
                    factor[groups + g] = T.float32(0)
                for j in T.serial(vectors):
                    product(up, parts, factor, sums, at, ahead, j)
                y[row, i] = gates[row, i] * (vm.total(sums[T.ramp(0, 1, lanes)]) + rest[0])

    return kernel
