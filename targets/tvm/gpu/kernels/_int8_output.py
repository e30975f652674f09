"""What becomes of int32 sums on a GPU, rounded as on a CPU: every step by a function that nvcc leaves as it is.

A multiplication and an addition that nvcc found side by side would become one instruction, which rounds once.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._scalar import activated
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

WORD = 4
"""Columns that are put out at once."""


def times(a: Any, b: Any) -> Any:
    """Product of two float32 expressions."""
    return T.call_pure_extern("float32", "__fmul_rn", a, b)


def plus(a: Any, b: Any) -> Any:
    """Sum of two float32 expressions."""
    return T.call_pure_extern("float32", "__fadd_rn", a, b)


def divided(a: Any, b: Any) -> Any:
    """Quotient of two float32 expressions."""
    return T.call_pure_extern("float32", "__fdiv_rn", a, b)


def fused(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` of float32 expressions, rounded once."""
    return T.call_pure_extern("float32", "__fmaf_rn", a, b, c)


def rounded(x: Any) -> Any:
    """A float32 expression as int32, halves to even; what is too small becomes the least integer."""
    return T.call_pure_extern("int32", "__float2int_rn", x)


def quantized(x: Any, codes: Codes) -> Any:
    """Code, as an int32, of a float32 expression in units of the output's scale; that of NaN is the greatest."""
    integer = rounded(T.min(x, T.float32(codes.high - codes.zero)))
    return T.max(integer, T.int32(codes.low - codes.zero)) + T.int32(codes.zero)


def value(total: Any, scale: Any, bias: Any, residual: Any, output: Codes | Floats) -> Any:
    """What is stored for a sum; a code as an int32.

    Args:
        total: The sum, int32.
        scale: Of its column.
        bias: Of its column; only floats have one.
        residual: Another value that is added; None for none.
        output: What is stored.
    """
    if isinstance(output, Codes):
        return quantized(times(T.Cast("float32", total), scale), output)
    found = fused(T.Cast("float32", total), scale, bias)
    return activated(found if residual is None else plus(found, residual), output.epilogue)


def joined(bytes_: Any, dtype: str) -> Any:
    """Four int32 expressions with a code each, as a vector of codes."""
    word = None
    for i, code in enumerate(bytes_):
        byte = T.bitwise_and(code, T.int32(255)) if i < WORD - 1 else code
        byte = T.shift_left(byte, T.int32(8 * i)) if i else byte
        word = byte if word is None else T.bitwise_or(word, byte)
    return T.reinterpret(f"{dtype}x{WORD}", word)


def store(n: int, output: Codes | Floats) -> tuple[Any, Any]:
    """Macros that put out the sums of four columns of a row.

    Returns:
        `(offset, affine, starts, scales, biases, i, column)`, which loads what belongs to four columns, the first a
        multiple of four, to the places from `i` on of three local buffers; and `(sums, first, starts, scales, biases,
        i, residual, y, row, column)`, which stores what becomes of the four sums from `first` on. Columns from `n` on
        are left out; offset and affine have whole words.
    """
    floats = isinstance(output, Floats)
    aligned = n % WORD == 0

    @T.inline
    def tables(offset, values, starts, scales, biases, i, column):
        starts[T.ramp(i, 1, WORD)] = offset[T.ramp(column, 1, WORD)]
        scales[T.ramp(i, 1, WORD)] = values[0, T.ramp(column, 1, WORD)]
        if floats:
            biases[T.ramp(i, 1, WORD)] = values[1, T.ramp(column, 1, WORD)]

    def one(sums: Any, first: Any, starts: Any, scales: Any, biases: Any, at: Any, other: Any) -> Any:
        return value(sums[first] + starts[at], scales[at], biases[at], other if output.residual else None, output)

    def codes(sums: Any, first: Any, starts: Any, scales: Any, biases: Any, at: Any) -> Any:
        found = [one(sums, first + c, starts, scales, biases, at + c, None) for c in range(WORD)]
        return joined(found, output.dtype)

    @T.inline
    def put(sums, first, starts, scales, biases, i, residual, y, row, column):
        if aligned:
            if column < n:
                if floats:
                    line = T.alloc_buffer((WORD,), "float32", scope="local")
                    if output.residual:
                        line[T.ramp(0, 1, WORD)] = residual[row, T.ramp(column, 1, WORD)]
                    for c in T.unroll(WORD):
                        line[c] = one(sums, first + c, starts, scales, biases, i + c, line[c])
                    y[row, T.ramp(column, 1, WORD)] = line[T.ramp(0, 1, WORD)]
                else:
                    y[row, T.ramp(column, 1, WORD)] = codes(sums, first, starts, scales, biases, i)
        else:
            for c in T.unroll(WORD):
                if column + c < n:
                    y[row, column + c] = T.Cast(
                        output.dtype,
                        one(sums, first + c, starts, scales, biases, i + c, residual[row, column + c]),
                    )

    return tables, put
