"""Sums of some rows of a matrix, each times a value: a product with a vector of which most elements are left out.

Only the rows of inputs that count are read; see `_row_sums`. Many rows of activations leave out little together: these
are multiplied with all of the weight, which is then read once for 64 of them; see `_many_rows`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.ops import GROUP
from onnxcomp.targets.tvm.gpu.kernels._group_numbers import Numbers
from onnxcomp.targets.tvm.gpu.kernels._integers import flipped, from_flipped, opaque_sixteen, sixteen_plus
from onnxcomp.targets.tvm.gpu.kernels._many_rows import EIGHT, FEWEST_ROWS, many_rows
from onnxcomp.targets.tvm.gpu.kernels._row_sums import Form, row_sums
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels.int4 import int4_shape

_WORDS = 4
"""Words of a load: 16 bytes."""

_NIBBLES = 8
"""4-bit integers in a word."""


@cache
def sum_rows(machine: Gpu, *, rows: int | None, k: int, n: int, dtype: str, carried: bool = False) -> Any:
    """Kernel `(values (rows, K), places, counts (rows,), w (K, N), scale (N,)[, afresh, total], y (rows, N))`.

    `y[r] = scale * sum of values[r, i] * w[places[r, i]]` for the first `counts[r]` of them.

    Args:
        machine: What it is for.
        rows: Rows of activations; None for any number.
        k: Inputs.
        n: Outputs.
        dtype: Of the matrix, float32 or int8.
        carried: `total`, (rows, N), is added where `afresh`, int32 (rows,), is 0.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    most = None if carried or rows is not None else FEWEST_ROWS[dtype] - 1
    few = row_sums(machine, _plain(n, dtype, carried), rows=rows, k=k, n=n, most=most)
    many = _many_plain(k, n, dtype)

    @T.inline
    def body(values, places, counts, w, scale, y):
        if rows is None:
            if m < FEWEST_ROWS[dtype]:
                few(values, places, counts, w, scale, scale, counts, y, y, m)
            else:
                many(values, places, counts, w, scale, scale, y, m)
        elif rows < FEWEST_ROWS[dtype]:
            few(values, places, counts, w, scale, scale, counts, y, y, m)
        else:
            many(values, places, counts, w, scale, scale, y, m)

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
            w = T.match_buffer(w_, (k, n), dtype)
            scale = T.match_buffer(s_, (n,), "float32")
            afresh = T.match_buffer(f_, (m,), "int32")
            total = T.match_buffer(a_, (m, n), "float32")
            y = T.match_buffer(y_, (m, n), "float32")
            few(values, places, counts, w, scale, scale, afresh, total, y, m)

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
            body(values, places, counts, w, scale, y)

    return kernel


def _plain(n: int, dtype: str, carried: bool) -> Form:
    """Float32 or int8: 16 bytes a load, or less where rows do not begin at multiples of that."""
    bits = 32 if dtype == "float32" else 8
    each = next(size for size in (128 // bits, 32 // bits, 1) if n % size == 0)
    words = max(1, each * bits // 32)
    of_words = f"int32x{words}" if words > 1 else "int32"

    @T.inline
    def open_(sums, count):
        pass

    @T.inline
    def load(read, at, w, scale, zero, row, unit):
        if each * bits < 32:
            read[at] = T.Cast("int32", w[row, unit])
        else:
            read[beside(at, words)] = T.reinterpret(of_words, w[row, beside(unit * each, each)])

    @T.inline
    def add(sums, read, at, x):
        for j in T.unroll(words):
            if dtype == "float32":
                sums[j] = sums[j] + x * T.reinterpret("float32", read[at + j])
            elif each == 1:
                sums[j] = sums[j] + x * T.Cast("float32", read[at])
            else:
                bytes_: T.let = flipped(read[at + j])
                for i in T.unroll(4):
                    sums[j * 4 + i] = sums[j * 4 + i] + x * from_flipped(bytes_, i)

    @T.inline
    def close(sums, zero):
        pass

    @T.inline
    def store(y, row, column, value, scale, afresh, total):
        if carried:
            y[row, column] = value * scale[column] + T.if_then_else(afresh[row] == 0, total[row, column], T.float32(0))
        else:
            y[row, column] = value * scale[column]

    return Form(
        units=n // each,
        each=each,
        column=lambda unit, index: unit * each + index,
        words=words,
        together=8 if dtype == "float32" else 4,
        blocks=4,
        open=open_,
        load=load,
        add=add,
        close=close,
        store=store,
    )


def _many_plain(k: int, n: int, dtype: str) -> Any:
    @T.inline
    def bring(read, w, scale, zero, row, column):
        if dtype == "float32" and n % 4 == 0:
            for j in T.unroll(EIGHT // 4):
                if column + j * 4 < n:
                    read[T.ramp(j * 4, 1, 4)] = w[row, T.ramp(column + j * 4, 1, 4)]
        elif dtype == "int8" and n % EIGHT == 0:
            words = T.alloc_buffer((2,), "int32", scope="local")
            if column < n:
                words[T.ramp(0, 1, 2)] = T.reinterpret("int32x2", w[row, T.ramp(column, 1, EIGHT)])
                for j in T.unroll(EIGHT):
                    read[j] = from_flipped(flipped(words[j // 4]), j % 4)
        else:
            for j in T.unroll(EIGHT):
                if column + j < n:
                    read[j] = T.Cast("float32", w[row, column + j])

    @T.inline
    def store(y, row, column, value, scale):
        y[row, column] = value * scale[column]

    return many_rows(k, n, bring, store)


@cache
def sum_rows_int4(machine: Gpu, *, rows: int | None, k: int, n: int, scale: str, zeros: bool) -> Any:
    """Kernel `(values (rows, K), places (rows, K), counts (rows,), w, scale (K, G), zero, y (rows, N))`, G = N / 32.

    As `sum_rows`, of 4-bit integers whose every row has its own scale and zero point for 32 columns. What 16 and the
    zero points add to the sums is taken off at last.

    Args:
        machine: What it is for.
        rows: Rows of activations; None for any number.
        k: Inputs.
        n: Outputs, a multiple of 32.
        scale: Type of the scales, float32 or float16.
        zeros: Zero points are (K, G); else there is a single one, (1,). Both uint8.
    """
    vectors, groups = int4_shape(machine, k, n)[1], n // GROUP
    m = tirx.Var("rows", "int64") if rows is None else rows
    most = None if rows is not None else FEWEST_ROWS["int4"] - 1
    few = row_sums(machine, _int4(vectors, groups, scale, zeros), rows=rows, k=k, n=n, most=most)
    many = _many_int4(k, n, zeros)

    @T.prim_func
    def kernel(v_: T.handle, p_: T.handle, c_: T.handle, w_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        w = T.match_buffer(w_, (k, vectors, WARP), "int32")
        scales = T.match_buffer(s_, (k, groups), scale)
        zero = T.match_buffer(z_, (k, groups) if zeros else (1,), "uint8")
        y = T.match_buffer(y_, (m, n), "float32")
        if rows is None:
            if m < FEWEST_ROWS["int4"]:
                few(values, places, counts, w, scales, zero, counts, y, y, m)
            else:
                many(values, places, counts, w, scales, zero, y, m)
        elif rows < FEWEST_ROWS["int4"]:
            few(values, places, counts, w, scales, zero, counts, y, y, m)
        else:
            many(values, places, counts, w, scales, zero, y, m)

    return kernel


def _int4(vectors: int, groups: int, scale: str, zeros: bool) -> Form:
    """A thread takes four words of a vector: of each of its eight groups, one a nibble, four columns."""
    units = WARP // _WORDS  # of a vector
    factors = Numbers(dtype=scale, groups=groups)
    offsets = Numbers(dtype="uint8", groups=groups)
    words = _WORDS + factors.words + (offsets.words if zeros else 0)
    sixteen = _NIBBLES * _WORDS + _NIBBLES

    @T.inline
    def open_(sums, count):
        sums[sixteen] = opaque_sixteen(count)

    @T.inline
    def load(read, at, w, scale, zero, row, unit):
        read[T.ramp(at, 1, _WORDS)] = w[row, unit // units, T.ramp(unit % units * _WORDS, 1, _WORDS)]
        factors.load(read, at + _WORDS, scale, row, unit // units * _NIBBLES)
        if zeros:
            offsets.load(read, at + _WORDS + factors.words, zero, row, unit // units * _NIBBLES)

    @T.inline
    def add(sums, read, at, x):
        for s in T.unroll(_NIBBLES):
            factor: T.let = x * factors.value(read, at + _WORDS, s)
            for j in T.unroll(_WORDS):
                sums[s * _WORDS + j] = sums[s * _WORDS + j] + factor * sixteen_plus(read[at + j], s, sums[sixteen])
            offset = T.meta_var(offsets.value(read, at + _WORDS + factors.words, s, 16) if zeros else T.float32(1))
            sums[_NIBBLES * _WORDS + s] = sums[_NIBBLES * _WORDS + s] + factor * offset

    @T.inline
    def close(sums, zero):
        for s in T.unroll(_NIBBLES):
            each = T.meta_var(T.float32(1) if zeros else T.Cast("float32", zero[0]) + T.float32(16))
            for j in T.unroll(_WORDS):
                sums[s * _WORDS + j] = sums[s * _WORDS + j] - sums[_NIBBLES * _WORDS + s] * each

    @T.inline
    def store(y, row, column, value, scale, afresh, total):
        y[row, column] = value

    return Form(
        units=vectors * units,
        each=_NIBBLES * _WORDS,
        column=lambda unit, index: (
            unit // units * (_NIBBLES * WARP) + index // _WORDS * WARP + unit % units * _WORDS + index % _WORDS
        ),
        words=-(-words // _WORDS) * _WORDS,
        together=4,
        blocks=2,
        spare=_NIBBLES + 1,
        open=open_,
        load=load,
        add=add,
        close=close,
        store=store,
    )


def _many_int4(k: int, n: int, zeros: bool) -> Any:
    @T.inline
    def bring(read, w, scale, zero, row, column):
        words = T.alloc_buffer((EIGHT,), "int32", scope="local")
        if column < n:
            group: T.let = column // GROUP
            offset: T.let = T.Cast("float32", zero[row, group] if zeros else zero[0])
            for j in T.unroll(EIGHT // _WORDS):
                lane = T.meta_var(column % WARP + j * _WORDS)
                words[T.ramp(j * _WORDS, 1, _WORDS)] = w[row, group // _NIBBLES, T.ramp(lane, 1, _WORDS)]
            for j in T.unroll(EIGHT):
                code: T.let = T.bitwise_and(T.shift_right(words[j], T.Cast("int32", group % _NIBBLES * 4)), 15)
                read[j] = (T.Cast("float32", code) - offset) * T.Cast("float32", scale[row, group])

    @T.inline
    def store(y, row, column, value, scale):
        y[row, column] = value

    return many_rows(k, n, bring, store)
