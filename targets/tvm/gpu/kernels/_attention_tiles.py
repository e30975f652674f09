"""Attention of many rows: a block takes some rows of a head and goes over tiles of keys.

Scores of a tile never leave the block: their exponentials go through shared memory into the product with the values,
and sums of earlier tiles are scaled to the greatest score so far. Bound by arithmetic: a thread holds `high` x 4 scores
and `high` rows of the output in registers. What is needed next is on its way from memory meanwhile.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._heads import Heads
from onnxcomp.targets.tvm.gpu.kernels._tile import UNROLLED
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside, zeros
from onnxcomp.targets.tvm.gpu.kernels._warp import add_lanes, top_lanes

_THREADS = 256
SIDE = 16
"""Threads along rows, and along keys and channels."""

_KEYS = 64
"""Keys of a tile: four a thread."""

_DEPTH = 16
"""Channels of queries and keys, or rows of values, that are in shared memory at a time."""

_PAD = 4
"""Values between rows in shared memory, so that a warp writes to different banks."""

_WIDTH = 128
"""Channels of the output of a block at most; for more, several blocks compute the same scores."""


def tiles(of: Heads, high: int) -> Any:
    """A macro `(q, k, v, mask, out)` on flat buffers.

    Args:
        of: Sizes and places.
        high: Rows of a thread.
    """
    rows = SIDE * high
    panels = -(-of.v_size // _WIDTH)
    width = -(-of.v_size // (panels * SIDE)) * SIDE
    vector = next(v for v in (4, 2, 1) if width % (SIDE * v) == 0)
    across = width // SIDE
    k_vector, v_vector = (4 if size % 4 == 0 else 1 for size in (of.k_size, of.v_size))
    row_step, key_step = rows + _PAD, _KEYS + _PAD
    stage = max(_DEPTH * (row_step + key_step), _DEPTH * width)
    first_tile = 0 if isinstance(of.keys, int) else tirx.const(0, "int64")
    chunks = -(-of.k_size // _DEPTH)
    v_times = -(-_DEPTH * width // (_THREADS * v_vector))
    blocks = (of.rows + rows - 1) // rows

    @T.inline
    def fetch_turned(held, x, head, first, limit, place, chunk, count, thread):
        """Channels of a chunk of `count` rows, to registers."""
        per_row = T.meta_var(_DEPTH // k_vector)
        for i in T.unroll(-(-count * per_row // _THREADS)):
            row: T.let = (i * _THREADS + thread) // per_row
            c: T.let = chunk * _DEPTH + (i * _THREADS + thread) % per_row * k_vector
            if row < count and first + row < limit and c < of.k_size:
                held[beside(i * k_vector, k_vector)] = x[beside(place(head, first + row) + c, k_vector)]
            else:
                held[beside(i * k_vector, k_vector)] = zeros(k_vector)

    @T.inline
    def keep_turned(held, stage, stage_at, step, count, thread):
        """From registers to rows of `step` values a channel."""
        per_row = T.meta_var(_DEPTH // k_vector)
        for i in T.unroll(-(-count * per_row // _THREADS)):
            row: T.let = (i * _THREADS + thread) // per_row
            c: T.let = (i * _THREADS + thread) % per_row * k_vector
            if row < count:
                for e in T.unroll(k_vector):
                    stage[stage_at + (c + e) * step + row] = held[i * k_vector + e]

    @T.inline
    def fetch_values(held, v, head, tile, part, column, thread):
        """Every fourth row of a tile, from row `part` on: keys whose scores a thread has at the same place."""
        per_row = T.meta_var(width // v_vector)
        for i in T.unroll(v_times):
            row: T.let = (i * _THREADS + thread) // per_row
            c: T.let = column + (i * _THREADS + thread) % per_row * v_vector
            key: T.let = tile * _KEYS + row * 4 + part
            if row < _DEPTH and key < of.keys and c < of.v_size:
                held[beside(i * v_vector, v_vector)] = v[beside(of.v_at(head, key) + c, v_vector)]
            else:
                held[beside(i * v_vector, v_vector)] = zeros(v_vector)

    @T.inline
    def keep_values(held, stage, thread):
        for i in T.unroll(v_times):
            if i * _THREADS + thread < _DEPTH * width // v_vector:
                stage[beside((i * _THREADS + thread) * v_vector, v_vector)] = held[beside(i * v_vector, v_vector)]

    @T.inline
    def multiply_scores(stage, scores, ty, tx):
        a = T.alloc_buffer((high,), "float32", scope="local")
        b = T.alloc_buffer((4,), "float32", scope="local")
        for c in T.serial(_DEPTH, annotations=UNROLLED):
            a[beside(0, high)] = stage[beside(c * row_step + ty * high, high)]
            b[beside(0, 4)] = stage[beside(_DEPTH * row_step + c * key_step + tx * 4, 4)]
            for i in T.unroll(high):
                for j in T.unroll(4):
                    scores[i * 4 + j] = scores[i * 4 + j] + a[i] * b[j]

    @T.inline
    def exponentials(scores, powers, mask, mask_at, top, total, sums, tile, ty, tx):
        """Scores to exponentials, turned, in shared memory; sums so far to the new greatest score."""
        one = T.alloc_buffer((3,), "float32", scope="local")
        for i in T.unroll(high):
            one[0] = top[i]
            for j in T.unroll(4):
                key: T.let = tile * _KEYS + tx * 4 + j
                if key < of.keys:
                    if of.mask is not None:
                        scores[i * 4 + j] = scores[i * 4 + j] * T.float32(of.scale) + mask[mask_at[i] + key]
                    else:
                        scores[i * 4 + j] = scores[i * 4 + j] * T.float32(of.scale)
                else:
                    scores[i * 4 + j] = T.float32(-math.inf)
                one[0] = T.max(one[0], scores[i * 4 + j])
            top_lanes(one, 0, SIDE)
            # Where all is masked so far, nothing is subtracted: exponentials are zeros then.
            one[1] = T.Select(one[0] == T.float32(-math.inf), T.float32(0), one[0])
            one[2] = T.exp(top[i] - one[1])
            top[i] = one[0]
            total[i] = total[i] * one[2]
            for j in T.unroll(4):
                scores[i * 4 + j] = T.exp(scores[i * 4 + j] - one[1])
                total[i] = total[i] + scores[i * 4 + j]
                powers[(j * SIDE + tx) * row_step + ty * high + i] = scores[i * 4 + j]
            for c in T.unroll(across):
                sums[i * across + c] = sums[i * across + c] * one[2]

    @T.inline
    def multiply_values(stage, powers, sums, part, ty, tx):
        a = T.alloc_buffer((high,), "float32", scope="local")
        b = T.alloc_buffer((across,), "float32", scope="local")
        for r in T.serial(_DEPTH, annotations=UNROLLED):
            a[beside(0, high)] = powers[beside((part * _DEPTH + r) * row_step + ty * high, high)]
            for c in T.unroll(across // vector):
                b[beside(c * vector, vector)] = stage[beside(r * width + (c * SIDE + tx) * vector, vector)]
            for i in T.unroll(high):
                for c in T.unroll(across):
                    sums[i * across + c] = sums[i * across + c] + a[i] * b[c]

    @T.inline
    def fetch_scores(q_held, k_held, q, k, head, row, tile, chunk, thread):
        fetch_turned(q_held, q, head, row, of.rows, of.q_at, chunk, rows, thread)
        fetch_turned(k_held, k, head, tile * _KEYS, of.keys, of.k_at, chunk, _KEYS, thread)

    @T.inline
    def one_block(q, k, v, mask, out, head, row, column, thread):
        shared = T.alloc_buffer((stage,), "float32", scope="shared")
        powers = T.alloc_buffer((_KEYS * row_step,), "float32", scope="shared")
        q_held = T.alloc_buffer((-(-rows * _DEPTH // (_THREADS * k_vector)) * k_vector,), "float32", scope="local")
        k_held = T.alloc_buffer((-(-_KEYS * _DEPTH // (_THREADS * k_vector)) * k_vector,), "float32", scope="local")
        v_held = T.alloc_buffer((v_times * v_vector,), "float32", scope="local")
        scores = T.alloc_buffer((high * 4,), "float32", scope="local")
        sums = T.alloc_buffer((high * across,), "float32", scope="local")
        top = T.alloc_buffer((high,), "float32", scope="local")
        total = T.alloc_buffer((high,), "float32", scope="local")
        mask_at = T.alloc_buffer((high,), "int64", scope="local")
        ty: T.let = thread // SIDE
        tx: T.let = thread % SIDE
        for i in T.unroll(high):
            top[i] = T.float32(-math.inf)
            total[i] = T.float32(0)
            if of.mask is not None:
                mask_at[i] = of.mask_at(head, row + ty * high + i)
        for i in T.unroll(high * across):
            sums[i] = T.float32(0)
        fetch_scores(q_held, k_held, q, k, head, row, first_tile, 0, thread)
        for tile in T.serial((of.keys + _KEYS - 1) // _KEYS):
            for i in T.unroll(high * 4):
                scores[i] = T.float32(0)
            for chunk in T.serial(chunks):
                T.tvm_storage_sync("shared")
                keep_turned(q_held, shared, 0, row_step, rows, thread)
                keep_turned(k_held, shared, _DEPTH * row_step, key_step, _KEYS, thread)
                T.tvm_storage_sync("shared")
                if chunk + 1 < chunks:
                    fetch_scores(q_held, k_held, q, k, head, row, tile, chunk + 1, thread)
                else:
                    fetch_values(v_held, v, head, tile, 0, column, thread)
                multiply_scores(shared, scores, ty, tx)
            exponentials(scores, powers, mask, mask_at, top, total, sums, tile, ty, tx)
            for part in T.serial(4):
                T.tvm_storage_sync("shared")
                keep_values(v_held, shared, thread)
                T.tvm_storage_sync("shared")
                if part < 3:
                    fetch_values(v_held, v, head, tile, part + 1, column, thread)
                else:
                    fetch_scores(q_held, k_held, q, k, head, row, tile + 1, 0, thread)
                multiply_values(shared, powers, sums, part, ty, tx)
        for i in T.unroll(high):
            add_lanes(total, i, SIDE)
            for c in T.unroll(across):
                at: T.let = column + (c // vector * SIDE + tx) * vector + c % vector
                if row + ty * high + i < of.rows and at < of.v_size:
                    out[of.out_at(head, row + ty * high + i) + at] = sums[i * across + c] / total[i]

    @T.inline
    def run(q, k, v, mask, out):
        if of.count * of.rows > 0:
            for block in T.thread_binding(of.count * (panels * blocks), thread="blockIdx.x"):
                for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                    head: T.let = T.truncdiv(block, panels * blocks)
                    panel: T.let = T.truncdiv(block, blocks) % panels
                    one_block(q, k, v, mask, out, head, T.truncmod(block, blocks) * rows, panel * width, thread)

    return run
