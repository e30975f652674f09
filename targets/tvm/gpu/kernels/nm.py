"""Products with weights of which one or two of every four consecutive ones in a column are stored (1:4, 2:4).

Few rows are bound by the memory that weights come from, values of 8 bits as much by what selects inputs. A warp makes
the sums of a block of 16 columns, whose weights lie in one piece: a load is 512 bytes of it, each thread has values of
one slot, and of which of the four inputs of a group, its bits say. Inputs wait in shared memory, groups beside one
another and their four inputs far apart, so that threads of other groups never meet in a bank, whatever their bits are.
K is cut into chunks where columns do not give enough blocks; a launch of its own adds these up, in order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._integers import flipped, from_flipped, from_half
from onnxcomp.targets.tvm.gpu.kernels._launch import resident
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.kernels._warp import exchanged
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels.nm import COLUMNS, QUAD, inputs_of_quad, quads

_WARPS = 8
_THREADS = _WARPS * WARP
_GROUP = 4
_WORDS = 4
"""Words of a load: 16 bytes."""

_BLOCKS = 4
"""Blocks that a multiprocessor is to have."""

_INPUTS = 8192
"""Float32 inputs in shared memory, of all rows: 32 KiB."""

_HEIGHT = 4
"""Rows whose sums stay in registers."""

_SEVERAL, _REST = 64, 4096
"""Rows up to which sums are made in parts, where their number is not known, and how many are reckoned with beyond."""


@cache
def nm_matmul(machine: Gpu, *, rows: int | None, k: int, n: int, kept: int, dtype: str) -> Any:
    """Kernel `(x (rows, K), values, places, scale (B * 16,), y (rows, N))`, B = blocks of 16 columns.

    Args:
        machine: What it is for.
        rows: Rows; None for any number.
        k: Inputs.
        n: Outputs.
        kept: Weights stored of four, 1 or 2.
        dtype: Of the values, (B, quads, 64), by slot and then column: float32, float16 or int8. Places are uint8, (B,
            quads, 16), the first slot lowest.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    blocks, count = -(-n // COLUMNS), quads(k, kept)
    one = _product(machine, m, 1, 1, k, n, kept, dtype, most=1)
    height = rows if rows in (1, 2) else _HEIGHT
    most = _SEVERAL if rows is None else None
    several = _product(machine, m, rows or _HEIGHT, height, k, n, kept, dtype, most=most)
    rest = _product(machine, m, _REST, _HEIGHT, k, n, kept, dtype, most=None)

    @T.prim_func
    def kernel(x_: T.handle, v_: T.handle, p_: T.handle, s_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        values = T.match_buffer(v_, (blocks, count, QUAD * COLUMNS), dtype)
        places = T.match_buffer(p_, (blocks, count, COLUMNS), "uint8")
        scale = T.match_buffer(s_, (blocks * COLUMNS,), "float32")
        y = T.match_buffer(y_, (m, n), "float32")
        if rows is None:
            if m == 1:
                one(x, values, places, scale, y)
            elif m <= _SEVERAL:
                several(x, values, places, scale, y)
            else:
                rest(x, values, places, scale, y)
        else:
            several(x, values, places, scale, y)

    return kernel


def _product(
    machine: Gpu, m: Any, likely: int, height: int, k: int, n: int, kept: int, dtype: str, *, most: int | None
) -> Any:
    """A macro `(x, values, places, scale, y)` that reads the weight once for `height` rows.

    `likely` rows are there, and `most` at most where it is launched: memory for parts is taken before that is known.
    """
    each = {"float32": 4, "float16": 8, "int8": 16}[dtype]  # values of a load
    blocks, count, of_quad = -(-n // COLUMNS), quads(k, kept), inputs_of_quad(kept)
    span = each // 2  # quads that a warp reads at a time
    groups = span * of_quad // _GROUP
    ahead = 4 if height == 1 else 2
    tiles, bands = -(-blocks // _WARPS), -(-likely // height)
    spans = -(-count // span)
    chunks = max(1, min(-(-_BLOCKS * machine.multiprocessors // (tiles * bands)), spans // ahead))
    share = -(-spans // (chunks * ahead)) * ahead  # spans of a chunk
    chunks = -(-spans // share)
    # Spans whose inputs are in shared memory; zeros where there are none, which weights are multiplied with in vain.
    held = min(share, _INPUTS // (height * span * of_quad * ahead) * ahead)
    inputs = held * span * of_quad
    of_places = f"int32x{each // 4}" if each > 4 else "int32"
    place_words, halvings = each // 4, each.bit_length() - 1

    def value(words: Any, a: Any, j: Any) -> Any:
        if dtype == "float32":
            return T.reinterpret("float32", words[a * _WORDS + j])
        if dtype == "float16":
            return from_half(words[a * _WORDS + j // 2], j % 2)
        return from_flipped(flipped(words[a * _WORDS + j // 4]), j % 4)

    @T.inline
    def stage(x, xs, row, first, thread):
        """Brings inputs from `first` on to shared memory."""
        for r in T.unroll(height):
            for i in T.serial((inputs + _THREADS - 1) // _THREADS):
                c: T.let = i * _THREADS + thread
                group: T.let = c // _GROUP
                if c < inputs:
                    at: T.let = (group // groups * _GROUP + c % _GROUP) * groups + group % groups
                    xs[at * height + r] = T.if_then_else(
                        T.And(row + r < m, first + c < k),
                        x[T.min(row + r, m - 1), T.min(first + c, k - 1)],
                        T.float32(0),
                    )

    @T.inline
    def pass_(xs, values, places, sums, block, first, i, lane):
        """Multiplies `ahead` spans, the first of which is the `i`-th of those whose inputs are there."""
        words = T.alloc_buffer((ahead * _WORDS,), "int32", scope="local")
        bits = T.alloc_buffer((ahead * place_words,), "int32", scope="local")
        chosen = T.alloc_buffer((height,), "float32", scope="local")
        start: T.let = lane * each % (QUAD * COLUMNS)
        slot: T.let = start // COLUMNS
        for a in T.unroll(ahead):
            quad: T.let = T.min((first + i + a) * span + lane * each // (QUAD * COLUMNS), count - 1)
            words[beside(a * _WORDS, _WORDS)] = T.reinterpret("int32x4", values[block, quad, beside(start, each)])
            bits[beside(a * place_words, place_words)] = T.reinterpret(
                of_places, places[block, quad, beside(start % COLUMNS, each)]
            )
        for a in T.unroll(ahead):
            group: T.let = lane * each // (QUAD * COLUMNS) * (of_quad // _GROUP) + slot // kept
            for j in T.unroll(place_words):
                bits[a * place_words + j] = T.shift_right(bits[a * place_words + j], slot * 2)
            for j in T.unroll(each):
                place: T.let = T.bitwise_and(T.shift_right(bits[a * place_words + j // 4], j % 4 * 8), 3)
                at: T.let = (((i + a) * _GROUP + place) * groups + group) * height
                chosen[beside(0, height)] = xs[beside(at, height)]
                for r in T.unroll(height):
                    sums[r * each + j] = sums[r * each + j] + chosen[r] * value(words, a, j)

    @T.inline
    def gather(sums, lane):
        """Adds up over lanes with sums of the same columns; of each row a lane keeps one, in `sums[r * each]`."""
        passed = T.alloc_buffer((1,), "float32", scope="local")
        for r in T.unroll(height):
            for step in T.unroll(halvings):
                for j in T.unroll(each // 2):
                    if j < each // 2 >> step:
                        upper: T.let = T.bitwise_and(lane, 16 >> step) != 0
                        other = T.meta_var(r * each + j + (each // 2 >> step))
                        passed[0] = T.Select(upper, sums[r * each + j], sums[other])
                        sums[r * each + j] = T.Select(upper, sums[other], sums[r * each + j])
                        sums[r * each + j] = sums[r * each + j] + exchanged(passed[0], 16 >> step)
            sums[r * each] = sums[r * each] + exchanged(sums[r * each], COLUMNS // each)

    @T.inline
    def band_of(x, values, places, scale, y, part, xs, sums, block, chunk, row, thread):
        lane: T.let = thread % WARP
        for j in T.unroll(height * each):
            sums[j] = T.float32(0)
        for s in T.serial((share + held - 1) // held):
            first: T.let = chunk * share + s * held
            T.tvm_storage_sync("shared")
            stage(x, xs, row, first * (span * of_quad), thread)
            T.tvm_storage_sync("shared")
            if block < blocks:
                for i in T.serial(T.min(held, share - s * held) // ahead):
                    pass_(xs, values, places, sums, block, first, i * ahead, lane)
        gather(sums, lane)
        column: T.let = block * COLUMNS + lane % (COLUMNS // each) * each + lane // (WARP // each)
        if T.bitwise_and(lane, COLUMNS // each) == 0 and column < n:
            for r in T.unroll(height):
                if row + r < m:
                    if chunks == 1:
                        y[row + r, column] = sums[r * each] * scale[column]
                    else:
                        part[row + r, chunk, column] = sums[r * each]

    @T.inline
    def add_chunks(part, scale, y, row, column):
        total = T.alloc_buffer((1,), "float32", scope="local")
        total[0] = T.float32(0)
        for i in T.unroll(chunks):
            total[0] = total[0] + part[row, i, column]
        y[row, column] = total[0] * scale[column]

    @T.inline
    def body(x, values, places, scale, y):
        height_of_parts = T.meta_var(T.max(m if most is None else T.min(m, most), 1))
        part = T.alloc_buffer((height_of_parts if chunks > 1 else 1, chunks, n if chunks > 1 else 1), "float32")
        for tile in T.thread_binding(tiles, thread="blockIdx.z"):
            for chunk in T.thread_binding(chunks, thread="blockIdx.y"):
                for band in T.thread_binding(T.max((m + height - 1) // height, 1), thread="blockIdx.x"):
                    for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        with resident(_BLOCKS if height == 1 else 2):
                            xs = T.alloc_buffer((inputs * height,), "float32", scope="shared")
                            sums = T.alloc_buffer((height * each,), "float32", scope="local")
                            if band * height < m:
                                band_of(
                                    x, values, places, scale, y, part, xs, sums,
                                    tile * _WARPS + thread // WARP, chunk, band * height, thread,
                                )  # fmt: skip
        if chunks > 1:
            for row in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
                for some in T.thread_binding((n + _THREADS - 1) // _THREADS, thread="blockIdx.y"):
                    for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                        if row < m and some * _THREADS + thread < n:
                            add_chunks(part, scale, y, row, some * _THREADS + thread)

    return body
