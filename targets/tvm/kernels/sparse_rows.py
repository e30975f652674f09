"""Sums of some rows of a matrix, each times a value: a product with a vector of which most elements are left out.

Such a product is bound by memory. Four rows are taken a pass, over columns whose sums stay in the first-level cache,
while the next four are fetched: each row lies on pages of its own, where a processor's prefetcher starts anew.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.ops import GROUP
from onnxcomp.targets.tvm.kernels._joint_rows import joint_rows
from onnxcomp.targets.tvm.kernels._many_rows import AHEAD, DEPTH, FEWEST_ROWS, VECTORS, across, panel_product, scatter
from onnxcomp.targets.tvm.kernels._prefetch import LINE, fetch
from onnxcomp.targets.tvm.kernels.int4 import NIBBLES, int4_columns, int4_shape, sixteen_plus
from onnxcomp.targets.tvm.machine import Machine

_TOGETHER = 4
"""Rows of the matrix a pass."""

_BLOCK = {"float32": 2048, "int8": 4096, "int4": 4096}
"""Columns whose sums are held at most; also the part of a product that one thread does. Runs of a row shorter than a
page of memory are slower."""


@cache
def sum_rows(machine: Machine, *, rows: int | None, k: int, n: int, dtype: str, carried: bool = False) -> Any:
    """Kernel `(values (rows, K), places, counts (rows,), w (K, N), scale (N,)[, afresh, total], y (rows, N))`.

    `y[r] = scale * sum of values[r, i] * w[places[r, i]]` for the first `counts[r]` of them, in order.

    Args:
        machine: What it is for.
        rows: Rows of activations; None for any number.
        k: Inputs.
        n: Outputs.
        dtype: Of the matrix, float32 or int8.
        carried: `total`, (rows, N), is added where `afresh`, int32 (rows,), is 0.
    """
    lanes = machine.lanes
    step = max(lanes, LINE if dtype == "int8" else LINE // 4)
    m = tirx.Var("rows", "int64") if rows is None else rows
    steps = n // step
    blocks = max(1, -(-steps * step // _BLOCK[dtype]))
    size = -(-steps // blocks)
    rest = n - steps * step
    floats = f"float32x{lanes}"

    @T.inline
    def passes(values, places, w, part, row, begin, length, count):
        for j in T.serial(length * (step // lanes)):
            part[T.ramp(j * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for i in T.serial(count // _TOGETHER):
            x = T.alloc_buffer((_TOGETHER,), "float32")
            at = T.alloc_buffer((_TOGETHER,), "int64")
            ahead = T.alloc_buffer((_TOGETHER,), "int64")
            for u in T.unroll(_TOGETHER):
                x[u] = values[row, i * _TOGETHER + u]
                at[u] = T.Cast("int64", places[row, i * _TOGETHER + u])
                ahead[u] = T.Cast("int64", places[row, T.min(i * _TOGETHER + _TOGETHER + u, count - 1)])
            for j in T.serial(length):
                for u in T.unroll(_TOGETHER):
                    fetch(w[ahead[u], begin + j * step])
                for v in T.unroll(step // lanes):
                    c = T.meta_var(j * step + v * lanes)
                    part[T.ramp(c, 1, lanes)] = (
                        part[T.ramp(c, 1, lanes)]
                        + T.broadcast(x[0], lanes) * T.Cast(floats, w[at[0], T.ramp(begin + c, 1, lanes)])
                        + T.broadcast(x[1], lanes) * T.Cast(floats, w[at[1], T.ramp(begin + c, 1, lanes)])
                    ) + (
                        T.broadcast(x[2], lanes) * T.Cast(floats, w[at[2], T.ramp(begin + c, 1, lanes)])
                        + T.broadcast(x[3], lanes) * T.Cast(floats, w[at[3], T.ramp(begin + c, 1, lanes)])
                    )
        for i in T.serial(count % _TOGETHER):
            x = T.alloc_buffer((1,), "float32")
            at = T.alloc_buffer((1,), "int64")
            x[0] = values[row, count - count % _TOGETHER + i]
            at[0] = T.Cast("int64", places[row, count - count % _TOGETHER + i])
            for j in T.serial(length * (step // lanes)):
                part[T.ramp(j * lanes, 1, lanes)] = part[T.ramp(j * lanes, 1, lanes)] + T.broadcast(
                    x[0], lanes
                ) * T.Cast(floats, w[at[0], T.ramp(begin + j * lanes, 1, lanes)])

    wide = VECTORS * lanes
    size_of_panel = wide * (1 if dtype == "int8" else 4)
    of_line, lines = max(1, LINE // size_of_panel), max(1, size_of_panel // LINE)
    fill, product = scatter(), panel_product(machine, n)

    @T.inline
    def many(values, places, counts, w, scale, y, m):
        x = T.alloc_buffer((m, across(k)), "float32")
        fill(values, places, counts, x, m, k)
        for p in T.parallel((n + wide - 1) // wide):
            panel = T.alloc_buffer((DEPTH, wide), "float32")
            for d in T.serial((k + DEPTH - 1) // DEPTH):
                start: T.let = d * DEPTH
                depth: T.let = T.min(DEPTH, k - start)
                if (p + 1) * wide <= n:
                    for j in T.serial(depth):
                        if p % of_line == 0:
                            for i in T.unroll(lines):
                                fetch(w[T.min(start + j + AHEAD, k - 1), p * wide + i * (wide // lines)])
                        for v in T.unroll(VECTORS):
                            c = T.meta_var(T.ramp(p * wide + v * lanes, 1, lanes))
                            panel[j, T.ramp(v * lanes, 1, lanes)] = T.Cast(floats, w[start + j, c]) * scale[c]
                else:
                    for j in T.serial(depth):
                        for c in T.serial(wide):
                            panel[j, c] = T.float32(0)
                        for c in T.serial(n - p * wide):
                            panel[j, c] = T.Cast("float32", w[start + j, p * wide + c]) * scale[p * wide + c]
                product(x, panel, y, m, p, start, depth)

    @T.inline
    def alone(values, places, counts, w, scale, afresh, total, y, row):
        if steps > 0:
            for b in T.parallel(blocks):
                part = T.alloc_buffer((size * step,), "float32")
                begin: T.let = b * size * step
                length: T.let = T.min(size, steps - b * size)
                passes(values, places, w, part, row, begin, length, counts[row])
                for j in T.serial(length * (step // lanes)):
                    c = T.meta_var(T.ramp(begin + j * lanes, 1, lanes))
                    y[row, c] = part[T.ramp(j * lanes, 1, lanes)] * scale[c]
                if carried:  # noqa: SIM102, the first is decided when the kernel is made
                    if afresh[row] == 0:
                        for j in T.serial(length * (step // lanes)):
                            c = T.meta_var(T.ramp(begin + j * lanes, 1, lanes))
                            y[row, c] = y[row, c] + total[row, c]
        for j in T.serial(rest):
            last = T.alloc_buffer((1,), "float32")
            last[0] = T.float32(0)
            for i in T.serial(counts[row]):
                last[0] = last[0] + values[row, i] * T.Cast("float32", w[places[row, i], steps * step + j])
            y[row, steps * step + j] = last[0] * scale[steps * step + j]
            if carried:  # noqa: SIM102, as above
                if afresh[row] == 0:
                    y[row, steps * step + j] = y[row, steps * step + j] + total[row, steps * step + j]

    join = joint_rows(machine, k=k, n=n, dtype=dtype, alone=alone)

    @T.inline
    def some(values, places, counts, w, scale, y, m):
        if m > 1:
            x = T.alloc_buffer((m, across(k)), "float32")
            fill(values, places, counts, x, m, k)
            join(values, places, counts, x, w, scale, y, m)
        for i in T.serial(m % 2):
            alone(values, places, counts, w, scale, counts, y, y, m - 1 + i)

    @T.inline
    def body(values, places, counts, w, scale, y, m):
        if rows is None:
            if m < FEWEST_ROWS[dtype]:
                some(values, places, counts, w, scale, y, m)
            else:
                many(values, places, counts, w, scale, y, m)
        elif rows < FEWEST_ROWS[dtype]:
            some(values, places, counts, w, scale, y, m)
        else:
            many(values, places, counts, w, scale, y, m)

    if carried:

        @T.prim_func
        def kernel(
            v_: T.handle, p_: T.handle, c_: T.handle, w_: T.handle, s_: T.handle, f_: T.handle, a_: T.handle,
            y_: T.handle,
        ):  # fmt: skip
            T.func_attr({"tirx.noalias": True})
            values = T.match_buffer(v_, (m, k), "float32")
            places = T.match_buffer(p_, (m, k), "int32")
            counts = T.match_buffer(c_, (m,), "int32")
            afresh = T.match_buffer(f_, (m,), "int32")
            w = T.match_buffer(w_, (k, n), dtype)
            scale = T.match_buffer(s_, (n,), "float32")
            total = T.match_buffer(a_, (m, n), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            for row in T.serial(m):
                alone(values, places, counts, w, scale, afresh, total, y, row)

    else:

        @T.prim_func
        def kernel(v_: T.handle, p_: T.handle, c_: T.handle, w_: T.handle, s_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            values = T.match_buffer(v_, (m, k), "float32")
            places = T.match_buffer(p_, (m, k), "int32")
            counts = T.match_buffer(c_, (m,), "int32")
            w = T.match_buffer(w_, (k, n), dtype)
            scale = T.match_buffer(s_, (n,), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            body(values, places, counts, w, scale, y, m)

    return kernel


@cache
def sum_rows_int4(machine: Machine, *, rows: int | None, k: int, n: int, scale: str, zeros: bool) -> Any:
    """Kernel `(values (rows, K), places (rows, K), counts (rows,), w, scale (K, G), zero, y (rows, N))`, G = N / 32.

    As `sum_rows`, of 4-bit integers whose every row has its own scale and zero point for 32 columns. The product of
    value and scale is one for 32 columns; what 16 and the zero points add to the sums is taken off at last.

    Args:
        machine: What it is for.
        rows: Rows of activations; None for any number.
        k: Inputs.
        n: Outputs, a multiple of 32.
        scale: Type of the scales, float32 or float16.
        zeros: Zero points are (K, G); else there is a single one, (1,). Both uint8.
    """
    lanes = machine.lanes
    columns = int4_columns(machine)
    vectors = int4_shape(machine, k, n)[1]
    groups = n // GROUP
    own = columns // GROUP  # groups of a vector of words
    m = tirx.Var("rows", "int64") if rows is None else rows
    blocks = max(1, -(-n // _BLOCK["int4"]))
    size = -(-vectors // blocks)
    of_group = GROUP // lanes  # vectors of floats
    line = LINE // (4 * lanes)  # vectors of words
    scales = LINE // (2 if scale == "float16" else 4)  # of a line

    @T.inline
    def factors(values, places, scale_, zero, factor, surplus, row, i, u, count, first, there):
        x = T.alloc_buffer((1,), "float32")
        at = T.alloc_buffer((1,), "int64")
        # A row that is not there is the last one times zero.
        x[0] = T.Select(i * _TOGETHER + u < count, values[row, T.min(i * _TOGETHER + u, count - 1)], T.float32(0))
        at[0] = T.Cast("int64", places[row, T.min(i * _TOGETHER + u, count - 1)])
        later: T.let = T.Cast("int64", places[row, T.min((i + 2) * _TOGETHER + u, count - 1)])
        for g in T.serial((there + scales - 1) // scales):
            fetch(scale_[later, first + g * scales])
        if zeros:
            fetch(zero[later, first])
        for g in T.serial(there):
            factor[u, g] = x[0] * T.Cast("float32", scale_[at[0], first + g])
        for g in T.serial(there):
            surplus[g] = surplus[g] + factor[u, g] * (
                T.float32(16) + T.Cast("float32", zero[at[0], first + g] if zeros else zero[0])
            )

    @T.inline
    def passes(values, places, w, scale_, zero, part, surplus, row, begin, length, there, count):
        factor = T.alloc_buffer((_TOGETHER, size * own), "float32")
        for j in T.serial(length * NIBBLES):
            part[T.ramp(j * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for g in T.serial(length * own):
            surplus[g] = T.float32(0)
            for u in T.unroll(_TOGETHER):
                factor[u, g] = T.float32(0)
        for i in T.serial((count + _TOGETHER - 1) // _TOGETHER):
            at = T.alloc_buffer((_TOGETHER,), "int64")
            ahead = T.alloc_buffer((_TOGETHER,), "int64")
            for u in T.unroll(_TOGETHER):
                factors(values, places, scale_, zero, factor, surplus, row, i, u, count, begin * own, there)
                at[u] = T.Cast("int64", places[row, T.min(i * _TOGETHER + u, count - 1)])
                ahead[u] = T.Cast("int64", places[row, T.min(i * _TOGETHER + _TOGETHER + u, count - 1)])
            for j in T.serial(length):
                if j % line == 0:
                    for u in T.unroll(_TOGETHER):
                        fetch(w[ahead[u], begin + j, 0])
                words = T.alloc_buffer((_TOGETHER * lanes,), "int32")
                for u in T.unroll(_TOGETHER):
                    words[T.ramp(u * lanes, 1, lanes)] = w[at[u], begin + j, T.ramp(0, 1, lanes)]
                for s in T.unroll(NIBBLES):
                    c = T.meta_var(T.ramp(j * columns + s * lanes, 1, lanes))
                    g = T.meta_var(j * own + s * lanes // GROUP)
                    part[c] = (
                        part[c]
                        + T.broadcast(factor[0, g], lanes) * sixteen_plus(words[T.ramp(0 * lanes, 1, lanes)], s, lanes)
                        + T.broadcast(factor[1, g], lanes) * sixteen_plus(words[T.ramp(1 * lanes, 1, lanes)], s, lanes)
                        + T.broadcast(factor[2, g], lanes) * sixteen_plus(words[T.ramp(2 * lanes, 1, lanes)], s, lanes)
                        + T.broadcast(factor[3, g], lanes) * sixteen_plus(words[T.ramp(3 * lanes, 1, lanes)], s, lanes)
                    )

    @T.inline
    def few(values, places, counts, w, scale_, zero, y, m):
        for row in T.serial(m):
            for b in T.parallel(blocks):
                part = T.alloc_buffer((size * columns,), "float32")
                surplus = T.alloc_buffer((size * own,), "float32")
                begin: T.let = b * size
                length: T.let = T.min(size, vectors - begin)
                there: T.let = T.min(size * own, groups - begin * own)
                passes(values, places, w, scale_, zero, part, surplus, row, begin, length, there, counts[row])
                for g in T.serial(there):
                    for v in T.unroll(of_group):
                        c = T.meta_var(g * GROUP + v * lanes)
                        y[row, T.ramp(begin * columns + c, 1, lanes)] = part[T.ramp(c, 1, lanes)] - T.broadcast(
                            surplus[g], lanes
                        )

    wide = VECTORS * lanes
    fill, product = scatter(), panel_product(machine, n)

    @T.inline
    def many(values, places, counts, w, scale_, zero, y, m):
        x = T.alloc_buffer((m, across(k)), "float32")
        fill(values, places, counts, x, m, k)
        for p in T.parallel(n // wide):
            panel = T.alloc_buffer((DEPTH, wide), "float32")
            for d in T.serial((k + DEPTH - 1) // DEPTH):
                start: T.let = d * DEPTH
                depth: T.let = T.min(DEPTH, k - start)
                for j in T.serial(depth):
                    if p * VECTORS % (line * NIBBLES) == 0:
                        fetch(w[T.min(start + j + AHEAD, k - 1), p * VECTORS // NIBBLES, 0])
                    g: T.let = p * wide // GROUP
                    offset: T.let = T.Cast("float32", zero[start + j, g] if zeros else zero[0])
                    factor: T.let = T.Cast("float32", scale_[start + j, g])
                    for v in T.unroll(VECTORS):
                        at: T.let = p * VECTORS + v
                        words: T.let = w[start + j, at // NIBBLES, T.ramp(0, 1, lanes)]
                        moved: T.let = T.shift_right(words, T.broadcast(T.Cast("int32", at % NIBBLES * 4), lanes))
                        codes: T.let = T.Cast(f"float32x{lanes}", T.bitwise_and(moved, T.broadcast(15, lanes)))
                        panel[j, T.ramp(v * lanes, 1, lanes)] = (codes - T.broadcast(offset, lanes)) * T.broadcast(
                            factor, lanes
                        )
                product(x, panel, y, m, p, start, depth)

    @T.inline
    def body(values, places, counts, w, scale_, zero, y, m):
        if rows is None:
            if m < FEWEST_ROWS["int4"]:
                few(values, places, counts, w, scale_, zero, y, m)
            else:
                many(values, places, counts, w, scale_, zero, y, m)
        elif rows < FEWEST_ROWS["int4"]:
            few(values, places, counts, w, scale_, zero, y, m)
        else:
            many(values, places, counts, w, scale_, zero, y, m)

    @T.prim_func
    def kernel(v_: T.handle, p_: T.handle, c_: T.handle, w_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        w = T.match_buffer(w_, (k, vectors, lanes), "int32")
        scale_ = T.match_buffer(s_, (k, groups), scale)
        zero = T.match_buffer(z_, (k, groups) if zeros else (1,), "uint8")
        y = T.match_buffer(y_, (m, n), "float32")
        body(values, places, counts, w, scale_, zero, y, m)

    return kernel
