"""The gates of a GRU and an LSTM, given their sums: a unit a thread."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._scalar import sigmoid
from onnxcomp.targets.tvm.gpu.machine import Gpu

_THREADS = 128


@cache
def gru(machine: Gpu, *, rows: int | None, units: int) -> Any:
    """Kernel `(x_sums (rows, 3 U), h_sums (rows, 3 U), x_bias (3 U,), h_bias (3 U,), h (rows, U), y (rows, U))`.

    Sums are in the order z, r, h; the reset gate multiplies the hidden part of the last (`linear_before_reset`).

    Args:
        machine: What it is for.
        rows: Sequences; None for any number.
        units: U.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows

    @T.inline
    def at(a, b, p, q, h, y, row, j):
        xs = T.meta_var([a[row, g * units + j] + p[g * units + j] for g in range(3)])
        hs = T.meta_var([b[row, g * units + j] + q[g * units + j] for g in range(3)])
        update: T.let = sigmoid(xs[0] + hs[0])
        reset: T.let = sigmoid(xs[1] + hs[1])
        fresh: T.let = T.tanh(xs[2] + reset * hs[2])
        y[row, j] = (T.float32(1) - update) * fresh + update * h[row, j]

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, p_: T.handle, q_: T.handle, h_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (m, 3 * units), "float32")
        b = T.match_buffer(b_, (m, 3 * units), "float32")
        p = T.match_buffer(p_, (3 * units,), "float32")
        q = T.match_buffer(q_, (3 * units,), "float32")
        h = T.match_buffer(h_, (m, units), "float32")
        y = T.match_buffer(y_, (m, units), "float32")
        for block in T.thread_binding(T.max((m * units + _THREADS - 1) // _THREADS, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < m * units:
                    at(a, b, p, q, h, y, i // units, i % units)

    return kernel


@cache
def lstm(machine: Gpu, *, rows: int | None, units: int) -> Any:
    """Kernel `(x_sums, h_sums (rows, 4 U), bias (4 U,), c (rows, U), y, cell (rows, U), total (rows, 4 U))`.

    Sums are in the order i, o, f, c; their total is put out for the next step.

    Args:
        machine: What it is for.
        rows: Sequences; None for any number.
        units: U.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows

    @T.inline
    def at(a, b, p, c, y, cell, total, row, j):
        sums = T.alloc_buffer((4,), "float32", scope="local")
        for g in T.unroll(4):
            sums[g] = a[row, g * units + j] + b[row, g * units + j]
            total[row, g * units + j] = sums[g]
            sums[g] = sums[g] + p[g * units + j]
        now: T.let = sigmoid(sums[2]) * c[row, j] + sigmoid(sums[0]) * T.tanh(sums[3])
        cell[row, j] = now
        y[row, j] = sigmoid(sums[1]) * T.tanh(now)

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, p_: T.handle, c_: T.handle, y_: T.handle, d_: T.handle, t_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (m, 4 * units), "float32")
        b = T.match_buffer(b_, (m, 4 * units), "float32")
        p = T.match_buffer(p_, (4 * units,), "float32")
        c = T.match_buffer(c_, (m, units), "float32")
        y = T.match_buffer(y_, (m, units), "float32")
        cell = T.match_buffer(d_, (m, units), "float32")
        total = T.match_buffer(t_, (m, 4 * units), "float32")
        for block in T.thread_binding(T.max((m * units + _THREADS - 1) // _THREADS, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < m * units:
                    at(a, b, p, c, y, cell, total, i // units, i % units)

    return kernel
