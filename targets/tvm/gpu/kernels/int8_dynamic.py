"""Quantization of activations by their range at run time: uint8, one scale for all, as DynamicQuantizeLinear has it."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD, divided, plus
from onnxcomp.targets.tvm.gpu.kernels._int8_values import mapped
from onnxcomp.targets.tvm.gpu.kernels._warp import top_team
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels import int8_dot

_THREADS = 256

_LOADS = 4
"""Loads of 16 bytes that a thread has to make before more blocks start."""


@cache
def value_range(machine: Gpu, *, size: int | None) -> Any:
    """Kernel `(x (size) float32, zero (1), y (2))`: scale and zero point, both float32.

    As on a CPU, the range has `zero`, which is 0, in it, and a range of nothing but zero has the scale 1. NaN is
    left out. Blocks find the extremes of parts, a launch of one block those of all; reading bounds it.
    """
    n = tirx.Var("size", "int64") if size is None else size
    most = 2 * machine.multiprocessors
    blocks = most if size is None else max(1, min(most, -(-size // (_THREADS * WORD * _LOADS))))
    stride = blocks * _THREADS
    left = T.Cast("int32", n % WORD) if size is None else size % WORD

    @T.inline
    def take(ends, value):
        ends[0] = T.max(ends[0], value)
        ends[1] = T.max(ends[1], T.float32(0) - value)

    @T.inline
    def read(x, line, ends, at):
        line[T.ramp(0, 1, WORD)] = x[T.ramp(at * WORD, 1, WORD)]
        for c in T.unroll(WORD):
            take(ends, line[c])

    @T.inline
    def agree(ends, shared, t):
        top_team(ends, 0, t, shared, _THREADS)
        top_team(ends, 1, t, shared, _THREADS)

    @T.prim_func
    def kernel(x_: T.handle, z_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), "float32")
        z = T.match_buffer(z_, (1,), "float32")
        y = T.match_buffer(y_, (2,), "float32")
        part = T.alloc_buffer((blocks, 2), "float32")
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                shared = T.alloc_buffer((_THREADS // WARP,), "float32", scope="shared")
                ends = T.alloc_buffer((2,), "float32", scope="local")
                line = T.alloc_buffer((WORD,), "float32", scope="local")
                ends[0] = z[0]
                ends[1] = T.float32(0) - z[0]
                for i in T.serial((n // WORD + stride - 1) // stride):
                    if i * stride + block * _THREADS + t < n // WORD:
                        read(x, line, ends, i * stride + block * _THREADS + t)
                if block == 0 and t < left:
                    take(ends, x[n - left + t])
                agree(ends, shared, t)
                if t == 0:
                    part[block, 0] = ends[0]
                    part[block, 1] = ends[1]
        for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
            shared = T.alloc_buffer((_THREADS // WARP,), "float32", scope="shared")
            ends = T.alloc_buffer((2,), "float32", scope="local")
            scale = T.alloc_buffer((1,), "float32", scope="local")
            ends[0] = z[0]
            ends[1] = T.float32(0) - z[0]
            for i in T.serial(-(-blocks // _THREADS)):
                if i * _THREADS + t < blocks:
                    ends[0] = T.max(ends[0], part[i * _THREADS + t, 0])
                    ends[1] = T.max(ends[1], part[i * _THREADS + t, 1])
            agree(ends, shared, t)
            if t == 0:
                # The second one is the least of all, negated.
                scale[0] = divided(plus(ends[0], ends[1]), T.float32(255))
                if ends[0] + ends[1] == T.float32(0):
                    scale[0] = T.float32(1)
                y[0] = scale[0]
                y[1] = _nearest(T.min(T.max(plus(z[0], divided(ends[1], scale[0])), T.float32(0)), T.float32(255)))

    return kernel


@cache
def quantize(machine: Gpu, *, size: int | None) -> Any:
    """Kernel `(x (size) float32, parameters (2), y (size) uint8)`, the parameters those of `value_range`."""

    def code(x: Any, parameters: Any) -> Any:
        found = plus(_nearest(divided(x, parameters[0])), parameters[1])
        return T.Cast("int32", T.min(T.max(found, T.float32(0)), T.float32(255)))

    return mapped(size, "float32", "uint8", code, other=("float32", 2))


@cache
def offset(machine: Gpu, *, columns: int) -> Any:
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
        totals = T.match_buffer(t_, (columns,), "int32")
        y = T.match_buffer(y_, (columns,), "int32")
        for block in T.thread_binding(-(-columns // _THREADS), thread="blockIdx.x"):
            for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + t
                if i < columns:
                    y[i] = totals[i] * (-shift - T.Cast("int32", p[1]))

    return kernel


@cache
def affine(machine: Gpu, *, columns: int) -> Any:
    """Kernel `(parameters (2), affine (2, columns), y (2, columns))`: scales of sums, and the bias as it is."""

    @T.prim_func
    def kernel(p_: T.handle, a_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        p = T.match_buffer(p_, (2,), "float32")
        a = T.match_buffer(a_, (2, columns), "float32")
        y = T.match_buffer(y_, (2, columns), "float32")
        for block in T.thread_binding(-(-columns // _THREADS), thread="blockIdx.x"):
            for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + t
                if i < columns:
                    y[0, i] = a[0, i] * p[0]
                    y[1, i] = a[1, i]

    return kernel


def _nearest(x: Any) -> Any:
    """The nearest integer, halves to even, as a float."""
    return T.call_pure_extern("float32", "rintf", x)
