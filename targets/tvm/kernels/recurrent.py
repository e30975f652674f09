"""All steps of a GRU or an LSTM, given the products of its inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.machine import Machine

GATES = {"GRU": 3, "LSTM": 4}
"""Gates of a cell: z, r, h, or i, o, f, c."""

_VECTORS = 2
"""Vectors of a panel of the weight."""

_TOGETHER = 4
"""Sequences that read a weight together."""


def panels(machine: Machine, units: int) -> int:
    """Panels of a gate."""
    return -(-units // (_VECTORS * machine.lanes))


def pack(machine: Machine, weight: Array) -> Array:
    """A recurrent weight of shape (G U, U) as (G, panels, U, columns of a panel), the last panel filled with zeros."""
    units = weight.shape[1]
    wide, count = _VECTORS * machine.lanes, panels(machine, units)
    gates = weight.reshape(-1, units, units).astype(np.float32)
    padded = np.pad(gates, [(0, 0), (0, count * wide - units), (0, 0)])
    return np.ascontiguousarray(padded.reshape(len(gates), count, wide, units).swapaxes(2, 3))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A recurrent layer in one direction.

    Attributes:
        kind: A key of `GATES`.
        steps: Steps, T.
        rows: Sequences, B.
        units: U.
        directions: D, of the layer.
        direction: Which one.
        reverse: The last step comes first.
        linear_before_reset: The reset gate of a GRU multiplies the hidden part of a sum, not the hidden values.
    """

    kind: str
    steps: int
    rows: int
    units: int
    directions: int
    direction: int
    reverse: bool
    linear_before_reset: bool


@cache
def recurrent(machine: Machine, cell: Cell) -> Any:
    """Kernel `(xs (T, B, D G U), h (D, B, U)[, c (D, B, U)], r, x_bias, h_bias (G U,), y (T, B, U), h_last[, c_last])`.

    Args:
        machine: What it is for.
        cell: The layer. `xs` are the products of its inputs; the last states are (B, U).
    """
    kind, steps, rows, units = cell.kind, cell.steps, cell.rows, cell.units
    gates, lanes, which, gru = GATES[kind], machine.lanes, cell.direction, cell.kind == "GRU"
    count, wide = panels(machine, units), _VECTORS * machine.lanes
    columns, first, late = cell.directions * gates * units, which * gates * units, gru and not cell.linear_before_reset

    @T.inline
    def block(h, r, sums, gate, panel, row, height):
        part = T.alloc_buffer((height * wide,), "float32")
        for i in T.unroll(height * _VECTORS):
            part[T.ramp(i * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for j in T.serial(units):
            for i in T.unroll(height):
                for v in T.unroll(_VECTORS):
                    c = T.meta_var(T.ramp(i * wide + v * lanes, 1, lanes))
                    w = T.meta_var(r[gate, panel, j, T.ramp(v * lanes, 1, lanes)])
                    part[c] = part[c] + T.broadcast(h[row + i, j], lanes) * w
        for i in T.unroll(height):
            for v in T.unroll(_VECTORS):
                at = T.meta_var(T.ramp(panel * wide + v * lanes, 1, lanes))
                sums[gate, row + i, at] = part[T.ramp(i * wide + v * lanes, 1, lanes)]

    @T.inline
    def product(h, r, sums, begin, end):
        """Sums of gates `begin` to `end` without biases."""
        for p in T.parallel((end - begin) * count):
            gate: T.let = begin + p // count
            panel: T.let = p % count
            for i in T.serial(rows // _TOGETHER):
                block(h, r, sums, gate, panel, i * _TOGETHER, _TOGETHER)
            for i in T.serial(rows % _TOGETHER):
                block(h, r, sums, gate, panel, rows // _TOGETHER * _TOGETHER + i, 1)

    def of_x(xs, bias, t, row, gate, j):
        return xs[t, row, first + gate * units + j] + bias[gate * units + j]

    def of_h(sums, bias, row, gate, j):
        return sums[gate, row, j] + bias[gate * units + j]

    @T.inline
    def gru_units(xs, p, q, sums, now, kept, y, t, row, j):
        update: T.let = vm.sigmoid(of_x(xs, p, t, row, 0, j) + of_h(sums, q, row, 0, j))
        if late:
            # Hidden values times reset gates are in `kept`, and their products in the sums by now.
            fresh: T.let = vm.tanh(of_x(xs, p, t, row, 2, j) + of_h(sums, q, row, 2, j))
            y[t, row, j] = (vm.like(update, 1.0) - update) * fresh + update * now[row, j]
        else:
            reset: T.let = vm.sigmoid(of_x(xs, p, t, row, 1, j) + of_h(sums, q, row, 1, j))
            fresh_: T.let = vm.tanh(of_x(xs, p, t, row, 2, j) + reset * of_h(sums, q, row, 2, j))
            y[t, row, j] = (vm.like(update, 1.0) - update) * fresh_ + update * now[row, j]

    @T.inline
    def reset_units(xs, p, q, sums, now, kept, y, t, row, j):
        kept[row, j] = vm.sigmoid(of_x(xs, p, t, row, 1, j) + of_h(sums, q, row, 1, j)) * now[row, j]

    @T.inline
    def lstm_units(xs, p, q, sums, now, kept, y, t, row, j):
        i: T.let = vm.sigmoid(of_x(xs, p, t, row, 0, j) + of_h(sums, q, row, 0, j))
        o: T.let = vm.sigmoid(of_x(xs, p, t, row, 1, j) + of_h(sums, q, row, 1, j))
        f: T.let = vm.sigmoid(of_x(xs, p, t, row, 2, j) + of_h(sums, q, row, 2, j))
        c: T.let = vm.tanh(of_x(xs, p, t, row, 3, j) + of_h(sums, q, row, 3, j))
        kept[row, j] = f * kept[row, j] + i * c
        y[t, row, j] = o * vm.tanh(kept[row, j])

    @T.inline
    def each(one, xs, p, q, sums, now, kept, y, t):
        for row in T.serial(rows):
            for j in T.serial(units // lanes):
                one(xs, p, q, sums, now, kept, y, t, row, T.ramp(j * lanes, 1, lanes))
            for j in T.serial(units % lanes):
                one(xs, p, q, sums, now, kept, y, t, row, units // lanes * lanes + j)

    @T.inline
    def body(xs, h, r, p, q, y, last, sums, now, kept):
        for row in T.serial(rows):
            for j in T.serial(units):
                now[row, j] = h[which, row, j]
        for step in T.serial(steps):
            t: T.let = steps - 1 - step if cell.reverse else step
            product(now, r, sums, 0, 2 if late else gates)
            if late:
                each(reset_units, xs, p, q, sums, now, kept, y, t)
                product(kept, r, sums, 2, 3)
            each(gru_units if gru else lstm_units, xs, p, q, sums, now, kept, y, t)
            for row in T.serial(rows):
                for j in T.serial(units):
                    now[row, j] = y[t, row, j]
        for row in T.serial(rows):
            for j in T.serial(units):
                last[row, j] = now[row, j]

    if gru:

        @T.prim_func
        def kernel(
            x_: T.handle, h_: T.handle, r_: T.handle, p_: T.handle, q_: T.handle, y_: T.handle, l_: T.handle
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            xs = T.match_buffer(x_, (steps, rows, columns), "float32")
            h = T.match_buffer(h_, (cell.directions, rows, units), "float32")
            r = T.match_buffer(r_, (gates, count, units, wide), "float32")
            p = T.match_buffer(p_, (gates * units,), "float32")
            q = T.match_buffer(q_, (gates * units,), "float32")
            y = T.match_buffer(y_, (steps, rows, units), "float32")
            last = T.match_buffer(l_, (rows, units), "float32")
            sums = T.alloc_buffer((gates, rows, count * wide), "float32")
            now = T.alloc_buffer((rows, units), "float32")
            kept = T.alloc_buffer((rows, units), "float32")
            body(xs, h, r, p, q, y, last, sums, now, kept)

    else:

        @T.prim_func
        def kernel(
            x_: T.handle, h_: T.handle, c_: T.handle, r_: T.handle, p_: T.handle, q_: T.handle, y_: T.handle,
            l_: T.handle, d_: T.handle,
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            xs = T.match_buffer(x_, (steps, rows, columns), "float32")
            h = T.match_buffer(h_, (cell.directions, rows, units), "float32")
            c = T.match_buffer(c_, (cell.directions, rows, units), "float32")
            r = T.match_buffer(r_, (gates, count, units, wide), "float32")
            p = T.match_buffer(p_, (gates * units,), "float32")
            q = T.match_buffer(q_, (gates * units,), "float32")
            y = T.match_buffer(y_, (steps, rows, units), "float32")
            last = T.match_buffer(l_, (rows, units), "float32")
            kept = T.match_buffer(d_, (rows, units), "float32")
            sums = T.alloc_buffer((gates, rows, count * wide), "float32")
            now = T.alloc_buffer((rows, units), "float32")
            for row in T.serial(rows):
                for j in T.serial(units):
                    kept[row, j] = c[which, row, j]
            body(xs, h, r, p, q, y, last, sums, now, kept)

    return kernel
