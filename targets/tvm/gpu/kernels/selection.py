"""Which inputs of a row count: those beyond a threshold, the largest, or those that changed.

A block lists a row. Each warp takes a run of it, and goes through that twice: it counts, learns how many the warps
before it have found, and then writes. The second time the row comes from the cache, so that no more has to fit into
registers for a row of 64 Ki values than for one of 64. What this takes is the time of a few reads one after another,
not of memory's bandwidth. Which come first of a warp's 32 follows from a vote.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._votes import (
    AHEAD,
    add_before,
    add_lanes_before,
    how_many,
    lower,
    run_of,
    votes,
    warps_of,
)
from onnxcomp.targets.tvm.gpu.machine import WARP
from onnxcomp.targets.tvm.kernels.selection import INFINITY, bits_of

_BINS = 2048
"""Of a histogram: 8 bits of exponent and 3 of mantissa, so that not all values meet in one bin."""


@cache
def above(*, rows: int | None, k: int, each: bool, one_sided: bool) -> Any:
    """Kernel `(x (rows, K), threshold, values (rows, K), places (rows, K) int32, counts (rows,) int32)`.

    Args:
        rows: Rows; None for any number.
        k: Inputs.
        each: The threshold has a value an input, (K,), instead of a single one, (1,).
        one_sided: A value is compared instead of its magnitude.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    limits = k if each else 1
    warps, run = warps_of(k), run_of(k)

    @T.inline
    def look(x, t, held, kept, row, first):
        for u in T.unroll(AHEAD):
            held[u] = T.if_then_else(first + u * WARP < k, x[row, first + u * WARP], T.float32(0))
        for u in T.unroll(AHEAD):
            i: T.let = first + u * WARP
            size: T.let = held[u] if one_sided else T.abs(held[u])
            kept[u] = 0
            if i < k:
                kept[u] = T.Select(size <= t[i if each else 0], 0, 1)

    @T.prim_func
    def kernel(x_: T.handle, t_: T.handle, v_: T.handle, p_: T.handle, c_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        t = T.match_buffer(t_, (limits,), "float32")
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        for row in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(warps * WARP, thread="threadIdx.x"):
                shared = T.alloc_buffer((WARP,), "int32", scope="shared")
                held = T.alloc_buffer((AHEAD,), "float32", scope="local")
                kept = T.alloc_buffer((AHEAD,), "int32", scope="local")
                vote = T.alloc_buffer((1,), "uint32", scope="local")
                own = T.alloc_buffer((1,), "int32", scope="local")
                before = T.alloc_buffer((2,), "int32", scope="local")
                warp: T.let = thread // WARP
                lane: T.let = thread % WARP
                first: T.let = warp * run + lane
                if row < m:
                    own[0] = 0
                    for j in T.serial(run // (WARP * AHEAD)):
                        look(x, t, held, kept, row, first + j * (WARP * AHEAD))
                        for u in T.unroll(AHEAD):
                            vote[0] = votes(kept[u])
                            own[0] = own[0] + how_many(vote[0])
                    add_before(shared, own, before, warp, lane, warps)
                    for j in T.serial(run // (WARP * AHEAD)):
                        look(x, t, held, kept, row, first + j * (WARP * AHEAD))
                        for u in T.unroll(AHEAD):
                            vote[0] = votes(kept[u])
                            if kept[u] == 1:
                                values[row, before[0] + lower(vote[0], lane)] = held[u]
                                places[row, before[0] + lower(vote[0], lane)] = first + (j * AHEAD + u) * WARP
                            before[0] = before[0] + how_many(vote[0])
                    if thread == 0:
                        counts[row] = before[1]

    return kernel


@cache
def largest(*, rows: int | None, k: int) -> Any:
    """Kernel `(x (rows, K), count (1,) int32, values (rows, K), places (rows, K) int32, counts (rows,) int32)`.

    As many as `count` says, all if there are fewer; of equal magnitudes those of lowest index. The last one that counts
    is found by its bits, 11, 10 and 10 at a time, each by a histogram in shared memory.

    Args:
        rows: Rows; None for any number.
        k: Inputs.
    """
    m = tirx.Var("rows", "int64") if rows is None else rows
    warps, run = warps_of(k), run_of(k)
    threads = warps * WARP

    @T.inline
    def narrow(x, bins, shared, state, row, thread, above_bits, shift):
        """Finds more bits of the last one that counts.

        `state` is the bits that were found, and how many are left to find among its like.
        """
        count = T.meta_var(1 << (above_bits - shift))
        per = T.meta_var(-(-count // threads))
        own = T.alloc_buffer((2,), "int32", scope="local")
        before = T.alloc_buffer((2,), "int32", scope="local")
        found = T.alloc_buffer((2,), "int32", scope="shared")
        for i in T.serial((count + threads - 1) // threads):
            if i * threads + thread < count:
                bins[i * threads + thread] = 0
        T.tvm_storage_sync("shared")
        for i in T.serial((k + threads - 1) // threads):
            if i * threads + thread < k:
                bits: T.let = bits_of(x[row, i * threads + thread])
                if T.shift_right(bits, above_bits) == state[0]:
                    at: T.let = T.bitwise_and(T.shift_right(bits, shift), count - 1)
                    T.evaluate(T.call_extern("int32", "atomicAdd", T.address_of(bins[at]), 1))
        T.tvm_storage_sync("shared")
        # From the highest bin on, a few beside one another a thread: how many there are down to its own.
        own[0] = 0
        for i in T.serial(per):
            if thread * per + i < count:
                own[0] = own[0] + bins[count - 1 - thread * per - i]
        own[1] = own[0]
        add_lanes_before(own, 0, thread % WARP)
        if warps > 1:
            T.tvm_storage_sync("shared")
            if thread % WARP == WARP - 1:
                shared[thread // WARP] = own[0]
            T.tvm_storage_sync("shared")
        before[0] = own[0] - own[1]
        for i in T.unroll(warps):
            before[0] = before[0] + T.Select(i < thread // WARP, shared[i], 0)
        for i in T.serial(per):
            if thread * per + i < count:
                before[1] = bins[count - 1 - thread * per - i]
                if before[0] < state[1] and state[1] <= before[0] + before[1]:
                    found[0] = count - 1 - thread * per - i
                    found[1] = state[1] - before[0]
                before[0] = before[0] + before[1]
        T.tvm_storage_sync("shared")
        state[0] = T.bitwise_or(T.shift_left(state[0], above_bits - shift), found[0])
        state[1] = found[1]

    @T.inline
    def look(x, held, kind, state, row, first):
        """1 in `kind` for what is larger than the last one that counts, 2 for its like."""
        for u in T.unroll(AHEAD):
            held[u] = T.if_then_else(first + u * WARP < k, x[row, first + u * WARP], T.float32(0))
        for u in T.unroll(AHEAD):
            bits: T.let = bits_of(held[u])
            kind[u] = 0
            if first + u * WARP < k:
                kind[u] = T.Select(bits > state[0], 1, T.Select(bits == state[0], 2, 0))

    @T.prim_func
    def kernel(x_: T.handle, n_: T.handle, v_: T.handle, p_: T.handle, c_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (m, k), "float32")
        count = T.match_buffer(n_, (1,), "int32")
        values = T.match_buffer(v_, (m, k), "float32")
        places = T.match_buffer(p_, (m, k), "int32")
        counts = T.match_buffer(c_, (m,), "int32")
        for row in T.thread_binding(T.max(m, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                bins = T.alloc_buffer((_BINS,), "int32", scope="shared")
                shared = T.alloc_buffer((WARP,), "int32", scope="shared")
                state = T.alloc_buffer((2,), "int32", scope="local")
                held = T.alloc_buffer((AHEAD,), "float32", scope="local")
                kind = T.alloc_buffer((AHEAD,), "int32", scope="local")
                vote = T.alloc_buffer((2,), "uint32", scope="local")
                larger = T.alloc_buffer((3,), "int32", scope="local")
                like = T.alloc_buffer((3,), "int32", scope="local")
                warp: T.let = thread // WARP
                lane: T.let = thread % WARP
                first: T.let = warp * run + lane
                if row < m:
                    if count[0] > 0:
                        state[0] = 0
                        state[1] = T.min(count[0], k)
                        narrow(x, bins, shared, state, row, thread, 31, 20)
                        narrow(x, bins, shared, state, row, thread, 20, 10)
                        narrow(x, bins, shared, state, row, thread, 10, 0)
                        larger[0] = 0
                        like[0] = 0
                        for j in T.serial(run // (WARP * AHEAD)):
                            look(x, held, kind, state, row, first + j * (WARP * AHEAD))
                            for u in T.unroll(AHEAD):
                                vote[0] = votes(T.Cast("int32", kind[u] == 1))
                                vote[1] = votes(T.Cast("int32", kind[u] == 2))
                                larger[0] = larger[0] + how_many(vote[0])
                                like[0] = like[0] + how_many(vote[1])
                        add_before(shared, larger, larger, warp, lane, warps)
                        add_before(shared, like, like, warp, lane, warps)
                        for j in T.serial(run // (WARP * AHEAD)):
                            look(x, held, kind, state, row, first + j * (WARP * AHEAD))
                            for u in T.unroll(AHEAD):
                                vote[0] = votes(T.Cast("int32", kind[u] == 1))
                                vote[1] = votes(T.Cast("int32", kind[u] == 2))
                                tied: T.let = like[0] + lower(vote[1], lane)
                                if kind[u] == 1 or (kind[u] == 2 and tied < state[1]):
                                    at: T.let = larger[0] + lower(vote[0], lane) + T.min(tied, state[1])
                                    values[row, at] = held[u]
                                    places[row, at] = first + (j * AHEAD + u) * WARP
                                larger[0] = larger[0] + how_many(vote[0])
                                like[0] = like[0] + how_many(vote[1])
                    if thread == 0:
                        counts[row] = T.max(0, T.min(count[0], k))

    return kernel


@cache
def changed(*, rows: int, k: int, n: int, each: bool, steps: int) -> Any:
    """Kernel `(x, last (rows, K), total (rows, N), threshold, step, values, places, counts, afresh, sent (rows, K))`.

    Values are changes. `afresh`, like the counts int32 (rows,), is 1 where a change or a sum is not finite: a NaN would
    never leave a sum, so this is to be started again, and values are all that was sent.

    Args:
        rows: Rows.
        k: Inputs.
        n: Sums.
        each: The threshold has a value an input, (K,), instead of a single one, (1,).
        steps: Length of `step`, multiples of which inputs are rounded to: 1, K, or 0 for no rounding and one of 1.
    """
    limits = k if each else 1
    warps, run = warps_of(k), run_of(k)
    threads = warps * WARP

    @T.inline
    def look(x, last, t, step, now, change, kept, row, first):
        """What would be sent, by how much it differs, and whether that counts."""
        for u in T.unroll(AHEAD):
            now[u] = T.if_then_else(first + u * WARP < k, x[row, first + u * WARP], T.float32(0))
            change[u] = T.if_then_else(first + u * WARP < k, last[row, first + u * WARP], T.float32(0))
        for u in T.unroll(AHEAD):
            i: T.let = first + u * WARP
            if steps > 0:
                size = T.meta_var(step[i if steps > 1 else 0])
                if i < k:  # noqa: SIM102, the second reads what the first allows
                    if size > T.float32(0):
                        # A product of its own: what is sent is what the changes add up to.
                        now[u] = T.call_pure_extern("float32", "__fmul_rn", T.nearbyint(now[u] / size), size)
            change[u] = now[u] - change[u]
            kept[u] = 0
            if i < k:
                kept[u] = T.Select(T.abs(change[u]) <= t[i if each else 0], 0, 1)

    @T.prim_func
    def kernel(
        x_: T.handle, l_: T.handle, a_: T.handle, t_: T.handle, q_: T.handle,
        v_: T.handle, p_: T.handle, c_: T.handle, f_: T.handle, s_: T.handle,
    ):  # fmt: skip
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (rows, k), "float32")
        last = T.match_buffer(l_, (rows, k), "float32")
        total = T.match_buffer(a_, (rows, n), "float32")
        t = T.match_buffer(t_, (limits,), "float32")
        step = T.match_buffer(q_, (max(steps, 1),), "float32")
        values = T.match_buffer(v_, (rows, k), "float32")
        places = T.match_buffer(p_, (rows, k), "int32")
        counts = T.match_buffer(c_, (rows,), "int32")
        afresh = T.match_buffer(f_, (rows,), "int32")
        sent = T.match_buffer(s_, (rows, k), "float32")
        for row in T.thread_binding(rows, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                shared = T.alloc_buffer((WARP,), "int32", scope="shared")
                now = T.alloc_buffer((AHEAD,), "float32", scope="local")
                change = T.alloc_buffer((AHEAD,), "float32", scope="local")
                kept = T.alloc_buffer((AHEAD,), "int32", scope="local")
                vote = T.alloc_buffer((1,), "uint32", scope="local")
                own = T.alloc_buffer((1,), "int32", scope="local")
                odd = T.alloc_buffer((3,), "int32", scope="local")
                before = T.alloc_buffer((2,), "int32", scope="local")
                warp: T.let = thread // WARP
                lane: T.let = thread % WARP
                first: T.let = warp * run + lane
                own[0] = 0
                odd[0] = 0
                for j in T.serial((n + threads - 1) // threads):
                    if j * threads + thread < n:
                        odd[0] = T.max(odd[0], bits_of(total[row, j * threads + thread]))
                for j in T.serial(run // (WARP * AHEAD)):
                    look(x, last, t, step, now, change, kept, row, first + j * (WARP * AHEAD))
                    for u in T.unroll(AHEAD):
                        odd[0] = T.max(odd[0], bits_of(change[u]))
                        vote[0] = votes(kept[u])
                        own[0] = own[0] + how_many(vote[0])
                add_before(shared, own, before, warp, lane, warps)
                vote[0] = votes(T.Cast("int32", odd[0] >= INFINITY))
                odd[0] = T.Cast("int32", vote[0] != T.uint32(0))
                add_before(shared, odd, odd, warp, lane, warps)
                for j in T.serial(run // (WARP * AHEAD)):
                    look(x, last, t, step, now, change, kept, row, first + j * (WARP * AHEAD))
                    for u in T.unroll(AHEAD):
                        i: T.let = first + (j * AHEAD + u) * WARP
                        vote[0] = votes(kept[u])
                        if i < k:
                            if kept[u] == 0:
                                now[u] = last[row, i]
                            sent[row, i] = now[u]
                            if odd[1] > 0:
                                values[row, i] = now[u]
                                places[row, i] = i
                            else:
                                if kept[u] == 1:
                                    values[row, before[0] + lower(vote[0], lane)] = change[u]
                                    places[row, before[0] + lower(vote[0], lane)] = i
                        before[0] = before[0] + how_many(vote[0])
                if thread == 0:
                    counts[row] = T.Select(odd[1] > 0, k, before[1])
                    afresh[row] = T.Select(odd[1] > 0, 1, 0)

    return kernel
