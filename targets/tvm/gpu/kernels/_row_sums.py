"""Sums of listed rows of a matrix: how blocks and threads share them.

What bounds this is the memory that weights come from. A block makes sums of some columns: threads beside one another
read 16 bytes each of the same row, 128 to 512 in one piece, and the block's `slices` take every so many-th entry of
the list, several of them on their way at a time. If columns do not give as many blocks as the GPU holds, lists are cut
into chunks, by the count that is known only then, so that all blocks have the same to do. Slices are added up in shared
memory, chunks by a second launch, both in order: sums are the same in every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import Gpu

_THREADS = 256

_LANES = (32, 16, 8)
"""Threads beside one another: the more, the longer the pieces that are read of a row."""

_FEWEST = 8
"""Entries of a list that a slice has at least, if all inputs count."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a weight is read and multiplied.

    Attributes:
        units: Loads that a row takes.
        each: Columns of a load.
        column: `(unit, index)` is the column of one of a unit's sums.
        words: Words of 32 bits of a load, with all that belongs to it.
        together: Loads of a thread that are on their way at a time.
        blocks: Blocks that a multiprocessor has registers for, and is to have.
        spare: Sums that a thread has besides those of columns.
        open: Macro `(sums, length of the list)` that sets what is spare; all of them are 0.
        load: Macro `(read, at, w, scale, zero, row of the weight, unit)` that fills words from `read[at]` on.
        add: Macro `(sums, read, at, x)` that adds a value times what was read.
        close: Macro `(sums, zero)` that brings what is spare into the sums.
        store: Macro `(y, row, column, sum, scale, afresh, total)`.
    """

    units: int
    each: int
    column: Callable[[Any, Any], Any]
    words: int
    together: int
    blocks: int
    spare: int = 0
    open: Any
    load: Any
    add: Any
    close: Any
    store: Any


def row_sums(machine: Gpu, form: Form, *, rows: int | None, k: int, n: int, most: int | None = None) -> Any:
    """A macro `(values, places, counts, w, scale, zero, afresh, total, y, rows)` that makes all sums.

    Args:
        machine: What it is for.
        form: Of the weight.
        rows: Rows of activations; None for any number, few most of the time.
        k: Inputs.
        n: Outputs.
        most: Rows that there are at most where it is launched: memory for parts is taken before that is known.
    """
    each, together = form.each, form.together
    lanes, tiles, chunks = _shares(machine, form, rows, k)
    slices = _THREADS // lanes
    quad = min(each, 4)  # sums that are stored at once
    quads, wide = each // quad, lanes * each
    load, add, close, store = form.load, form.add, form.close, form.store

    @T.inline
    def pass_(values, places, w, scale, zero, sums, row, first, end, unit, whole):
        x = T.alloc_buffer((together,), "float32", scope="local")
        at = T.alloc_buffer((together,), "int32", scope="local")
        read = T.alloc_buffer((together * form.words,), "int32", scope="local")
        # What is not there is the last one times zero: behind a condition, loads would wait for one another.
        for u in T.unroll(together):
            i: T.let = first + u * slices
            x[u] = values[row, i if whole else T.min(i, end - 1)]
            at[u] = places[row, i if whole else T.min(i, end - 1)]
            if not whole:  # noqa: SIM102, the first is decided when the kernel is made
                if i >= end:
                    x[u] = T.float32(0)
        for u in T.unroll(together):
            load(read, u * form.words, w, scale, zero, T.Cast("int64", at[u]), unit)
        for u in T.unroll(together):
            add(sums, read, u * form.words, x[u])

    @T.inline
    def tile_of(values, places, counts, w, scale, zero, afresh, total, y, part, heap, sums, row, tile, chunk, thread):
        lane: T.let = thread % lanes
        slice_: T.let = thread // lanes
        unit: T.let = tile * lanes + lane
        share: T.let = (counts[row] + chunks - 1) // chunks
        begin: T.let = T.min(chunk * share, counts[row])
        end: T.let = T.min(begin + share, counts[row])
        passes: T.let = (end - begin) // (slices * together)
        for j in T.unroll(each + form.spare):
            sums[j] = T.float32(0)
        form.open(sums, counts[row])
        if unit < form.units:
            for i in T.serial(passes):
                pass_(
                    values, places, w, scale, zero, sums, row, begin + i * (slices * together) + slice_, end, unit, True
                )
            rest: T.let = begin + passes * (slices * together)
            if rest < end:
                pass_(values, places, w, scale, zero, sums, row, rest + slice_, end, unit, False)
            close(sums, zero)
        for q in T.unroll(quads):
            heap[beside(slice_ * wide + (q * lanes + lane) * quad, quad)] = sums[beside(q * quad, quad)]
        T.tvm_storage_sync("shared")
        for i in T.serial((wide + _THREADS - 1) // _THREADS):
            j: T.let = i * _THREADS + thread
            own: T.let = j // (lanes * quad) * quad + j % quad
            column: T.let = form.column(tile * lanes + j // quad % lanes, own)
            if j < wide and column < n:
                sums[0] = T.float32(0)
                for s in T.unroll(slices):
                    sums[0] = sums[0] + heap[s * wide + j]
                if chunks == 1:
                    store(y, row, column, sums[0], scale, afresh, total)
                else:
                    part[row, chunk, column] = sums[0]

    @T.inline
    def add_chunks(scale, afresh, total, y, part, row, column):
        sums = T.alloc_buffer((1,), "float32", scope="local")
        sums[0] = T.float32(0)
        for i in T.unroll(chunks):
            sums[0] = sums[0] + part[row, i, column]
        store(y, row, column, sums[0], scale, afresh, total)

    @T.inline
    def body(values, places, counts, w, scale, zero, afresh, total, y, m):
        height = T.meta_var(T.max(m if most is None else T.min(m, most), 1))
        part = T.alloc_buffer((height if chunks > 1 else 1, chunks, n if chunks > 1 else 1), "float32")
        for block in T.thread_binding(T.max(m, 1) * tiles, thread="blockIdx.x"):
            for chunk in T.thread_binding(chunks, thread="blockIdx.y"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    with resident(form.blocks):
                        heap = T.alloc_buffer((slices * wide,), "float32", scope="shared")
                        sums = T.alloc_buffer((each + form.spare,), "float32", scope="local")
                        # Rows beside one another: where they need the same of a weight, it is in a cache.
                        if block % T.max(m, 1) < m:
                            tile_of(
                                values, places, counts, w, scale, zero, afresh, total, y, part, heap, sums,
                                block % T.max(m, 1), block // T.max(m, 1), chunk, thread,
                            )  # fmt: skip
        if chunks > 1:
            for block in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
                for some in T.thread_binding((n + _THREADS - 1) // _THREADS, thread="blockIdx.y"):
                    for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        if block < m and some * _THREADS + thread < n:
                            add_chunks(scale, afresh, total, y, part, block, some * _THREADS + thread)

    return body


def _shares(machine: Gpu, form: Form, rows: int | None, k: int) -> tuple[int, int, int]:
    """Threads beside one another, tiles of columns, and chunks of a list."""
    wanted = -(-form.blocks * machine.multiprocessors // (rows or 1))
    lanes = next((lanes for lanes in _LANES if -(-form.units // lanes) >= wanted), _LANES[-1])
    tiles = -(-form.units // lanes)
    most = max(1, k // (_THREADS // lanes * _FEWEST))
    return lanes, tiles, min(most, -(-wanted // tiles))
