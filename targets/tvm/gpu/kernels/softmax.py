"""Softmax over the last axis, with scale and additive mask.

Bound by memory: a row is read once, into registers, where its length is known and they can hold it. Else it is read
three times, twice of them from a cache.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._rows import BY_WARPS, held_in_registers, team
from onnxcomp.targets.tvm.gpu.kernels._warp import add_team, top_team
from onnxcomp.targets.tvm.gpu.machine import WARP, Gpu
from onnxcomp.targets.tvm.kernels._rows import spread


@cache
def softmax(
    machine: Gpu,
    *,
    outer: tuple[int | None, ...],
    n: int | None,
    mask: tuple[bool, ...] | None = None,
    scale: float = 1.0,
) -> Any:
    """Softmax of `x * scale + mask`.

    The kernel is `(x (*outer, n)[, mask (*some of outer, n)], y (*outer, n))`, all float32.

    Args:
        machine: What it is for.
        outer: Sizes before the last axis, at least one; None for any.
        n: Length of a row; None for any.
        mask: Of which axes of `outer` the mask has the size, where it has 1 of the others; None if there is none.
        scale: Factor, above zero.
    """
    sizes = [tirx.Var(f"size{i}", "int64") if s is None else s for i, s in enumerate(outer)]
    rows = math.prod(sizes)
    length = tirx.Var("n", "int64") if n is None else n
    end = T.cast(length, "int32") if n is None else n  # of a row; places in it need no more bits
    masked = mask is not None
    mask_rows = math.prod(s for s, has in zip(sizes, mask or (), strict=False) if has)
    held = n is not None and held_in_registers(n)

    def score(x: Any, m: Any, row: Any, mask_row: Any, at: Any) -> Any:
        return x[row, at] * T.float32(scale) + m[mask_row, at] if masked else x[row, at] * T.float32(scale)

    @T.inline
    def from_registers(x, m, y, shared, row, mask_row, thread, threads):
        count = T.meta_var(-(-length // threads))
        kept = T.alloc_buffer((count,), "float32", scope="local")
        one = T.alloc_buffer((2,), "float32", scope="local")
        one[0] = T.float32(-math.inf)
        one[1] = T.float32(0)
        for i in T.unroll(count):
            if i * threads + thread < length:
                kept[i] = score(x, m, row, mask_row, i * threads + thread)
                one[0] = T.max(one[0], kept[i])
        top_team(one, 0, thread, shared, threads)
        for i in T.unroll(count):
            if i * threads + thread < length:
                kept[i] = T.exp(kept[i] - one[0])
                one[1] = one[1] + kept[i]
        add_team(one, 1, thread, shared, threads)
        for i in T.unroll(count):
            if i * threads + thread < length:
                y[row, i * threads + thread] = kept[i] / one[1]

    @T.inline
    def from_memory(x, m, y, shared, row, mask_row, thread, threads):
        one = T.alloc_buffer((2,), "float32", scope="local")
        one[0] = T.float32(-math.inf)
        one[1] = T.float32(0)
        for i in T.serial((end - thread + threads - 1) // threads):
            one[0] = T.max(one[0], score(x, m, row, mask_row, i * threads + thread))
        top_team(one, 0, thread, shared, threads)
        for i in T.serial((end - thread + threads - 1) // threads):
            one[1] = one[1] + T.exp(score(x, m, row, mask_row, i * threads + thread) - one[0])
        add_team(one, 1, thread, shared, threads)
        for i in T.serial((end - thread + threads - 1) // threads):
            at: T.let = i * threads + thread
            y[row, at] = T.exp(score(x, m, row, mask_row, at) - one[0]) / one[1]

    one_row = from_registers if held else from_memory

    @T.inline
    def by_teams(x, m, y, threads, teams):
        for block in T.thread_binding(T.max((rows + teams - 1) // teams, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(threads * teams, thread="threadIdx.x"):
                shared = T.alloc_buffer((threads // WARP,), "float32", scope="shared")
                row: T.let = block * teams + thread // threads
                if row < rows:
                    one_row(
                        x,
                        m,
                        y,
                        shared,
                        row,
                        spread(row, sizes, mask or ()) if masked else row,
                        thread % threads,
                        threads,
                    )

    @T.inline
    def body(x, m, y):
        if n is None:
            if length <= BY_WARPS:
                by_teams(x, m, y, *team(BY_WARPS))
            else:
                by_teams(x, m, y, *team(BY_WARPS + 1))
        else:
            by_teams(x, m, y, *team(n))

    if masked:
        mask_shape = [s if has else 1 for s, has in zip(sizes, mask or (), strict=True)]

        @T.prim_func
        def kernel(x_: T.handle, m_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x_given = T.match_buffer(x_, (*sizes, length), "float32")
            m_given = T.match_buffer(m_, (*mask_shape, length), "float32")
            y_given = T.match_buffer(y_, (*sizes, length), "float32")
            x = T.decl_buffer((rows, length), "float32", data=x_given.data)
            m = T.decl_buffer((mask_rows, length), "float32", data=m_given.data)
            y = T.decl_buffer((rows, length), "float32", data=y_given.data)
            body(x, m, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x_given = T.match_buffer(x_, (*sizes, length), "float32")
            y_given = T.match_buffer(y_, (*sizes, length), "float32")
            x = T.decl_buffer((rows, length), "float32", data=x_given.data)
            y = T.decl_buffer((rows, length), "float32", data=y_given.data)
            body(x, x, y)

    return kernel
