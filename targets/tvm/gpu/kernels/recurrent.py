"""All steps of a GRU or an LSTM, given the products of its inputs.

A step has to wait for all of the one before. Where a block has threads enough for all units, it takes all steps of some
sequences, with barriers between them; else every step is a launch, with as narrow blocks of units as it takes to fill
the GPU, and bound by the memory that the weight comes from, the second level cache if it fits there. A thread sums up
some rows of the weight for one column of each gate; its block joins the sums and applies the gates.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._scalar import sigmoid
from onnxcomp.targets.tvm.gpu.kernels._warp import exchanged
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels.recurrent import GATES, Cell, panels

_THREADS = 512
_ONE_BLOCK = 128
"""Units up to which a block takes all of them."""

_TOGETHER = 4
"""Sequences that read a weight together."""

_NARROW = 8
"""Least columns of a block: as many values as memory gives at a time."""


@cache
def recurrent(machine: Gpu, cell: Cell) -> Any:
    """Kernel `(xs (T, B, D G U), h (D, B, U)[, c (D, B, U)], r, x_bias, h_bias (G U,), y (T, B, U), h_last[, c_last])`.

    Args:
        machine: What it is for.
        cell: The layer. `xs` are the products of its inputs; the last states are (B, U).
    """
    steps, rows, units, which, gru = cell.steps, cell.rows, cell.units, cell.direction, cell.kind == "GRU"
    gates, late = GATES[cell.kind], gru and not cell.linear_before_reset
    count, wide = panels(machine, units), 2 * machine.lanes
    columns, first = cell.directions * gates * units, which * gates * units
    together = min(_TOGETHER, rows)
    groups = -(-rows // together)
    inside = units <= _ONE_BLOCK
    width = _width(machine, units, groups)
    slices = max(_TOGETHER, min(_THREADS // width, _power(units) // 4)) if inside else _THREADS // width
    threads, blocks = width * slices, -(-units // width)
    joined = min(slices, threads // WARP)

    def before(step: Any, t: Any, start: Any, row: Any, unit: Any, y: Any) -> Any:
        """Hidden value after the last step."""
        return T.if_then_else(step == 0, start[which, row, unit], y[t + 1 if cell.reverse else t - 1, row, unit])

    def total(partial: Any, index: Any, column: Any) -> Any:
        found = partial[index, column]
        for part in range(1, joined):
            found = found + partial[part * (gates * together) + index, column]
        return found

    def gate(xs: Any, p: Any, q: Any, partial: Any, t: Any, row: Any, i: Any, unit: Any, column: Any, g: int) -> Any:
        """Both parts of a sum, with biases; where all gates are not summed at once, there are fewer in `partial`."""
        of_x = xs[t, row, first + g * units + unit] + p[g * units + unit]
        of_h = total(partial, (0 if late and g == 2 else g) * together + i, column) + q[g * units + unit]
        return of_x, of_h

    @T.inline
    def multiply(start, kept, r, y, partial, step, t, group, block, thread, begin, end):
        """Sums of gates `begin` to `end` of a block's columns, each of some rows of the weight."""
        sums = T.alloc_buffer(((end - begin) * together,), "float32", scope="local")
        column: T.let = thread % width
        unit: T.let = block * width + column
        for i in T.unroll((end - begin) * together):
            sums[i] = T.float32(0)
        for turn in T.serial(-(-units // slices)):
            held = T.alloc_buffer((together,), "float32", scope="local")
            j: T.let = turn * slices + thread // width
            if j < units:
                for i in T.unroll(together):
                    row: T.let = T.min(group * together + i, rows - 1)
                    if begin == 2:
                        held[i] = kept[row, j]
                    else:
                        held[i] = before(step, t, start, row, j, y)
                for g in T.unroll(end - begin):
                    weight: T.let = r[begin + g, unit // wide, j, unit % wide]
                    for i in T.unroll(together):
                        sums[g * together + i] = sums[g * together + i] + held[i] * weight
        for i in T.unroll((end - begin) * together):
            for level in T.unroll((WARP // width).bit_length() - 1 if width < WARP else 0):
                sums[i] = sums[i] + exchanged(sums[i], WARP // 2 >> level)
        T.tvm_storage_sync("shared")
        if thread % T.max(WARP, width) < width:
            for i in T.unroll((end - begin) * together):
                partial[thread // T.max(WARP, width) * (gates * together) + i, column] = sums[i]
        T.tvm_storage_sync("shared")

    @T.inline
    def gru_unit(xs, start, p, q, y, last, kept, update, partial, step, t, row, i, unit, column):
        hidden: T.let = before(step, t, start, row, unit, y)
        z = T.meta_var(gate(xs, p, q, partial, t, row, i, unit, column, 0))
        reset = T.meta_var(gate(xs, p, q, partial, t, row, i, unit, column, 1))
        fresh = T.meta_var(gate(xs, p, q, partial, t, row, i, unit, column, 2))
        if late:
            candidate: T.let = T.tanh(fresh[0] + fresh[1])
            value: T.let = (T.float32(1) - update[row, unit]) * candidate + update[row, unit] * hidden
            y[t, row, unit] = value
            if step == steps - 1:
                last[row, unit] = value
        else:
            kept_part: T.let = sigmoid(z[0] + z[1])
            candidate_: T.let = T.tanh(fresh[0] + sigmoid(reset[0] + reset[1]) * fresh[1])
            value_: T.let = (T.float32(1) - kept_part) * candidate_ + kept_part * hidden
            y[t, row, unit] = value_
            if step == steps - 1:
                last[row, unit] = value_

    @T.inline
    def reset_unit(xs, start, p, q, y, last, kept, update, partial, step, t, row, i, unit, column):
        z = T.meta_var(gate(xs, p, q, partial, t, row, i, unit, column, 0))
        reset = T.meta_var(gate(xs, p, q, partial, t, row, i, unit, column, 1))
        update[row, unit] = sigmoid(z[0] + z[1])
        kept[row, unit] = sigmoid(reset[0] + reset[1]) * before(step, t, start, row, unit, y)

    @T.inline
    def lstm_unit(xs, start, p, q, y, last, kept, update, partial, step, t, row, i, unit, column):
        """Of the cells, `update` are those before the first step and `kept` those after the last one."""
        s = T.meta_var([gate(xs, p, q, partial, t, row, i, unit, column, g) for g in range(4)])
        memory: T.let = T.if_then_else(step == 0, update[which, row, unit], kept[row, unit])
        now: T.let = sigmoid(s[2][0] + s[2][1]) * memory + sigmoid(s[0][0] + s[0][1]) * T.tanh(s[3][0] + s[3][1])
        value: T.let = sigmoid(s[1][0] + s[1][1]) * T.tanh(now)
        kept[row, unit] = now
        y[t, row, unit] = value
        if step == steps - 1:
            last[row, unit] = value

    @T.inline
    def part(one, xs, start, r, p, q, y, last, kept, update, step, group, block, thread, begin, end):
        """A block's share of a step: sums of some gates, and `one` of every unit."""
        partial = T.alloc_buffer((joined * gates * together, width), "float32", scope="shared")
        t: T.let = steps - 1 - step if cell.reverse else step
        multiply(start, kept, r, y, partial, step, t, group, block, thread, begin, end)
        row: T.let = group * together + thread // width
        unit: T.let = block * width + thread % width
        if thread < together * width and row < rows and unit < units:
            one(
                xs, start, p, q, y, last, kept, update, partial, step, t, row, thread // width, unit, thread % width
            )  # fmt: skip

    @T.inline
    def all_steps(xs, start, r, p, q, y, last, kept, update):
        for group in T.thread_binding(groups, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                for step in T.serial(steps):
                    if late:
                        part(reset_unit, xs, start, r, p, q, y, last, kept, update, step, group, 0, thread, 0, 2)
                        T.tvm_storage_sync("shared")
                        part(gru_unit, xs, start, r, p, q, y, last, kept, update, step, group, 0, thread, 2, 3)
                    elif gru:
                        part(gru_unit, xs, start, r, p, q, y, last, kept, update, step, group, 0, thread, 0, 3)
                    else:
                        part(lstm_unit, xs, start, r, p, q, y, last, kept, update, step, group, 0, thread, 0, 4)
                    T.tvm_storage_sync("shared")

    @T.inline
    def launch(one, xs, start, r, p, q, y, last, kept, update, step, begin, end):
        for index in T.thread_binding(groups * blocks, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                part(
                    one, xs, start, r, p, q, y, last, kept, update, step, index // blocks, index % blocks, thread,
                    begin, end,
                )  # fmt: skip

    @T.inline
    def step_by_step(xs, start, r, p, q, y, last, kept, update):
        for step in T.serial(steps):
            if late:
                launch(reset_unit, xs, start, r, p, q, y, last, kept, update, step, 0, 2)
                launch(gru_unit, xs, start, r, p, q, y, last, kept, update, step, 2, 3)
            elif gru:
                launch(gru_unit, xs, start, r, p, q, y, last, kept, update, step, 0, 3)
            else:
                launch(lstm_unit, xs, start, r, p, q, y, last, kept, update, step, 0, 4)

    body = all_steps if inside else step_by_step

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
            if late:
                kept = T.alloc_buffer((rows, units), "float32")
                update = T.alloc_buffer((rows, units), "float32")
                body(xs, h, r, p, q, y, last, kept, update)
            else:
                body(xs, h, r, p, q, y, last, last, last)

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
            cells = T.match_buffer(d_, (rows, units), "float32")
            body(xs, h, r, p, q, y, last, cells, c)

    return kernel


def _width(machine: Gpu, units: int, groups: int) -> int:
    """Columns of a block."""
    if units <= _ONE_BLOCK:
        return max(_NARROW, _power(units))
    fits = (w for w in (WARP, WARP // 2) if -(-units // w) * groups >= machine.multiprocessors)
    return next(fits, _NARROW)


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
