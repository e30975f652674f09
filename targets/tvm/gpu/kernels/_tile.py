"""Tiles of a float32 product: a block of the output whose sums stay in registers, its operands in shared memory.

Large products are bound by arithmetic. With 8 by 8 sums a thread, a step of the inner dimension is 64 products for four
reads of 16 bytes from shared memory, which keeps the arithmetic units busy. While a step of the tile is computed, the
next one is on its way from memory into registers: two buffers in shared memory, one barrier a step. A warp covers 4 by
8 threads of the tile, so that its reads of shared memory hit each bank once or are the same for many threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._vectors import beside, zeros
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu

_PAD = 4
"""Values between rows of x in shared memory: threads that store a column of them hit different banks."""

UNROLLED = {"pragma_unroll": True}
"""Asks nvcc to unroll a loop, so that reads of the next step hide behind the products of this one."""

_LAUNCH = 4000
"""Cycles that one more launch takes."""

_CORES = 128
"""Products a cycle of a multiprocessor."""

_BUSY = 256
"""Threads of a multiprocessor from which on it hides how long a product takes."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A block of the output that the threads of a block compute.

    Attributes:
        rows: Of the block.
        columns: Of the block.
        high: Rows of a thread.
        wide: Columns of a thread, a multiple of 4.
        depth: Of the inner dimension in shared memory.
    """

    rows: int
    columns: int
    high: int
    wide: int
    depth: int

    @property
    def across(self) -> int:
        """Threads beside each other."""
        return self.columns // self.wide

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.rows // self.high * self.across

    def thread_row(self, thread: Any) -> Any:
        """Which of the threads one above another it is."""
        side = min(8, self.across)
        return thread // WARP // (self.across // side) * (WARP // side) + thread % WARP // side

    def thread_column(self, thread: Any) -> Any:
        """Which of the threads beside each other it is."""
        side = min(8, self.across)
        return thread // WARP % (self.across // side) * side + thread % WARP % side

    def row(self, thread: Any, i: Any) -> Any:
        """Row of a thread's sum, in the tile: they come in runs of 4, far from each other."""
        run = min(4, self.high)
        return i // run * (self.rows * run // self.high) + self.thread_row(thread) * run + i % run

    def column(self, thread: Any, j: Any) -> Any:
        """Column of a thread's sum, in the tile."""
        return j // 4 * (self.columns * 4 // self.wide) + self.thread_column(thread) * 4 + j % 4


TILES = (
    (Tile(rows=128, columns=128, high=8, wide=8, depth=8), 1.0),
    (Tile(rows=128, columns=64, high=8, wide=8, depth=8), 1.0),
    (Tile(rows=64, columns=64, high=8, wide=4, depth=8), 0.8),
    (Tile(rows=32, columns=64, high=4, wide=4, depth=16), 0.6),
    (Tile(rows=128, columns=32, high=8, wide=4, depth=8), 0.75),
    (Tile(rows=64, columns=32, high=4, wide=4, depth=16), 0.6),
    (Tile(rows=128, columns=16, high=4, wide=4, depth=8), 0.5),
    (Tile(rows=256, columns=8, high=4, wide=4, depth=8), 0.4),
    (Tile(rows=256, columns=4, high=2, wide=4, depth=8), 0.25),
)
"""Tiles, and the share of the arithmetic that each reaches."""


def every(*conditions: Any) -> Any:
    """Whether all of some conditions hold; those that are known to, are True."""
    unknown = [condition for condition in conditions if condition is not True]
    return reduce(T.And, unknown) if unknown else True


def choose(machine: Gpu, rows: int, k: int, n: int, groups: int, most: int) -> tuple[Tile, int]:
    """Tile by which a product takes the fewest cycles, as estimated, and how long a part of the inner dimension is.

    It is a multiple of twice the depth of the tile.

    Args:
        machine: What it is for.
        rows: Of the output.
        k: Inner dimension.
        n: Columns of the output, of a group.
        groups: Products side by side.
        most: Parts, at most.
    """
    best: tuple[float, Tile, int] | None = None
    for tile, share in TILES:
        pairs = -(-k // (2 * tile.depth))
        blocks = -(-max(rows, 1) // tile.rows) * -(-n // tile.columns) * groups
        wanted = 1
        while wanted <= most and (wanted == 1 or pairs // wanted >= 4):
            each = -(-pairs // wanted)
            splits = -(-pairs // each)
            turns = -(-blocks * splits // machine.multiprocessors)
            busy = min(1.0, turns * tile.threads / _BUSY)
            length = each * 2 * tile.depth
            cycles = turns * tile.rows * tile.columns * length / (_CORES * share * busy)
            if splits > 1:
                cycles += _LAUNCH + splits * rows * n * groups * 8 / (32 * machine.multiprocessors)
            if best is None or cycles < best[0]:
                best = cycles, tile, length
            wanted *= 2
    assert best is not None
    return best[1:]


def sums_of(
    tile: Tile,
    *,
    x_lanes: int,
    w_lanes: int,
    x_at: Callable[..., tuple[Any, Any]],
    x_inside: Callable[..., Any],
    w_at: Callable[..., Any],
    w_inside: Callable[..., Any],
) -> Any:
    """Macro `(x, w, sums, thread, group, row, column, begin, end, pairs)`: the sums of a thread's part of a tile.

    `sums` are high * wide registers, `row` and `column` the corner of the tile, `begin` and `end` those of the inner
    dimension, `pairs` how many times twice the depth of the tile covers it.

    Args:
        tile: The tile.
        x_lanes: Values of x that are read at once: 4, or 1.
        w_lanes: Values of w that are read at once: 4, or 1.
        x_at: Indices of `(group, row, k)` in x, of which the last may become a vector.
        x_inside: Whether `(group, row, k)` is read; zero stands in its place otherwise.
        w_at: `(w, group, k, column, lanes)`, what is read there.
        w_inside: Whether `column` of w is read.
    """
    depth, threads, pitch = tile.depth, tile.threads, tile.rows + _PAD
    high, wide, run = tile.high, tile.wide, min(4, tile.high)
    x_slots, w_slots = tile.rows * depth // x_lanes, tile.columns * depth // w_lanes
    x_times, w_times = -(-x_slots // threads), -(-w_slots // threads)

    def x_place(thread: Any, i: Any) -> tuple[Any, Any, Any]:
        slot = thread + i * threads
        inside = x_slots == x_times * threads or slot < x_slots
        return slot // (depth // x_lanes), slot % (depth // x_lanes) * x_lanes, inside

    def w_place(thread: Any, i: Any) -> tuple[Any, Any, Any]:
        slot = thread + i * threads
        inside = w_slots == w_times * threads or slot < w_slots
        return slot // (tile.columns // w_lanes), slot % (tile.columns // w_lanes) * w_lanes, inside

    @T.inline
    def fetch(x, w, x_next, w_next, thread, group, row, column, k, end):
        for i in T.unroll(x_times):
            slot = T.meta_var(x_place(thread, i))
            place = T.meta_var(x_at(group, row + slot[0], k + slot[1]))
            x_next[beside(i * x_lanes, x_lanes)] = zeros(x_lanes)
            if every(slot[2], k + slot[1] < end, x_inside(group, row + slot[0], k + slot[1])):
                x_next[beside(i * x_lanes, x_lanes)] = x[place[0], beside(place[1], x_lanes)]
        for i in T.unroll(w_times):
            slot = T.meta_var(w_place(thread, i))
            w_next[beside(i * w_lanes, w_lanes)] = zeros(w_lanes)
            if every(slot[2], k + slot[0] < end, w_inside(column + slot[1])):
                w_next[beside(i * w_lanes, w_lanes)] = w_at(w, group, k + slot[0], column + slot[1], w_lanes)

    @T.inline
    def keep(x_tile, w_tile, x_next, w_next, thread):
        for i in T.unroll(x_times):
            slot = T.meta_var(x_place(thread, i))
            if slot[2]:
                for j in T.unroll(x_lanes):
                    x_tile[(slot[1] + j) * pitch + slot[0]] = x_next[i * x_lanes + j]
        for i in T.unroll(w_times):
            slot = T.meta_var(w_place(thread, i))
            if slot[2]:
                w_tile[beside(slot[0] * tile.columns + slot[1], w_lanes)] = w_next[beside(i * w_lanes, w_lanes)]

    @T.inline
    def compute(x_tile, w_tile, sums, thread):
        left = T.alloc_buffer((high,), "float32", scope="local")
        above = T.alloc_buffer((wide,), "float32", scope="local")
        for k in T.serial(depth, annotations=UNROLLED):
            for i in T.unroll(high // run):
                left[beside(i * run, run)] = x_tile[beside(k * pitch + tile.row(thread, i * run), run)]
            for j in T.unroll(wide // 4):
                above[beside(j * 4, 4)] = w_tile[beside(k * tile.columns + tile.column(thread, j * 4), 4)]
            for i in T.unroll(high):
                for j in T.unroll(wide):
                    sums[i * wide + j] = sums[i * wide + j] + left[i] * above[j]

    @T.inline
    def all_steps(x, w, sums, thread, group, row, column, begin, end, pairs):
        x_even = T.alloc_buffer((depth * pitch,), "float32", scope="shared")
        w_even = T.alloc_buffer((depth * tile.columns,), "float32", scope="shared")
        x_odd = T.alloc_buffer((depth * pitch,), "float32", scope="shared")
        w_odd = T.alloc_buffer((depth * tile.columns,), "float32", scope="shared")
        x_next = T.alloc_buffer((x_times * x_lanes,), "float32", scope="local")
        w_next = T.alloc_buffer((w_times * w_lanes,), "float32", scope="local")
        for i in T.unroll(high * wide):
            sums[i] = T.float32(0)
        fetch(x, w, x_next, w_next, thread, group, row, column, begin, end)
        keep(x_even, w_even, x_next, w_next, thread)
        T.tvm_storage_sync("shared")
        for pair in T.serial(pairs):
            fetch(x, w, x_next, w_next, thread, group, row, column, begin + (pair * 2 + 1) * depth, end)
            compute(x_even, w_even, sums, thread)
            keep(x_odd, w_odd, x_next, w_next, thread)
            T.tvm_storage_sync("shared")
            fetch(x, w, x_next, w_next, thread, group, row, column, begin + (pair * 2 + 2) * depth, end)
            compute(x_odd, w_odd, sums, thread)
            keep(x_even, w_even, x_next, w_next, thread)
            T.tvm_storage_sync("shared")

    return all_steps
