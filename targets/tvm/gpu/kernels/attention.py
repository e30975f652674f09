"""Attention: softmax(scale * q k^T + mask) v of each head, scores never in memory."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._attention_keys import most_rows, split_keys
from onnxcomp.targets.tvm.gpu.kernels._attention_tiles import SIDE, tiles
from onnxcomp.targets.tvm.gpu.kernels._heads import Heads
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels.attention import Layout

_FEW = 8
"""Rows up to which blocks share the keys of a head, not its rows."""


@cache
def attention(
    machine: Gpu,
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
    of = Heads(
        batch=tirx.Var("batch", "int64"),
        heads=heads,
        rows=tirx.Var("rows", "int64") if rows is None else rows,
        keys=tirx.Var("keys", "int64") if keys is None else keys,
        k_size=k_size,
        v_size=v_size,
        scale=scale,
        layout=layout,
        mask=mask,
        mask_rows=tirx.Var("mask_rows", "int64"),
    )
    limit = min(_FEW, most_rows(k_size))
    if rows is not None:
        return of.kernel(split_keys(of, machine, rows) if rows <= limit else tiles(of, _height(machine, heads, rows)))
    if limit < 1:
        return of.kernel(tiles(of, 4))
    single, few, many = split_keys(of, machine, 1), split_keys(of, machine, limit), tiles(of, 4)

    @T.inline
    def body(q, k, v, mask, out):
        if of.rows == 1:
            single(q, k, v, mask, out)
        elif of.rows <= limit:
            few(q, k, v, mask, out)
        else:
            many(q, k, v, mask, out)

    return of.kernel(body)


def _height(machine: Gpu, heads: int, rows: int) -> int:
    """Rows of a thread: as many as leave a block for each multiprocessor."""
    if rows <= SIDE:
        return 1
    return 4 if heads * -(-rows // (4 * SIDE)) >= machine.multiprocessors else 2
