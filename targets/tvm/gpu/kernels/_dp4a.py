"""Sums of products of 8-bit integers by DP4A, which adds four products to a sum: what both forms have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD, store
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

_THREADS = 256


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of activations as words, of signed bytes.

    Attributes:
        groups: Words of a row.
        places: How many values `place` gives, one or three.
        place: What `word` has to know of a row, int32; it is worked out once a row.
        word: `(x, place, group)` is a word of a row; `x` is read only within its bounds.
    """

    groups: int
    places: int
    place: Callable[[Any], Sequence[Any]]
    word: Callable[[Any, Sequence[Any], Any], Any]


@dataclass(frozen=True, kw_only=True)
class Form:
    """How blocks share a product.

    Attributes:
        panels: Of the weight.
        rows: Rows, as an expression.
        most: Rows at most, where sums of parts are kept.
        source: The rows.
        output: What is stored.
        splits: Parts of K.
        share: Words of K of a part.
    """

    panels: Panels
    rows: Any
    most: int
    source: Rows
    output: Codes | Floats
    splits: int
    share: int

    @property
    def even(self) -> bool:
        """Whether no part has words beyond K."""
        return self.splits * self.share == self.source.groups

    def weights(self, w: Any, panel: Any, group: Any, quad: Any) -> Any:
        """Words of the weight for four columns, zeros beyond K."""
        wide = 4 * self.panels.lanes
        at = quad * (4 * WORD)
        read = T.reinterpret(f"int32x{WORD}", w[panel, group, at // wide, T.ramp(at % wide, 1, 4 * WORD)])
        if self.even:
            return read
        return T.if_then_else(group < self.source.groups, read, T.broadcast(T.int32(0), WORD))

    def word(self, x: Any, row: Any, place: Sequence[Any], group: Any) -> Any:
        """A word of a row, zero beyond the rows and beyond K."""
        inside = row < self.rows
        if not self.even:
            inside = T.And(inside, group < self.source.groups)
        return T.if_then_else(inside, self.source.word(x, place, group), T.int32(0))


def dp4a(a: Any, b: Any, total: Any) -> Any:
    """`total` plus four products of the signed bytes of two words."""
    return T.call_pure_extern("int32", "__dp4a", a, b, total)


def byte(code: Any) -> Any:
    """The bits of a code as an int32 from 0 to 255."""
    return T.Cast("int32", T.reinterpret("uint8", code))


def assembled(values: Sequence[Any]) -> Any:
    """A word of four int32 expressions from 0 to 255."""
    word = values[0]
    for i, value in enumerate(values[1:], 1):
        word = T.bitwise_or(word, T.shift_left(value, T.int32(8 * i)))
    return word


def filled(code: int) -> Any:
    """A word of four bytes that are all the same."""
    word = (code & 255) * 0x01010101
    return T.int32(word - ((word >> 31) << 32))


def taker(form: Form) -> tuple[Any, Any]:
    """The macros of `store`; the second one keeps sums in `part` if they are those of a part of K."""
    tables, put = store(form.panels.n, form.output)

    @T.inline
    def take(part, sums, first, starts, scales, biases, i, r, y, split, row, column):
        if form.splits == 1:
            put(sums, first, starts, scales, biases, i, r, y, row, column)
        else:
            part[split, row, T.ramp(column, 1, WORD)] = sums[T.ramp(first, 1, WORD)]

    return tables, take


def ended(form: Form, launch: Any) -> Any:
    """A macro that starts `launch`, and adds up the sums of parts if there are some."""
    splits, columns = form.splits, form.panels.count * form.panels.columns
    tables, put = store(form.panels.n, form.output)
    quads = columns // WORD

    @T.inline
    def total(part, line, read, row, column):
        for c in T.unroll(WORD):
            line[c] = 0
        for s in T.serial(splits):
            read[T.ramp(0, 1, WORD)] = part[s, row, T.ramp(column, 1, WORD)]
            for c in T.unroll(WORD):
                line[c] = line[c] + read[c]

    @T.inline
    def body(x, w, o, a, r, y):
        if splits == 1:
            launch(y, x, w, o, a, r, y)
        else:
            part = T.alloc_buffer((splits, form.most, columns), "int32")
            launch(part, x, w, o, a, r, y)
            for block in T.thread_binding(-(-form.most * quads // _THREADS), thread="blockIdx.x"):
                for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    line = T.alloc_buffer((WORD,), "int32", scope="local")
                    read = T.alloc_buffer((WORD,), "int32", scope="local")
                    starts = T.alloc_buffer((WORD,), "int32", scope="local")
                    scales = T.alloc_buffer((WORD,), "float32", scope="local")
                    biases = T.alloc_buffer((WORD,), "float32", scope="local")
                    row: T.let = (block * _THREADS + t) // quads
                    column: T.let = (block * _THREADS + t) % quads * WORD
                    if row < form.rows:
                        total(part, line, read, row, column)
                        tables(o, a, starts, scales, biases, 0, column)
                        put(line, 0, starts, scales, biases, 0, r, y, row, column)

    return body
