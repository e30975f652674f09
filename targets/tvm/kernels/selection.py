"""Which inputs of a row count: those beyond a threshold, the largest, or those that changed.

What is found is a list a row: values, places and how many there are. It is written without a branch, since which inputs
survive is as good as random. A NaN is never small.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

_BINS = 4096
"""Of a histogram over 12 bits: the first of exponent and mantissa, then what follows."""

INFINITY = 0x7F800000
"""Bits of a magnitude from which on it is not finite."""


def bits_of(x: Any) -> Any:
    """Bits of a magnitude; they are in its order, and a NaN comes last."""
    return T.bitwise_and(T.reinterpret("int32", x), T.int32(0x7FFFFFFF))


@cache
def above(*, rows: int | None, k: int, each: bool, one_sided: bool) -> Any:
    """Kernel `(x (rows, K), threshold, values (rows, K), places (rows, K) int32, counts (rows,) int32)`.

    Args:
        rows: Rows; None for any number.
        k: Inputs.
        each: The threshold has a value an input, (K,), instead of a single one, (1,).
        one_sided: A value is compared instead of its magnitude.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    limits = k if each else 1

    @T.prim_func
    def kernel(x_: T.handle, t_: T.handle, v_: T.handle, p_: T.handle, c_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        t = T.match_buffer(t_, (limits,), "float32")
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        for row in T.serial(m):
            found = T.alloc_buffer((1,), "int32")
            found[0] = 0
            for i in T.serial(k):
                values[row, found[0]] = x[row, i]
                places[row, found[0]] = T.Cast("int32", i)
                size: T.let = x[row, i] if one_sided else T.abs(x[row, i])
                found[0] = found[0] + T.Select(size <= t[i if each else 0], 0, 1)
            counts[row] = found[0]

    return kernel


@cache
def largest(*, rows: int | None, k: int) -> Any:
    """Kernel `(x (rows, K), count (1,) int32, values (rows, K), places (rows, K) int32, counts (rows,) int32)`.

    As many as `count` says, all if there are fewer; of equal magnitudes those of lowest index. The last one that counts
    is found by its bits, 12, 12 and 7 at a time.

    Args:
        rows: Rows; None for any number.
        k: Inputs.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows

    @T.inline
    def narrow(x, bins, state, row, above_bits, shift):
        for b in T.serial(_BINS):
            bins[b] = 0
        for i in T.serial(k):
            bits: T.let = bits_of(x[row, i])
            same: T.let = T.Select(T.shift_right(bits, above_bits) == state[0], 1, 0)
            at: T.let = T.bitwise_and(T.shift_right(bits, shift), (1 << (above_bits - shift)) - 1)
            bins[at] = bins[at] + same
        state[2] = (1 << (above_bits - shift)) - 1
        while state[1] > bins[state[2]]:
            state[1] = state[1] - bins[state[2]]
            state[2] = state[2] - 1
        state[0] = T.bitwise_or(T.shift_left(state[0], above_bits - shift), state[2])

    @T.prim_func
    def kernel(x_: T.handle, n_: T.handle, v_: T.handle, p_: T.handle, c_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        count = T.match_buffer(n_, (1,), "int32")
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        bins = T.alloc_buffer((_BINS,), "int32")
        for row in T.serial(m):
            # The bits that were found of the last one that counts, how many are left to find among its like, a bin.
            state = T.alloc_buffer((3,), "int32")
            state[0] = 0
            state[1] = T.min(count[0], k)
            state[2] = 0
            if count[0] > 0:
                narrow(x, bins, state, row, 31, 19)
                narrow(x, bins, state, row, 19, 7)
                narrow(x, bins, state, row, 7, 0)
            found = T.alloc_buffer((2,), "int32")
            found[0] = 0
            found[1] = 0
            if count[0] > 0:
                for i in T.serial(k):
                    values[row, found[0]] = x[row, i]
                    places[row, found[0]] = T.Cast("int32", i)
                    bits: T.let = bits_of(x[row, i])
                    equal: T.let = T.Select(bits == state[0], 1, 0)
                    tied: T.let = T.Select(found[1] < state[1], equal, 0)
                    found[0] = found[0] + T.Select(bits > state[0], 1, tied)
                    found[1] = found[1] + equal
            counts[row] = found[0]

    return kernel


@cache
def changed(*, rows: int, k: int, n: int, each: bool, steps: int) -> Any:
    """Kernel `(x, last (rows, K), total (rows, N), threshold, step, values, places, counts, afresh, sent (rows, K))`.

    Values are changes. `afresh`, like the counts int32 (rows,), is 1 where a change or a sum is not finite: a NaN would
    never leave a sum, so this is to be started again, and values are all that was sent.

    Args:
        rows: Rows.
        k: Inputs.
        n: Sums.
        each: The threshold has a value an input, (K,), instead of a single one, (1,).
        steps: Length of `step`, multiples of which inputs are rounded to: 1, K, or 0 for no rounding and one of 1.
    """
    limits = k if each else 1

    @T.prim_func
    def kernel(
        x_: T.handle, l_: T.handle, a_: T.handle, t_: T.handle, q_: T.handle,
        v_: T.handle, p_: T.handle, c_: T.handle, f_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (rows, k), "float32")
        last = T.match_buffer(l_, (rows, k), "float32")
        total = T.match_buffer(a_, (rows, n), "float32")
        t = T.match_buffer(t_, (limits,), "float32")
        step = T.match_buffer(q_, (max(steps, 1),), "float32")
        values = T.match_buffer(v_, (rows, k), "float32")
        places = T.match_buffer(p_, (rows, k), "int32")
        counts = T.match_buffer(c_, (rows,), "int32")
        afresh = T.match_buffer(f_, (rows,), "int32")
        sent = T.match_buffer(s_, (rows, k), "float32")
        for row in T.serial(rows):
            odd = T.alloc_buffer((1,), "int32")
            odd[0] = 0
            for j in T.serial(n):
                odd[0] = T.max(odd[0], bits_of(total[row, j]))
            for i in T.serial(k):
                if steps > 0:
                    size: T.let = step[i if steps > 1 else 0]
                    sent[row, i] = T.Select(size > T.float32(0), T.nearbyint(x[row, i] / size) * size, x[row, i])
                else:
                    sent[row, i] = x[row, i]
            found = T.alloc_buffer((1,), "int32")
            found[0] = 0
            for i in T.serial(k):
                change: T.let = sent[row, i] - last[row, i]
                kept: T.let = T.abs(change) <= t[i if each else 0]
                odd[0] = T.max(odd[0], bits_of(change))
                values[row, found[0]] = change
                places[row, found[0]] = T.Cast("int32", i)
                found[0] = found[0] + T.Select(kept, 0, 1)
                sent[row, i] = T.Select(kept, last[row, i], sent[row, i])
            counts[row] = found[0]
            afresh[row] = 0
            if odd[0] >= INFINITY:
                for i in T.serial(k):
                    values[row, i] = sent[row, i]
                    places[row, i] = T.Cast("int32", i)
                counts[row] = k
                afresh[row] = 1

    return kernel
