"""Attention of few rows, as while a text is written: blocks share the keys of a head, a second launch joins their sums.

Bound by memory: keys and values are read once, whole rows by lanes beside one another, four of them under way a thread.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._heads import Heads
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside, zeros
from onnxcomp.targets.tvm.gpu.kernels._warp import add_lanes, top_lanes
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu

_THREADS = 128
_WARPS = _THREADS // WARP
_SPAN = 128
"""Keys of a block, half of them where that leaves multiprocessors idle."""

_LIKELY = 1024
"""Keys that there are taken to be where their number is not known."""

_UNDER_WAY = 4
"""Rows of keys or values that a thread loads before it uses the first."""

_QUERIES = 4096
"""Values of queries that fit in shared memory beside what else is there."""

_JOINING = 8
"""Warps that share the parts of a row when they are joined."""

_CHANNELS = 2048
"""Channels up to which a thread can hold its part of a key."""

_HELD = 64
"""Values of keys that a thread holds at most."""


def most_rows(k_size: int) -> int:
    """Rows of so many channels that `split_keys` can take."""
    return _QUERIES // k_size if k_size <= _CHANNELS else 0


def split_keys(of: Heads, machine: Gpu, rows: int) -> Any:
    """A macro `(q, k, v, mask, out)` on flat buffers.

    Args:
        of: Sizes and places.
        machine: What it is for.
        rows: Rows of q at most.
    """
    likely = of.keys if isinstance(of.keys, int) else _LIKELY
    span = _SPAN // 2 if of.heads * -(-likely // _SPAN) < machine.multiprocessors else _SPAN
    fixed = isinstance(of.keys, int)
    splits = max(-(-of.keys // span), 1) if fixed else T.max((of.keys + span - 1) // span, 1)
    whole = fixed and splits == 1
    k_vector, v_vector = (4 if size % 4 == 0 else 1 for size in (of.k_size, of.v_size))
    team = min(WARP, 1 << (-(-of.k_size // k_vector) - 1).bit_length())
    chunks = -(-of.k_size // (team * k_vector))
    teams = _THREADS // team
    turns = -(-span // teams)
    ahead = max(1, min(_UNDER_WAY, turns, _HELD // (chunks * k_vector)))
    columns = -(-of.v_size // v_vector)
    across = min(columns, _THREADS)
    slices = _THREADS // across
    v_turns = -(-span // (slices * _UNDER_WAY))
    panels = -(-columns // across)
    width = across * v_vector

    @T.inline
    def load_queries(q, held, head, thread):
        for i in T.serial(-(-rows * of.k_size // _THREADS)):
            at: T.let = i * _THREADS + thread
            if at < rows * of.k_size:
                if of.has_row(at // of.k_size):
                    held[at] = q[of.q_at(head, at // of.k_size) + at % of.k_size]
                else:
                    held[at] = T.float32(0)

    @T.inline
    def score(held, k, scores, head, first, thread):
        keys = T.alloc_buffer((ahead * chunks * k_vector,), "float32", scope="local")
        sums = T.alloc_buffer((rows,), "float32", scope="local")
        lane: T.let = thread % team
        for turn in T.serial(-(-turns // ahead)):
            for u in T.unroll(ahead):
                for c in T.unroll(chunks):
                    key: T.let = first + (turn * ahead + u) * teams + thread // team
                    at: T.let = (c * team + lane) * k_vector
                    if key < of.keys and at < of.k_size:
                        keys[beside((u * chunks + c) * k_vector, k_vector)] = k[
                            beside(of.k_at(head, key) + at, k_vector)
                        ]
                    else:
                        keys[beside((u * chunks + c) * k_vector, k_vector)] = zeros(k_vector)
            for u in T.unroll(ahead):
                place: T.let = (turn * ahead + u) * teams + thread // team
                for i in T.unroll(rows):
                    sums[i] = T.float32(0)
                    for c in T.unroll(chunks):
                        at_: T.let = (c * team + lane) * k_vector
                        if at_ < of.k_size:
                            for e in T.unroll(k_vector):
                                sums[i] = (
                                    sums[i] + held[i * of.k_size + at_ + e] * keys[(u * chunks + c) * k_vector + e]
                                )
                    add_lanes(sums, i, team)
                    if lane == 0 and place < span:
                        scores[i * span + place] = sums[i] * T.float32(of.scale)

    @T.inline
    def exponentials(scores, powers, totals, tops, mask, head, first, thread):
        """Of the scores, a row a warp; each row's sum and greatest score."""
        values = T.alloc_buffer((span // WARP,), "float32", scope="local")
        one = T.alloc_buffer((2,), "float32", scope="local")
        lane: T.let = thread % WARP
        for turn in T.unroll(-(-rows // _WARPS)):
            row: T.let = turn * _WARPS + thread // WARP
            if row < rows:
                one[0] = T.float32(-math.inf)
                one[1] = T.float32(0)
                for j in T.unroll(span // WARP):
                    key: T.let = first + j * WARP + lane
                    if key < of.keys:
                        if of.mask is not None:
                            values[j] = scores[row * span + j * WARP + lane] + mask[of.mask_at(head, row) + key]
                        else:
                            values[j] = scores[row * span + j * WARP + lane]
                    else:
                        values[j] = T.float32(-math.inf)
                    one[0] = T.max(one[0], values[j])
                top_lanes(one, 0, WARP)
                # Where all is masked, nothing is subtracted: exponentials are zeros then.
                base: T.let = T.Select(one[0] == T.float32(-math.inf), T.float32(0), one[0])
                for j in T.unroll(span // WARP):
                    values[j] = T.exp(values[j] - base)
                    one[1] = one[1] + values[j]
                    powers[row * span + j * WARP + lane] = values[j]
                add_lanes(one, 1, WARP)
                if lane == 0:
                    tops[row] = one[0]
                    totals[row] = one[1]

    @T.inline
    def add_values(v, powers, sums, head, first, column, slice_):
        values = T.alloc_buffer((_UNDER_WAY * v_vector,), "float32", scope="local")
        for i in T.unroll(rows * v_vector):
            sums[i] = T.float32(0)
        for turn in T.serial(v_turns):
            for u in T.unroll(_UNDER_WAY):
                place: T.let = (turn * _UNDER_WAY + u) * slices + slice_
                if place < span and first + place < of.keys:
                    values[beside(u * v_vector, v_vector)] = v[beside(of.v_at(head, first + place) + column, v_vector)]
                else:
                    values[beside(u * v_vector, v_vector)] = zeros(v_vector)
            for u in T.unroll(_UNDER_WAY):
                place_: T.let = (turn * _UNDER_WAY + u) * slices + slice_
                if place_ < span:
                    for i in T.unroll(rows):
                        for e in T.unroll(v_vector):
                            sums[i * v_vector + e] = (
                                sums[i * v_vector + e] + powers[i * span + place_] * values[u * v_vector + e]
                            )

    @T.inline
    def store(out, parts, totals, joined, head, line, panel, thread):
        """Sums of all slices: the output, or a part of it."""
        one = T.alloc_buffer((1,), "float32", scope="local")
        for turn in T.serial(-(-rows * width // _THREADS)):
            at: T.let = turn * _THREADS + thread
            row: T.let = at // width
            column: T.let = panel * width + at % width
            if at < rows * width and of.has_row(row) and column < of.v_size:
                one[0] = T.float32(0)
                for s in T.unroll(slices):
                    one[0] = one[0] + joined[s * (rows * width) + at]
                if whole:
                    out[of.out_at(head, row) + column] = one[0] / totals[row]
                else:
                    parts[(line[0] + row) * of.v_size + column] = one[0]

    @T.inline
    def one_part(q, k, v, mask, out, parts, ends, head, split, thread):
        held = T.alloc_buffer((rows * of.k_size,), "float32", scope="shared")
        scores = T.alloc_buffer((rows * span,), "float32", scope="shared")
        powers = T.alloc_buffer((rows * span,), "float32", scope="shared")
        tops = T.alloc_buffer((rows,), "float32", scope="shared")
        totals = T.alloc_buffer((rows,), "float32", scope="shared")
        joined = T.alloc_buffer((slices * rows * width,), "float32", scope="shared")
        sums = T.alloc_buffer((rows * v_vector,), "float32", scope="local")
        # In a register, so that TVM does not try to find out what of the parts is used.
        line = T.alloc_buffer((1,), "int64", scope="local")
        line[0] = split * (of.count * of.rows) + head * of.rows
        load_queries(q, held, head, thread)
        T.tvm_storage_sync("shared")
        score(held, k, scores, head, split * span, thread)
        T.tvm_storage_sync("shared")
        exponentials(scores, powers, totals, tops, mask, head, split * span, thread)
        T.tvm_storage_sync("shared")
        if not whole and thread < rows and of.has_row(thread):
            ends[(line[0] + thread) * 2] = tops[thread]
            ends[(line[0] + thread) * 2 + 1] = totals[thread]
        for panel in T.serial(panels):
            column: T.let = panel * width + thread % across * v_vector
            if thread < across * slices and column < of.v_size:
                add_values(v, powers, sums, head, split * span, column, thread // across)
            # TVM may put the exponentials and what follows in the same place.
            T.tvm_storage_sync("shared")
            if thread < across * slices and column < of.v_size:
                for i in T.unroll(rows):
                    for e in T.unroll(v_vector):
                        joined[(thread // across * rows + i) * width + thread % across * v_vector + e] = sums[
                            i * v_vector + e
                        ]
            T.tvm_storage_sync("shared")
            store(out, parts, totals, joined, head, line, panel, thread)
            T.tvm_storage_sync("shared")

    @T.inline
    def merge(one, top, total, value):
        """Adds a part to `one`: greatest score, sum of exponentials, and their product with values."""
        last: T.let = one[0]
        one[0] = T.max(last, top)
        base: T.let = T.Select(one[0] == T.float32(-math.inf), T.float32(0), one[0])
        before: T.let = T.exp(last - base)
        factor: T.let = T.exp(top - base)
        one[1] = one[1] * before + total * factor
        one[2] = one[2] * before + value * factor

    @T.inline
    def join(out, parts, ends):
        stripes = T.meta_var(-(-of.v_size // WARP))
        for block in T.thread_binding(of.count * of.rows * stripes, thread="blockIdx.x"):
            for thread in T.thread_binding(_JOINING * WARP, thread="threadIdx.x"):
                kept = T.alloc_buffer((_JOINING * WARP * 3,), "float32", scope="shared")
                one = T.alloc_buffer((3,), "float32", scope="local")
                line: T.let = block // stripes
                column: T.let = block % stripes * WARP + thread % WARP
                warp: T.let = thread // WARP
                one[0] = T.float32(-math.inf)
                one[1] = T.float32(0)
                one[2] = T.float32(0)
                if column < of.v_size:
                    for turn in T.serial((splits + _JOINING - 1) // _JOINING):
                        split: T.let = turn * _JOINING + warp
                        if split < splits:
                            at: T.let = split * (of.count * of.rows) + line
                            merge(one, ends[at * 2], ends[at * 2 + 1], parts[at * of.v_size + column])
                for i in T.unroll(3):
                    kept[i * (_JOINING * WARP) + thread] = one[i]
                T.tvm_storage_sync("shared")
                if warp == 0 and column < of.v_size:
                    for w in T.unroll(_JOINING - 1):
                        other: T.let = (w + 1) * WARP + thread
                        merge(one, kept[other], kept[_JOINING * WARP + other], kept[2 * _JOINING * WARP + other])
                    out[of.out_at(T.truncdiv(line, of.rows), T.truncmod(line, of.rows)) + column] = one[2] / one[1]

    @T.inline
    def run(q, k, v, mask, out):
        # Of no more rows than there may be here: TVM makes buffers before it looks how many there are.
        count = T.meta_var(1 if whole else of.count * splits * T.min(of.rows, rows))
        if of.count * of.rows > 0:
            parts = T.alloc_buffer((count * of.v_size,), "float32")
            ends = T.alloc_buffer((count * 2,), "float32")
            for block in T.thread_binding(of.count * splits, thread="blockIdx.x"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    one_part(
                        q, k, v, mask, out, parts, ends, T.truncdiv(block, splits), T.truncmod(block, splits), thread
                    )
            if not whole:
                join(out, parts, ends)

    return run
