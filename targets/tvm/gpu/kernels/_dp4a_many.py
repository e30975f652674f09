"""Products of many rows by DP4A, which are bound by arithmetic.

A block makes a tile of sums, a thread up to 8 x 8 in registers: four reads of 16 bytes from shared memory serve 64
DP4A. While a step of K is multiplied, the next one is on its way to registers. Blocks share K where tiles are too few
to fill the GPU; their sums are integers, whose order does not matter.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import Form, Rows, dp4a, ended, taker
from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

_STEP = 8
"""Words of K that a tile advances by: those of a row are 32 bytes, which memory is read by."""

_LEAST = 4
"""Steps that a part of K has at least."""


def many(machine: Gpu, panels: Panels, rows: int | None, m: Any, source: Rows, output: Codes | Floats) -> Any:
    """The macro of `_int8_product.product` for many rows."""
    columns, steps = panels.columns, -(-source.groups // _STEP)
    tall, parts = _cut(machine, rows, panels.count, steps)
    each = -(-steps // parts)
    form = Form(
        panels=panels, rows=m, most=rows or 0, source=source, output=output,
        splits=-(-steps // each), share=each * _STEP,
    )  # fmt: skip
    tables, take = taker(form)
    # The sums of a thread are blocks of 4 x 4, so far from each other that neighbours read what lies side by side.
    down, across = 2 if tall >= 64 else 1, 2 if columns >= 64 else 1
    over, under = columns // (across * WORD), tall // (down * WORD)
    threads = over * under
    lines = threads // _STEP  # rows that a word is read of at the same time
    fetches, loads = tall // lines, -(-_STEP * columns // (threads * WORD))
    whole = loads * threads * WORD == _STEP * columns
    pitch = tall + WORD  # the words of a row lie in different banks, and still where 16 bytes may be read
    places, quads = source.places, columns // WORD

    @T.inline
    def placed(place, row, i):
        place[i * places] = source.place(row)[0]
        if places > 1:
            place[i * places + 1] = source.place(row)[1]
            place[i * places + 2] = source.place(row)[2]

    def seen(x: Any, place: Any, row: Any, i: Any, group: Any) -> Any:
        return form.word(x, row, [place[i * places + p] for p in range(places)], group)

    @T.inline
    def load(x, w, place, words, read, row, panel, group, t):
        for i in T.unroll(fetches):
            words[i] = seen(x, place, row + i * lines, i, group + t % _STEP)
        for i in T.unroll(loads):
            if whole or t < _STEP * quads:
                at = i * threads + t
                read[T.ramp(i * WORD, 1, WORD)] = form.weights(w, panel, group + at // quads, at % quads)

    @T.inline
    def keep(left, right, words, read, t):
        for i in T.unroll(fetches):
            left[t % _STEP * pitch + i * lines + t // _STEP] = words[i]
        for i in T.unroll(loads):
            if whole or t < _STEP * quads:
                right[T.ramp((i * threads + t) * WORD, 1, WORD)] = read[T.ramp(i * WORD, 1, WORD)]

    @T.inline
    def multiply(left, right, mine, theirs, sums, t):
        for k in T.serial(_STEP):
            for d in T.unroll(down):
                mine[T.ramp(d * WORD, 1, WORD)] = left[T.ramp(k * pitch + (d * under + t // over) * WORD, 1, WORD)]
            for e in T.unroll(across):
                theirs[T.ramp(e * WORD, 1, WORD)] = right[T.ramp((k * quads + e * over + t % over) * WORD, 1, WORD)]
            for i in T.unroll(down * WORD):
                for j in T.unroll(across * WORD):
                    at = i * across * WORD + j
                    sums[at] = dp4a(mine[i], theirs[j], sums[at])

    @T.inline
    def put(part, sums, starts, scales, biases, o, a, r, y, split, row, column, t):
        for e in T.unroll(across):
            tables(o, a, starts, scales, biases, e * WORD, column + (e * over + t % over) * WORD)
        for d in T.unroll(down):
            for i in T.unroll(WORD):
                line: T.let = row + (d * under + t // over) * WORD + i
                if line < m:
                    for e in T.unroll(across):
                        take(
                            part, sums, ((d * WORD + i) * across + e) * WORD, starts, scales, biases, e * WORD, r, y,
                            split, line, column + (e * over + t % over) * WORD,
                        )  # fmt: skip

    @T.inline
    def launch(part, x, w, o, a, r, y):
        for tile in T.thread_binding((m + tall - 1) // tall, thread="blockIdx.x"):
            for panel in T.thread_binding(panels.count, thread="blockIdx.y"):
                for split in T.thread_binding(form.splits, thread="blockIdx.z"):
                    for t in T.thread_binding(threads, thread="threadIdx.x"):
                        left = T.alloc_buffer((_STEP * pitch,), "int32", scope="shared")
                        right = T.alloc_buffer((_STEP * columns,), "int32", scope="shared")
                        sums = T.alloc_buffer((down * across * WORD * WORD,), "int32", scope="local")
                        place = T.alloc_buffer((fetches * places,), "int32", scope="local")
                        words = T.alloc_buffer((fetches,), "int32", scope="local")
                        read = T.alloc_buffer((loads * WORD,), "int32", scope="local")
                        mine = T.alloc_buffer((down * WORD,), "int32", scope="local")
                        theirs = T.alloc_buffer((across * WORD,), "int32", scope="local")
                        starts = T.alloc_buffer((across * WORD,), "int32", scope="local")
                        scales = T.alloc_buffer((across * WORD,), "float32", scope="local")
                        biases = T.alloc_buffer((across * WORD,), "float32", scope="local")
                        first: T.let = tile * tall
                        for i in T.unroll(down * across * WORD * WORD):
                            sums[i] = 0
                        for i in T.unroll(fetches):
                            placed(place, first + t // _STEP + i * lines, i)
                        load(x, w, place, words, read, first + t // _STEP, panel, split * each * _STEP, t)
                        keep(left, right, words, read, t)
                        T.tvm_storage_sync("shared")
                        for s in T.serial(each - 1):
                            load(
                                x, w, place, words, read, first + t // _STEP, panel,
                                (split * each + s + 1) * _STEP, t,
                            )  # fmt: skip
                            multiply(left, right, mine, theirs, sums, t)
                            T.tvm_storage_sync("shared")
                            keep(left, right, words, read, t)
                            T.tvm_storage_sync("shared")
                        multiply(left, right, mine, theirs, sums, t)
                        put(part, sums, starts, scales, biases, o, a, r, y, split, first, panel * columns, t)

    return ended(form, launch)


def _cut(machine: Gpu, rows: int | None, count: int, steps: int) -> tuple[int, int]:
    """Rows of a tile, and parts of K, that give each multiprocessor two blocks if the work is enough for that."""
    if rows is None:
        return 64, 1
    wanted = 2 * machine.multiprocessors
    for tall in (128, 64):
        if rows >= tall and -(-rows // tall) * count >= wanted:
            return tall, 1
    tall = 64 if rows > 32 else 32
    return tall, max(1, min(steps // _LEAST, -(-wanted // (-(-rows // tall) * count))))
