"""Products of few rows by DP4A, which are bound by reading the weight.

A block reads a panel in one piece, a warp 512 bytes side by side, and each thread has four loads of 16 bytes on their
way, while the words of the rows wait in shared memory. Threads share K, and so do blocks where panels are too few to
fill the GPU; their sums are integers, whose order does not matter.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import Form, Rows, dp4a, ended, taker
from onnxcomp.targets.tvm.gpu.kernels._int8_output import WORD
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats

FEW = 16
"""Rows up to which the weight is read once, straight into registers."""

_THREADS = 256
_AHEAD = 4
"""Loads of the weight that a thread has on their way."""

_WAITING = 6144
"""Words of rows that wait in shared memory, at most."""


def few(machine: Gpu, panels: Panels, rows: int | None, m: Any, source: Rows, output: Codes | Floats) -> Any:
    """The macro of `_int8_product.product` for at most `FEW` rows.

    Where their number is not known, a block takes four of them: one row is as fast as four, and more read the weight
    several times, but from the cache.
    """
    columns = panels.columns
    high = 4 if rows is None else max(1, rows)
    tiles = T.max((m + high - 1) // high, 1) if rows is None else 1
    quads = columns // WORD
    slots = _THREADS // quads  # words of K that are multiplied at the same time
    unit = slots * _AHEAD
    units = -(-source.groups // unit)
    parts = max(1, min(units, -(-2 * machine.multiprocessors // panels.count)))
    share = max(1, min(-(-units // parts), _WAITING // (high * unit))) * unit
    form = Form(
        panels=panels, rows=m, most=FEW if rows is None else rows, source=source, output=output,
        splits=-(-source.groups // share), share=share,
    )  # fmt: skip
    tables, take = taker(form)
    chunk = min(high, 4)  # rows that the sums of all threads are added up of at the same time

    @T.inline
    def stage(x, words, row, start, t):
        for h in T.serial(high):
            for i in T.serial(-(-share // _THREADS)):
                if i * _THREADS + t < share:
                    words[h * share + i * _THREADS + t] = form.word(
                        x, row + h, source.place(row + h), start + i * _THREADS + t
                    )

    @T.inline
    def load(w, ahead, panel, group, quad):
        for u in T.unroll(_AHEAD):
            ahead[T.ramp(u * WORD, 1, WORD)] = form.weights(w, panel, group + u * slots, quad)

    @T.inline
    def multiply(words, read, sums, group):
        for u in T.unroll(_AHEAD):
            for h in T.unroll(high):
                for c in T.unroll(WORD):
                    sums[h * WORD + c] = dp4a(
                        words[h * share + group + u * slots], read[u * WORD + c], sums[h * WORD + c]
                    )

    @T.inline
    def gather(heap, sums, slot, quad, first):
        for h in T.unroll(chunk):
            if first + h < high:
                heap[T.ramp((h * slots + slot) * columns + quad * WORD, 1, WORD)] = sums[
                    T.ramp((first + h) * WORD, 1, WORD)
                ]

    @T.inline
    def total(heap, line, read, h, quad):
        for c in T.unroll(WORD):
            line[c] = 0
        for s in T.serial(slots):
            read[T.ramp(0, 1, WORD)] = heap[T.ramp((h * slots + s) * columns + quad * WORD, 1, WORD)]
            for c in T.unroll(WORD):
                line[c] = line[c] + read[c]

    @T.inline
    def launch(part, x, w, o, a, r, y):
        for panel in T.thread_binding(panels.count, thread="blockIdx.x"):
            for split in T.thread_binding(form.splits, thread="blockIdx.y"):
                for tile in T.thread_binding(tiles, thread="blockIdx.z"):
                    for t in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        words = T.alloc_buffer((high * share,), "int32", scope="shared")
                        heap = T.alloc_buffer((chunk * slots * columns,), "int32", scope="shared")
                        sums = T.alloc_buffer((high * WORD,), "int32", scope="local")
                        read = T.alloc_buffer((_AHEAD * WORD,), "int32", scope="local")
                        ahead = T.alloc_buffer((_AHEAD * WORD,), "int32", scope="local")
                        line = T.alloc_buffer((WORD,), "int32", scope="local")
                        starts = T.alloc_buffer((WORD,), "int32", scope="local")
                        scales = T.alloc_buffer((WORD,), "float32", scope="local")
                        biases = T.alloc_buffer((WORD,), "float32", scope="local")
                        start: T.let = split * share
                        slot: T.let = t // quads
                        column: T.let = panel * columns + t % quads * WORD
                        for i in T.unroll(high * WORD):
                            sums[i] = 0
                        load(w, ahead, panel, start + slot, t % quads)
                        stage(x, words, tile * high, start, t)
                        T.tvm_storage_sync("shared")
                        for i in T.serial(share // unit - 1):
                            for c in T.unroll(_AHEAD * WORD):
                                read[c] = ahead[c]
                            load(w, ahead, panel, start + (i + 1) * unit + slot, t % quads)
                            multiply(words, read, sums, i * unit + slot)
                        multiply(words, ahead, sums, share - unit + slot)
                        tables(o, a, starts, scales, biases, 0, column)
                        for i in T.unroll(-(-high // chunk)):
                            T.tvm_storage_sync("shared")
                            gather(heap, sums, slot, t % quads, i * chunk)
                            T.tvm_storage_sync("shared")
                            row: T.let = i * chunk + slot
                            if slot < chunk and tile * high + row < m:
                                total(heap, line, read, slot, t % quads)
                                take(part, line, 0, starts, scales, biases, 0, r, y, split, tile * high + row, column)

    return ended(form, launch)
