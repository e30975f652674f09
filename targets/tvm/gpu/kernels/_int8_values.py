"""Ops of 8-bit codes and floats value by value, four values a thread: a word of codes, or 16 bytes of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD, joined

_THREADS = 256


def mapped(
    size: int | None, dtype: str, out: str, function: Callable[[Any, Any], Any], *, other: tuple[str, int] | None = None
) -> Any:
    """Kernel `(a (size), b, y (size))`; bound by reading and writing, which warps do side by side.

    Args:
        size: Number of values; None for any.
        dtype: Of `a`.
        out: Of `y`.
        function: Of a value of `a`, codes as int32, and one of `b`, or the buffer `b`. It gives a float32 expression,
            or a code as an int32.
        other: Type and size of `b`, where that has not the type and size of `a`; then `function` is given the buffer.
    """
    n = tirx.Var("size", "int64") if size is None else size
    numbers = "float32" if dtype == "float32" else "int32"
    b_type, b_size = (dtype, n) if other is None else other

    def part(word: Any, c: int) -> Any:
        """A code of a word."""
        if dtype == "uint8":
            return T.bitwise_and(T.shift_right(word, T.int32(8 * c)), T.int32(255))
        return T.shift_right(T.shift_left(word, T.int32(24 - 8 * c)), T.int32(24))

    def four(line: Any) -> list[Any]:
        return [line[c] for c in range(WORD)] if numbers == "float32" else [part(line[0], c) for c in range(WORD)]

    def found(first: Any, second: Any, b: Any) -> list[Any]:
        others = four(second) if other is None else [b] * WORD
        return [function(value, and_) for value, and_ in zip(four(first), others, strict=True)]

    @T.inline
    def read(line, a, at):
        if numbers == "float32":
            line[T.ramp(0, 1, WORD)] = a[T.ramp(at, 1, WORD)]
        else:
            line[0] = T.reinterpret("int32", a[T.ramp(at, 1, WORD)])

    @T.inline
    def word(a, b, y, at):
        first = T.alloc_buffer((WORD,), numbers, scope="local")
        second = T.alloc_buffer((WORD,), numbers, scope="local")
        read(first, a, at)
        if other is None:
            read(second, b, at)
        if out == "float32":
            y[T.ramp(at, 1, WORD)] = T.Shuffle(found(first, second, b), list(range(WORD)))
        else:
            y[T.ramp(at, 1, WORD)] = joined(found(first, second, b), out)

    @T.prim_func
    def kernel(a_: T.handle, b_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        a = T.match_buffer(a_, (n,), dtype)
        b = T.match_buffer(b_, (b_size,), b_type)
        y = T.match_buffer(y_, (n,), out)
        for block in T.thread_binding(T.max((n + _THREADS * WORD - 1) // (_THREADS * WORD), 1), thread="blockIdx.x"):
            for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                at: T.let = (block * _THREADS + t) * WORD
                if at + WORD <= n:
                    word(a, b, y, at)
                else:
                    for c in T.serial(WORD):
                        if at + c < n:
                            y[at + c] = T.Cast(
                                out,
                                function(T.Cast(numbers, a[at + c]), T.Cast(numbers, b[at + c]))
                                if other is None
                                else function(T.Cast(numbers, a[at + c]), b),
                            )

    return kernel
