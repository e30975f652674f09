"""Products of float32 activations and a constant matrix, with bias, residual and activation."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._panels import ON_STACK, by_lane
from onnxcomp.targets.tvm.machine import Machine


def tile(machine: Machine) -> tuple[int, int]:
    """Rows and vectors of a block of the output whose sums stay in registers."""
    if machine.registers < 32:
        return 6, 2
    return (12, 2) if machine.lanes >= 16 else (6, 3) if by_lane(machine) else (8, 3)


def width(machine: Machine) -> int:
    """Columns of the output that a panel of the packed weight serves."""
    return tile(machine)[1] * machine.lanes


def packed_shape(machine: Machine, k: int, n: int) -> tuple[int, int, int]:
    """Shape of a packed weight: panels, rows, columns of a panel."""
    return -(-n // width(machine)), k, width(machine)


def pack(machine: Machine, weight: Array) -> Array:
    """Weight of shape (K, N) as panels of columns, the last one filled up with zeros."""
    k, n = weight.shape
    panels, _, columns = packed_shape(machine, k, n)
    wide = np.zeros((k, panels * columns), np.float32)
    wide[:, :n] = weight
    return np.ascontiguousarray(wide.reshape(k, panels, columns).transpose(1, 0, 2))


def pack_bias(machine: Machine, bias: Array | None, n: int) -> Array:
    """Bias of shape (N,), or zeros, filled up to whole panels."""
    panels, _, columns = packed_shape(machine, 0, n)
    wide = np.zeros(panels * columns, np.float32)
    if bias is not None:
        wide[:n] = bias
    return wide


@cache
def gemm(machine: Machine, *, rows: int | None, k: int, n: int, epilogue: Epilogue) -> Any:
    """Kernel `(x (rows, K), weight, bias[, residual (rows, N)], y (rows, N))`, all float32.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        n: Outputs.
        epilogue: What is done to the sums.
    """
    high, vectors = tile(machine)
    lanes, columns = machine.lanes, width(machine)
    panels = packed_shape(machine, k, n)[0]
    last = n - (panels - 1) * columns
    residual = epilogue.residual
    steps = k // lanes if by_lane(machine) else 0
    m = tirx.Var("rows", "int64") if rows is None else rows

    def at(vector: Any) -> Any:
        return T.ramp(vector * lanes, 1, lanes)

    @T.inline
    def block(x, w, b, r, y, row, panel, height, filled):
        sums = T.alloc_buffer((height * vectors * lanes,), "float32", annotations=ON_STACK)
        for i in T.unroll(height * vectors):
            sums[at(i)] = T.broadcast(T.float32(0), lanes)  # with the bias, LLVM would keep sums in memory
        if steps > 0:
            some = T.alloc_buffer((height * lanes,), "float32", annotations=ON_STACK)
            for j in T.serial(steps):
                for i in T.unroll(height):
                    some[at(i)] = x[row + i, at(j)]
                for c in T.unroll(lanes):
                    for i in T.unroll(height):
                        for v in T.unroll(vectors):
                            place = T.meta_var(at(i * vectors + v))
                            factor = T.meta_var(T.broadcast(some[i * lanes + c], lanes))
                            sums[place] = sums[place] + factor * w[panel, j * lanes + c, at(v)]
        for j in T.serial(k - steps * lanes):
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    place = T.meta_var(at(i * vectors + v))
                    factor = T.meta_var(T.broadcast(x[row + i, steps * lanes + j], lanes))
                    sums[place] = sums[place] + factor * w[panel, steps * lanes + j, at(v)]
        for i in T.unroll(height * vectors):
            sums[at(i)] = sums[at(i)] + b[at(panel * vectors + i % vectors)]
        if filled == columns:
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    place = T.meta_var(at(i * vectors + v))
                    if residual:
                        sums[place] = sums[place] + r[row + i, at(panel * vectors + v)]
                    y[row + i, at(panel * vectors + v)] = epilogue(sums[place])
        else:
            line = T.alloc_buffer((columns,), "float32", annotations=ON_STACK)
            for i in T.unroll(height):
                if residual:
                    for c in T.serial(filled):
                        line[c] = r[row + i, panel * columns + c]
                    for v in T.unroll(vectors):
                        sums[at(i * vectors + v)] = sums[at(i * vectors + v)] + line[at(v)]
                for v in T.unroll(vectors):
                    line[at(v)] = epilogue(sums[at(i * vectors + v)])
                for c in T.serial(filled):
                    y[row + i, panel * columns + c] = line[c]

    @T.inline
    def whole(x, w, b, r, y, m, panel, filled):
        for i in T.serial(m // high):
            block(x, w, b, r, y, i * high, panel, high, filled)
        for i in T.serial(m % high // 4):
            block(x, w, b, r, y, m // high * high + i * 4, panel, 4, filled)
        for i in T.serial(m % high % 4):
            block(x, w, b, r, y, m - m % high % 4 + i, panel, 1, filled)

    @T.inline
    def body(x, w, b, r, y, m):
        if panels > 1:
            for panel in T.parallel(panels - 1):
                whole(x, w, b, r, y, m, panel, columns)
        whole(x, w, b, r, y, m, panels - 1, last)

    if residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), "float32")
            w = T.match_buffer(w_, (panels, k, columns), "float32")
            b = T.match_buffer(b_, (panels * columns,), "float32")
            r = T.match_buffer(r_, (m, n), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            body(x, w, b, r, y, m)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), "float32")
            w = T.match_buffer(w_, (panels, k, columns), "float32")
            b = T.match_buffer(b_, (panels * columns,), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            body(x, w, b, x, y, m)

    return kernel
