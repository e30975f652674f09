"""The up projection of a gated MLP for those neurons only whose gate is open.

Bound by the memory that weights come from. A warp makes the products of two neurons at a time, whose weights lie by
themselves: each thread has up to eight loads of 16 bytes on their way, and the values that both are multiplied with are
read once, from shared memory, where they lie so that the threads of a warp meet in no bank. Blocks stay, and go through
the list together: how long it is, is known only then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.ops import GROUP
from onnxcomp.targets.tvm.gpu.kernels._group_numbers import Numbers
from onnxcomp.targets.tvm.gpu.kernels._integers import flipped, from_flipped, opaque_sixteen, sixteen_plus
from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.kernels._warp import add_lanes
from onnxcomp.targets.tvm.gpu.machine import SHARED, WARP, Gpu
from onnxcomp.targets.tvm.kernels.int4 import int4_shape

_THREADS = 512
_BLOCKS = 2
"""Blocks of a multiprocessor: each brings the inputs to shared memory once more."""

_TOGETHER = 2
"""Neurons of a warp at a time."""

_AHEAD = 4
"""Loads of a neuron that a thread has on their way; of 4-bit integers one, as their scales come with it."""

_WORDS = 4
_NIBBLES = 8


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a neuron's weights are read and multiplied.

    Attributes:
        units: Loads that the weights of a neuron take.
        parts: Runs of columns that a load is multiplied with.
        part: Columns of a run, 4 or 1.
        index: `(column)` is the place of an input in shared memory.
        run: `(unit, index)` is the place there of the first input of a run, of 4 with one at a multiple of that.
        first: Likewise the column.
        padded: Inputs in shared memory, zeros behind the last: all loads of a warp's threads are multiplied.
        words: Words of 32 bits of a load, with all that belongs to it.
        ahead: Loads of a neuron that a thread has on their way.
        load: Macro `(read, at, u, scale, zero, neuron, unit)` that fills words from `read[at]` on.
        multiply: Macro `(sums, s, read, at, x, part, zero)` that adds products with `x[0]` to `x[3]` to `sums[s]`.
            `x[4]` is 16.
        factor: Of the sum of a neuron: `(scale, neuron)`.
    """

    units: int
    parts: int
    part: int
    index: Callable[[Any], Any]
    run: Callable[[Any, Any], Any]
    first: Callable[[Any, Any], Any]
    padded: int
    words: int
    ahead: int
    load: Any
    multiply: Any
    factor: Callable[[Any, Any], Any]


@cache
def neurons(machine: Gpu, *, rows: int | None, k: int, f: int, dtype: str) -> Any:
    """Kernel `(gates (rows, F), places (rows, F), counts (rows,), x (rows, K), u (F, K), scale (F,), y (rows, F))`.

    `y[r, i] = gates[r, i] * scale[j] * (x[r] @ u[j])`, j = places[r, i], for the first `counts[r]` of them.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        f: Neurons.
        dtype: Of `u`, float32 or int8.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    body = _products(machine, _plain(k, dtype), rows, k, f)

    @T.prim_func
    def kernel(g_: T.handle, p_: T.handle, c_: T.handle, x_: T.handle, u_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        gates = T.match_buffer(g_, (m, f), "float32")
        places = T.match_buffer(p_, (m, f), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        x = T.match_buffer(x_, (m, k), "float32")
        up = T.match_buffer(u_, (f, k), dtype)
        scale = T.match_buffer(s_, (f,), "float32")
        y = T.match_buffer(y_, (m, f), "float32")
        body(gates, places, counts, x, up, scale, scale, y, m)

    return kernel


@cache
def neurons_int4(machine: Gpu, *, rows: int | None, k: int, f: int, scale: str, zeros: bool) -> Any:
    """Kernel `(gates (rows, F), places, counts (rows,), x (rows, K), u, scale (F, G), zero, y (rows, F))`, G = K / 32.

    As `neurons`, of 4-bit integers as `int4.pack_int4` packs (F, K / 2).

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs, a multiple of 32.
        f: Neurons.
        scale: Type of the scales, float32 or float16.
        zeros: Zero points are (F, G); else there is a single one, (1,). Both uint8.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    vectors, groups = int4_shape(machine, f, k)[1], k // GROUP
    body = _products(machine, _int4(vectors, groups, scale, zeros), rows, k, f)

    @T.prim_func
    def kernel(
        g_: T.handle, p_: T.handle, c_: T.handle, x_: T.handle, u_: T.handle, s_: T.handle, z_: T.handle, y_: T.handle
    ):
        T.func_attr({"tirx.noalias": True})
        gates = T.match_buffer(g_, (m, f), "float32")
        places = T.match_buffer(p_, (m, f), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        x = T.match_buffer(x_, (m, k), "float32")
        up = T.match_buffer(u_, (f, vectors, WARP), "int32")
        scales = T.match_buffer(s_, (f, groups), scale)
        zero = T.match_buffer(z_, (f, groups) if zeros else (1,), "uint8")
        y = T.match_buffer(y_, (m, f), "float32")
        body(gates, places, counts, x, up, scales, zero, y, m)

    return kernel


def _products(machine: Gpu, form: _Form, rows: int | None, k: int, f: int) -> Any:
    """A macro `(gates, places, counts, x, u, scale, zero, y, rows)`."""
    warps = _THREADS // WARP
    wanted = -(-_BLOCKS * machine.multiprocessors // (rows or 1))
    blocks = min(wanted, -(-f // (warps * _TOGETHER)))
    stride = blocks * warps * _TOGETHER
    held = 4 * form.padded <= SHARED
    ahead, words, part = form.ahead, form.words, form.part
    load, multiply = form.load, form.multiply

    @T.inline
    def inputs(values, xs, x, row, unit, index):
        if held:
            values[beside(0, part)] = xs[beside(form.run(unit, index), part)]
        else:
            for j in T.unroll(part):
                c: T.let = form.first(unit, index) + j
                values[j] = T.if_then_else(c < k, x[row, T.min(c, k - 1)], T.float32(0))

    @T.inline
    def both(gates, places, counts, x, up, scale, zero, y, xs, row, i, lane):
        at = T.alloc_buffer((_TOGETHER,), "int32", scope="local")
        sums = T.alloc_buffer((_TOGETHER,), "float32", scope="local")
        read = T.alloc_buffer((ahead * _TOGETHER * words,), "int32", scope="local")
        values = T.alloc_buffer((5,), "float32", scope="local")
        values[4] = opaque_sixteen(counts[row])
        for s in T.unroll(_TOGETHER):
            at[s] = places[row, T.min(i + s, counts[row] - 1)]
            sums[s] = T.float32(0)
        for j in T.serial((form.units + WARP * ahead - 1) // (WARP * ahead)):
            for a in T.unroll(ahead):
                unit: T.let = T.min((j * ahead + a) * WARP + lane, form.units - 1)
                for s in T.unroll(_TOGETHER):
                    load(read, (a * _TOGETHER + s) * words, up, scale, zero, T.Cast("int64", at[s]), unit)
            for a in T.unroll(ahead):
                for p in T.unroll(form.parts):
                    inputs(values, xs, x, row, (j * ahead + a) * WARP + lane, p)
                    for s in T.unroll(_TOGETHER):
                        multiply(sums, s, read, (a * _TOGETHER + s) * words, values, p, zero)
        for s in T.unroll(_TOGETHER):
            add_lanes(sums, s, WARP)
            if lane == 0 and i + s < counts[row]:
                y[row, i + s] = gates[row, i + s] * form.factor(scale, T.Cast("int64", at[s])) * sums[s]

    @T.inline
    def body(gates, places, counts, x, up, scale, zero, y, m):
        for block in T.thread_binding(blocks, thread="blockIdx.y"):
            for row in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with resident(_BLOCKS):
                        xs = T.alloc_buffer((form.padded if held else 4,), "float32", scope="shared")
                        if row < m:
                            if held:
                                for i in T.serial((form.padded + _THREADS - 1) // _THREADS):
                                    c: T.let = i * _THREADS + thread
                                    if c < form.padded:
                                        xs[form.index(c)] = T.if_then_else(c < k, x[row, T.min(c, k - 1)], T.float32(0))
                                T.tvm_storage_sync("shared")
                            first: T.let = (block * warps + thread // WARP) * _TOGETHER
                            for i in T.serial(T.max(0, (counts[row] - first + stride - 1) // stride)):
                                both(
                                    gates, places, counts, x, up, scale, zero, y, xs,
                                    row, first + i * stride, thread % WARP,
                                )  # fmt: skip

    return body


def _plain(k: int, dtype: str) -> _Form:
    """Float32 or int8: 16 bytes a load, or less where rows do not begin at multiples of that."""
    bits = 32 if dtype == "float32" else 8
    each = next(size for size in (128 // bits, 32 // bits, 1) if k % size == 0)
    words, part = max(1, each * bits // 32), min(4, each)
    parts, of_words = each // part, f"int32x{words}" if words > 1 else "int32"

    def place(unit: Any, index: Any) -> Any:
        """Runs of the same index of a warp's units lie beside one another."""
        return ((unit // WARP * parts + index) * WARP + unit % WARP) * part

    @T.inline
    def load(read, at, up, scale, zero, neuron, unit):
        if each * bits < 32:
            read[at] = T.Cast("int32", up[neuron, unit])
        else:
            read[beside(at, words)] = T.reinterpret(of_words, up[neuron, beside(unit * each, each)])

    @T.inline
    def multiply(sums, s, read, at, x, index, zero):
        if dtype == "float32":
            for j in T.unroll(part):
                sums[s] = sums[s] + x[j] * T.reinterpret("float32", read[at + j])
        elif part == 1:
            sums[s] = sums[s] + x[0] * T.Cast("float32", read[at])
        else:
            for j in T.unroll(4):
                sums[s] = sums[s] + x[j] * from_flipped(flipped(read[at + index]), j)

    return _Form(
        units=k // each,
        parts=parts,
        part=part,
        index=lambda c: place(c // each, c % each // part) + c % part,
        run=place,
        first=lambda unit, index: unit * each + index * part,
        padded=-(-k // (WARP * each * _AHEAD)) * WARP * each * _AHEAD,
        words=words,
        ahead=_AHEAD,
        load=load,
        multiply=multiply,
        factor=lambda scale, neuron: scale[neuron],
    )


def _int4(vectors: int, groups: int, scale: str, zeros: bool) -> _Form:
    """A thread takes four words of a vector: of each of its eight groups, one a nibble, four columns."""
    units = WARP // _WORDS  # of a vector
    factors = Numbers(dtype=scale, groups=groups)
    offsets = Numbers(dtype="uint8", groups=groups)
    words = _WORDS + factors.words + (offsets.words if zeros else 0)

    def first(unit: Any, index: Any) -> Any:
        return unit // units * (_NIBBLES * WARP) + index * WARP + unit % units * _WORDS

    @T.inline
    def load(read, at, up, scale, zero, neuron, unit):
        read[T.ramp(at, 1, _WORDS)] = up[neuron, unit // units, T.ramp(unit % units * _WORDS, 1, _WORDS)]
        factors.load(read, at + _WORDS, scale, neuron, unit // units * _NIBBLES)
        if zeros:
            offsets.load(read, at + _WORDS + factors.words, zero, neuron, unit // units * _NIBBLES)

    @T.inline
    def multiply(sums, s, read, at, x, index, zero):
        group = T.alloc_buffer((1,), "float32", scope="local")
        offset = T.meta_var(
            offsets.value(read, at + _WORDS + factors.words, index, 16)
            if zeros
            else T.Cast("float32", zero[0]) + T.float32(16)
        )
        group[0] = (x[0] + x[1] + (x[2] + x[3])) * (T.float32(0) - offset)
        for j in T.unroll(_WORDS):
            group[0] = group[0] + x[j] * sixteen_plus(read[at + j], index, x[4])
        sums[s] = sums[s] + factors.value(read, at + _WORDS, index) * group[0]

    return _Form(
        units=vectors * units,
        parts=_NIBBLES,
        part=_WORDS,
        index=lambda c: c,
        run=first,
        first=first,
        padded=-(-vectors // _WORDS) * _WORDS * _NIBBLES * WARP,
        words=-(-words // _WORDS) * _WORDS,
        ahead=1,
        load=load,
        multiply=multiply,
        factor=lambda scale, neuron: T.float32(1),
    )
