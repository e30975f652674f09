"""Attention: softmax(scale * q k^T + mask) v of each head, some rows at a time, so that scores stay in the cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import gemm
from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._panels import ON_STACK, multiply, pack_columns, pack_rows
from onnxcomp.targets.tvm.machine import Machine

_FEW = 8
"""Rows up to which keys and values are read where they are; for more, they are packed first."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which tensors have the axes (batch, row, head, channel); others have (batch, head, row, channel)."""

    q: bool = False
    k: bool = False
    v: bool = False
    out: bool = False


@cache
def attention(
    machine: Machine,
    *,
    heads: int,
    rows: int | None,
    keys: int | None,
    k_size: int,
    v_size: int,
    scale: float,
    layout: Layout,
    mask: tuple[bool, bool, bool] | None,
) -> Any:
    """Kernel `(q, k, v[, mask], out)`, all float32, of any batch size.

    Args:
        machine: What it is for.
        heads: Heads of each tensor.
        rows: Rows of q; None for any number.
        keys: Rows of k and v; None for any number.
        k_size: Channels of a head in q and k.
        v_size: Channels of a head in v and the output.
        scale: Factor of the scores.
        layout: Order of axes.
        mask: Whether the mask (batch, head, row, key) has the size of the first three axes, where it has 1 otherwise;
            its rows repeat if there are fewer than q has. None if there is none.
    """
    lanes, (high, vectors), columns = machine.lanes, gemm.tile(machine), gemm.width(machine)
    batch = tirx.Var("batch", "int64")
    m = tirx.Var("rows", "int64") if rows is None else rows
    n = tirx.Var("keys", "int64") if keys is None else keys
    mask_rows = tirx.Var("mask_rows", "int64")
    key_panels = (n + columns - 1) // columns
    padded = key_panels * columns
    v_panels = -(-v_size // columns)
    k_packed, v_packed = key_panels * k_size * columns, v_panels * n * columns
    blocks = (m + high - 1) // high
    # Keys and values can be read in place by whole vectors only.
    in_place = k_size % lanes == 0 and v_size % lanes == 0
    # Vectors of the output that are summed beside one another where nothing is packed.
    wide = math.gcd(v_size // lanes, 4) if in_place else 1
    has_mask = mask is not None
    add, pack_values, pack_keys = multiply(machine), pack_columns(machine, columns), pack_rows(columns)
    has_batch, has_head, has_row = mask or (False, False, False)

    def shape(turned: bool, count: Any, size: int) -> tuple[Any, ...]:
        return (batch, count, heads, size) if turned else (batch, heads, count, size)

    def start(turned: bool, head: Any, row: Any, count: Any, size: int) -> Any:
        """Place of a row; `head` counts over the batch."""
        if turned:
            return ((head // heads * count + row) * heads + head % heads) * size
        return (head * count + row) * size

    def distance(turned: bool, size: int) -> int:
        return heads * size if turned else size

    def mask_start(head: Any, row: Any) -> Any:
        index = head // heads if has_batch else tirx.const(0, "int64")
        if has_head:
            index = index * heads + head % heads
        return (index * mask_rows + row % mask_rows if has_row else index) * n

    def wide_at(vector: Any) -> Any:
        return T.ramp(vector * lanes, 1, lanes)

    @T.inline
    def softmax(scores, at, mask, mask_at, inverse, i):
        """Exponentials in place, zeros behind them, and one over their sum to `inverse[i]`."""
        kept = T.alloc_buffer((lanes,), "float32", annotations=ON_STACK)
        one = T.alloc_buffer((1,), "float32", annotations=ON_STACK)
        if has_mask:
            for j in T.serial(n // lanes):
                scores[T.ramp(at + j * lanes, 1, lanes)] = (
                    scores[T.ramp(at + j * lanes, 1, lanes)] + mask[T.ramp(mask_at + j * lanes, 1, lanes)]
                )
            for j in T.serial(n % lanes):
                scores[at + n // lanes * lanes + j] = (
                    scores[at + n // lanes * lanes + j] + mask[mask_at + n // lanes * lanes + j]
                )
        if n % lanes != 0:
            scores[T.ramp(at + n // lanes * lanes, 1, lanes)] = tirx.Select(
                T.ramp(T.int32(0), 1, lanes) < T.broadcast(T.cast(n % lanes, "int32"), lanes),
                scores[T.ramp(at + n // lanes * lanes, 1, lanes)],
                T.broadcast(T.float32(-math.inf), lanes),
            )
        kept[wide_at(0)] = T.broadcast(T.float32(-math.inf), lanes)
        for j in T.serial((n + lanes - 1) // lanes):
            kept[wide_at(0)] = T.max(kept[wide_at(0)], scores[T.ramp(at + j * lanes, 1, lanes)])
        one[0] = vm.largest(kept[wide_at(0)])
        kept[wide_at(0)] = T.broadcast(T.float32(0), lanes)
        for j in T.serial((n + lanes - 1) // lanes):
            scores[T.ramp(at + j * lanes, 1, lanes)] = vm.exp(
                scores[T.ramp(at + j * lanes, 1, lanes)] - T.broadcast(one[0], lanes)
            )
            kept[wide_at(0)] = kept[wide_at(0)] + scores[T.ramp(at + j * lanes, 1, lanes)]
        inverse[i] = T.float32(1) / vm.total(kept[wide_at(0)])

    @T.inline
    def clear(sums, count):
        for i in T.unroll(count):
            sums[wide_at(i)] = T.broadcast(T.float32(0), lanes)

    @T.inline
    def store(out, sums, inverse, head, row, panel, height):
        for i in T.unroll(height):
            for v in T.unroll(vectors):
                sums[wide_at(i * vectors + v)] = sums[wide_at(i * vectors + v)] * T.broadcast(inverse[i], lanes)
        if v_size % columns == 0:
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    at = start(layout.out, head, row, m, v_size) + i * distance(layout.out, v_size)
                    out[T.ramp(at + panel * columns + v * lanes, 1, lanes)] = sums[wide_at(i * vectors + v)]
        else:
            line = T.alloc_buffer((columns,), "float32", annotations=ON_STACK)
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    line[T.ramp(v * lanes, 1, lanes)] = sums[wide_at(i * vectors + v)]
                for c in T.serial(T.min(v_size - panel * columns, columns)):
                    at = start(layout.out, head, row, m, v_size) + i * distance(layout.out, v_size)
                    out[at + panel * columns + c] = line[c]

    @T.inline
    def packed_rows(q, kp, vp, mask, out, scores, head, row, height):
        """`height` rows of one head by panels."""
        inverse = T.alloc_buffer((height,), "float32", annotations=ON_STACK)
        for panel in T.serial(key_panels):
            sums = T.alloc_buffer((height * vectors * lanes,), "float32", annotations=ON_STACK)
            clear(sums, height * vectors)
            add(
                sums, q, start(layout.q, head, row, m, k_size), distance(layout.q, k_size),
                kp, head * k_packed + panel * (k_size * columns), columns, k_size, height, vectors,
            )  # fmt: skip
            for i in T.unroll(height):
                for v in T.unroll(vectors):
                    scores[T.ramp(i * padded + panel * columns + v * lanes, 1, lanes)] = sums[
                        wide_at(i * vectors + v)
                    ] * T.broadcast(T.float32(scale), lanes)
        for i in T.serial(height):
            softmax(scores, i * padded, mask, mask_start(head, row + i), inverse, i)
        for panel in T.serial(v_panels):
            sums = T.alloc_buffer((height * vectors * lanes,), "float32", annotations=ON_STACK)
            clear(sums, height * vectors)
            add(sums, scores, 0, padded, vp, head * v_packed + panel * (n * columns), columns, n, height, vectors)
            store(out, sums, inverse, head, row, panel, height)

    @T.inline
    def many(q, k, v, mask, out):
        """Packs keys and values of all heads, then takes blocks of rows."""
        kp = T.alloc_buffer((batch * heads * k_packed,), "float32")
        vp = T.alloc_buffer((batch * heads * v_packed,), "float32")
        for head in T.parallel(batch * heads):
            pack_keys(
                kp, head * k_packed, k, start(layout.k, head, 0, n, k_size), distance(layout.k, k_size), k_size, n
            )
            pack_values(
                vp, head * v_packed, v, start(layout.v, head, 0, n, v_size), distance(layout.v, v_size), n, v_size
            )
        for task in T.parallel(batch * heads * blocks):
            scores = T.alloc_buffer((high * padded,), "float32")
            if task % blocks < m // high:
                packed_rows(q, kp, vp, mask, out, scores, task // blocks, task % blocks * high, high)
            else:
                for i in T.serial(m % high // 4):
                    packed_rows(q, kp, vp, mask, out, scores, task // blocks, m // high * high + i * 4, 4)
                for i in T.serial(m % high % 4):
                    packed_rows(q, kp, vp, mask, out, scores, task // blocks, m - m % high % 4 + i, 1)

    @T.inline
    def direct_rows(q, k, v, mask, out, scores, head, row, height):
        """`height` rows of one head, keys and values where they are."""
        inverse = T.alloc_buffer((height,), "float32", annotations=ON_STACK)
        for j in T.serial(n):
            sums = T.alloc_buffer((height * lanes,), "float32", annotations=ON_STACK)
            clear(sums, height)
            for c in T.unroll(k_size // lanes):
                for i in T.unroll(height):
                    q_at = start(layout.q, head, row, m, k_size) + i * distance(layout.q, k_size)
                    k_at = start(layout.k, head, 0, n, k_size) + j * distance(layout.k, k_size)
                    sums[wide_at(i)] = (
                        sums[wide_at(i)] + q[T.ramp(q_at + c * lanes, 1, lanes)] * k[T.ramp(k_at + c * lanes, 1, lanes)]
                    )
            for i in T.unroll(height):
                scores[i * padded + j] = vm.total(sums[wide_at(i)]) * T.float32(scale)
        for i in T.serial(height):
            softmax(scores, i * padded, mask, mask_start(head, row + i), inverse, i)
        for panel in T.serial(v_size // lanes // wide):
            sums = T.alloc_buffer((height * wide * lanes,), "float32", annotations=ON_STACK)
            clear(sums, height * wide)
            add(
                sums, scores, 0, padded, v, start(layout.v, head, 0, n, v_size) + panel * (wide * lanes),
                distance(layout.v, v_size), n, height, wide,
            )  # fmt: skip
            for i in T.unroll(height):
                for c in T.unroll(wide):
                    at = start(layout.out, head, row, m, v_size) + i * distance(layout.out, v_size)
                    out[T.ramp(at + (panel * wide + c) * lanes, 1, lanes)] = sums[wide_at(i * wide + c)] * T.broadcast(
                        inverse[i], lanes
                    )

    @T.inline
    def few(q, k, v, mask, out):
        for head in T.parallel(batch * heads):
            scores = T.alloc_buffer((4 * padded,), "float32")
            if rows is None:
                for i in T.serial(m // 4):
                    direct_rows(q, k, v, mask, out, scores, head, i * 4, 4)
                for i in T.serial(m % 4):
                    direct_rows(q, k, v, mask, out, scores, head, m // 4 * 4 + i, 1)
            else:
                for i in T.serial(rows // 4):
                    direct_rows(q, k, v, mask, out, scores, head, i * 4, 4)
                if rows % 4 > 0:
                    direct_rows(q, k, v, mask, out, scores, head, rows // 4 * 4, rows % 4)

    @T.inline
    def body(q, k, v, mask, out):
        if not in_place:
            many(q, k, v, mask, out)
        elif rows is None:
            if m <= _FEW:
                few(q, k, v, mask, out)
            else:
                many(q, k, v, mask, out)
        elif rows <= _FEW:
            few(q, k, v, mask, out)
        else:
            many(q, k, v, mask, out)

    q_count, k_count = batch * heads * m, batch * heads * n
    if has_mask:
        mask_shape = (batch if has_batch else 1, heads if has_head else 1, mask_rows if has_row else 1, n)

        @T.prim_func
        def kernel(q_: T.handle, k_: T.handle, v_: T.handle, mask_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            q_given = T.match_buffer(q_, shape(layout.q, m, k_size), "float32")
            k_given = T.match_buffer(k_, shape(layout.k, n, k_size), "float32")
            v_given = T.match_buffer(v_, shape(layout.v, n, v_size), "float32")
            mask_given = T.match_buffer(mask_, mask_shape, "float32")
            out_given = T.match_buffer(out_, shape(layout.out, m, v_size), "float32")
            q = T.decl_buffer((q_count * k_size,), "float32", data=q_given.data)
            k = T.decl_buffer((k_count * k_size,), "float32", data=k_given.data)
            v = T.decl_buffer((k_count * v_size,), "float32", data=v_given.data)
            added = T.decl_buffer((math.prod(mask_shape),), "float32", data=mask_given.data)
            out = T.decl_buffer((q_count * v_size,), "float32", data=out_given.data)
            body(q, k, v, added, out)

    else:

        @T.prim_func
        def kernel(q_: T.handle, k_: T.handle, v_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            q_given = T.match_buffer(q_, shape(layout.q, m, k_size), "float32")
            k_given = T.match_buffer(k_, shape(layout.k, n, k_size), "float32")
            v_given = T.match_buffer(v_, shape(layout.v, n, v_size), "float32")
            out_given = T.match_buffer(out_, shape(layout.out, m, v_size), "float32")
            q = T.decl_buffer((q_count * k_size,), "float32", data=q_given.data)
            k = T.decl_buffer((k_count * k_size,), "float32", data=k_given.data)
            v = T.decl_buffer((k_count * v_size,), "float32", data=v_given.data)
            out = T.decl_buffer((q_count * v_size,), "float32", data=out_given.data)
            body(q, k, v, q, out)

    return kernel
