"""Products with weights of which one or two of every four consecutive ones in a column are stored (1:4, 2:4).

A column is a sequence of slots, one for each weight that is stored: the value, and two bits that say which of the four
inputs of its group it is multiplied with. So no branch and no gather is needed: the four inputs lie in a register, and
the bits select among them for all columns of a vector at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._prefetch import fetch
from onnxcomp.targets.tvm.machine import Machine

COLUMNS = 16
"""Of a block, whose weights lie together."""

QUAD = 4
"""Slots of a column whose bits share a byte."""

_GROUP = 4
_SPAN = 128
"""Inputs that share a step where they are rounded."""

_AHEAD = 4096
"""Bytes of values that are asked for before they are needed: at the border of a page a processor's own prefetcher
stops."""

_INFINITY = 0x7F800000


def selects(machine: Machine) -> bool:
    """Whether a machine selects among four floats by one instruction: on vectors, or by a load of a GPU's thread."""
    return machine.dot == "dp4a" or (machine.lanes in (8, 16) and machine.triple.startswith("x86_64"))


def rounds(machine: Machine, dtype: str) -> bool:
    """Whether the kernel for values of a type multiplies integers."""
    return dtype == "int8" and machine.dot == "vnni512"


def inputs_of_quad(kept: int) -> int:
    """Inputs that a quad of slots is multiplied with."""
    return QUAD * _GROUP // kept


def quads(k: int, kept: int) -> int:
    """Quads of a column."""
    return -(-k // inputs_of_quad(kept))


def _select(machine: Machine, group: Any, places: Any) -> Any:
    wide = "512" if machine.lanes == 16 else "256"
    name = f"llvm.x86.{'avx512' if machine.lanes == 16 else 'avx'}.vpermilvar.ps.{wide}"
    return T.call_llvm_pure_intrin(f"float32x{machine.lanes}", name, group, places)


def _repeated(vector: Any, size: int, times: int) -> Any:
    return tirx.Shuffle([vector] * times, list(range(size * times)))


@cache
def nm_matmul(machine: Machine, *, rows: int | None, k: int, n: int, kept: int, dtype: str) -> Any:
    """Kernel `(x (rows, K), values, places, scale (B * 16,), y (rows, N))`, B = blocks of 16 columns.

    Args:
        machine: What it is for; see `selects`.
        rows: Rows; None for any number.
        k: Inputs.
        n: Outputs.
        kept: Weights stored of four, 1 or 2.
        dtype: Of the values, (B, quads, 64): float32, float16 or int8. By slot and then column, but the other way round
            if they are multiplied as integers; see `rounds`. Places are uint8, (B, quads, 16), the first slot lowest.
    """
    if rounds(machine, dtype):
        return _of_integers(rows, k, n, kept)
    lanes = machine.lanes
    m = tirx.Var("rows", "int64") if rows is None else rows
    blocks, count, each = -(-n // COLUMNS), quads(k, kept), inputs_of_quad(kept)
    halves = COLUMNS // lanes
    padded = count * each
    floats = f"float32x{lanes}"

    def lane(index):
        return T.ramp(index * lanes, 1, lanes)

    lines = {"float32": 4, "float16": 2, "int8": 1}[dtype]  # of memory that a quad's values take
    ahead = _AHEAD // (QUAD * COLUMNS * lines)

    @T.inline
    def some(wide, values, places, scale, y, row, b, height, sums_of):
        sums = T.alloc_buffer((height * halves * sums_of * lanes,), "float32")
        bits = T.alloc_buffer((COLUMNS,), "int32")
        for i in T.unroll(height * halves * sums_of):
            sums[lane(i)] = T.broadcast(T.float32(0), lanes)
        for q in T.serial(count):
            for i in T.unroll(lines):
                fetch(values[b, q + ahead, i * QUAD * COLUMNS // lines])
            for h in T.unroll(halves):
                bits[lane(h)] = T.Cast(f"int32x{lanes}", places[b, q, lane(h)])
            for s in T.unroll(QUAD):
                for h in T.unroll(halves):
                    place: T.let = T.shift_right(bits[lane(h)], T.broadcast(2 * s, lanes))
                    value: T.let = T.Cast(floats, values[b, q, T.ramp(s * COLUMNS + h * lanes, 1, lanes)])
                    for r in T.unroll(height):
                        group: T.let = _repeated(
                            wide[row + r, T.ramp(q * each + s // kept * _GROUP, 1, _GROUP)], _GROUP, lanes // _GROUP
                        )
                        at = T.meta_var(lane((r * halves + h) * sums_of + s % sums_of))
                        sums[at] = sums[at] + _select(machine, group, place) * value
        for r in T.unroll(height):
            line = T.alloc_buffer((COLUMNS,), "float32")
            for h in T.unroll(halves):
                line[lane(h)] = sums[lane((r * halves + h) * sums_of)]
                for s in T.unroll(sums_of - 1):
                    line[lane(h)] = line[lane(h)] + sums[lane((r * halves + h) * sums_of + s + 1)]
                line[lane(h)] = line[lane(h)] * scale[T.ramp(b * COLUMNS + h * lanes, 1, lanes)]
            for c in T.serial(T.min(COLUMNS, n - b * COLUMNS)):
                y[row + r, b * COLUMNS + c] = line[c]

    @T.prim_func
    def kernel(x_: T.handle, v_: T.handle, p_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        values = T.match_buffer(v_, (blocks, count, QUAD * COLUMNS), dtype)
        places = T.match_buffer(p_, (blocks, count, COLUMNS), "uint8")
        scale = T.match_buffer(s_, (blocks * COLUMNS,), "float32")
        y = T.match_buffer(y_, (m, n), "float32")
        wide = T.alloc_buffer((m, padded), "float32")
        for row in T.serial(m):
            for i in T.serial(padded):
                wide[row, i] = T.if_then_else(i < k, x[row, i], T.float32(0))
        for b in T.parallel(blocks):
            for i in T.serial(m // 4):
                some(wide, values, places, scale, y, i * 4, b, 4, 1)
            for i in T.serial(m % 4):
                some(wide, values, places, scale, y, m // 4 * 4 + i, b, 1, QUAD)

    return kernel


def _of_integers(rows: int | None, k: int, n: int, kept: int) -> Any:
    """`nm_matmul` by VPDPBUSD on 512 bits: inputs are rounded to 8 bits, 128 with a step of their own."""
    m = tirx.Var("rows", "int64") if rows is None else rows
    blocks, count, each = -(-n // COLUMNS), quads(k, kept), inputs_of_quad(kept)
    padded = -(-count * each // _SPAN) * _SPAN
    spans, of_span = padded // _SPAN, _SPAN // each
    ahead = _AHEAD // (QUAD * COLUMNS)
    starts = 0x0C080400 if kept == 1 else 0x04040000

    def dot(total, unsigned, signed):
        return T.call_llvm_pure_intrin("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, unsigned, signed)

    def lane(index):
        return T.ramp(index * 16, 1, 16)

    def word(value):
        return T.broadcast(T.int32(value), 16)

    def selection(bits):
        pairs = T.bitwise_and(T.bitwise_or(bits, T.shift_left(bits, word(12))), word(0x000F000F))
        both = T.bitwise_and(T.bitwise_or(pairs, T.shift_left(pairs, word(6))), word(0x03030303))
        return T.reinterpret("int8x64", T.bitwise_or(both, word(starts)))

    @T.inline
    def rounded(x, integers, steps, row):
        for s in T.serial(spans):
            most = T.alloc_buffer((1,), "int32")
            inverse = T.alloc_buffer((1,), "float32")
            most[0] = 0
            for i in T.serial(T.min(_SPAN, k - s * _SPAN)):
                bits: T.let = T.reinterpret("int32", x[row, s * _SPAN + i])
                most[0] = T.max(most[0], T.bitwise_and(bits, T.int32(0x7FFFFFFF)))
            largest: T.let = T.reinterpret("float32", most[0])
            # What is tiny has no finite inverse; what is not finite makes its step, and so all sums, NaN.
            inverse[0] = T.Select(
                T.bitwise_and(largest > T.float32(1e-35), most[0] < _INFINITY), T.float32(127) / largest, T.float32(0)
            )
            steps[row, s] = T.Select(
                most[0] < _INFINITY, largest * T.float32(1 / 127), T.reinterpret("float32", T.int32(0x7FC00000))
            )
            for i in T.serial(T.max(0, T.min(_SPAN, k - s * _SPAN))):
                value: T.let = T.Cast("int32", T.nearbyint(x[row, s * _SPAN + i] * inverse[0]))
                integers[row, s * _SPAN + i] = T.Cast("uint8", value + 128)
            for i in T.serial(T.min(_SPAN, T.max(0, (s + 1) * _SPAN - k))):
                integers[row, (s + 1) * _SPAN - 1 - i] = T.uint8(128)

    @T.inline
    def some(integers, steps, values, places, scale, y, row, b, height):
        sums = T.alloc_buffer((height * 16,), "float32")
        products = T.alloc_buffer((height * 16 + 16,), "int32")
        for r in T.unroll(height):
            sums[lane(r)] = T.broadcast(T.float32(0), 16)
        for s in T.serial(spans):
            for r in T.unroll(height + 1):
                products[lane(r)] = word(0)
            for j in T.serial(T.min(of_span, count - s * of_span)):
                q: T.let = s * of_span + j
                fetch(values[b, q + ahead, 0])
                select: T.let = selection(T.Cast("int32x16", places[b, q, T.ramp(0, 1, 16)]))
                value: T.let = values[b, q, T.ramp(0, 1, 64)]
                # Of the 128 that each input has too much.
                products[lane(height)] = dot(products[lane(height)], T.broadcast(T.int8(-128), 64), value)
                for r in T.unroll(height):
                    groups: T.let = _repeated(
                        T.reinterpret(f"int8x{each}", integers[row + r, T.ramp(q * each, 1, each)]), each, 64 // each
                    )
                    chosen: T.let = T.call_llvm_pure_intrin("int8x64", "llvm.x86.avx512.pshuf.b.512", groups, select)
                    products[lane(r)] = dot(products[lane(r)], chosen, value)
            for r in T.unroll(height):
                product: T.let = T.Cast("float32x16", products[lane(r)] - products[lane(height)])
                sums[lane(r)] = sums[lane(r)] + product * T.broadcast(steps[row + r, s], 16)
        for r in T.unroll(height):
            line = T.alloc_buffer((COLUMNS,), "float32")
            line[T.ramp(0, 1, 16)] = sums[lane(r)] * scale[T.ramp(b * COLUMNS, 1, 16)]
            for c in T.serial(T.min(COLUMNS, n - b * COLUMNS)):
                y[row + r, b * COLUMNS + c] = line[c]

    @T.prim_func
    def kernel(x_: T.handle, v_: T.handle, p_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        values = T.match_buffer(v_, (blocks, count, QUAD * COLUMNS), "int8")
        places = T.match_buffer(p_, (blocks, count, COLUMNS), "uint8")
        scale = T.match_buffer(s_, (blocks * COLUMNS,), "float32")
        y = T.match_buffer(y_, (m, n), "float32")
        integers = T.alloc_buffer((m, padded), "uint8")
        steps = T.alloc_buffer((m, spans), "float32")
        for row in T.serial(m):
            rounded(x, integers, steps, row)
        for b in T.parallel(blocks):
            for i in T.serial(m // 4):
                some(integers, steps, values, places, scale, y, i * 4, b, 4)
            for i in T.serial(m % 4):
                some(integers, steps, values, places, scale, y, m // 4 * 4 + i, b, 1)

    return kernel
