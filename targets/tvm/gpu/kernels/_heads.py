"""Where the values of a head are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels.attention import Layout


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Sizes and places of an attention; `head` counts over the batch everywhere.

    Attributes:
        batch: How many there are of everything, an expression.
        heads: Heads of each tensor.
        rows: Rows of q, an int or an expression.
        keys: Rows of k and v, likewise.
        k_size: Channels of a head in q and k.
        v_size: Channels of a head in v and the output.
        scale: Factor of the scores.
        layout: Order of axes.
        mask: Whether the mask has the size of the batch, of heads and of rows; None if there is none.
        mask_rows: Rows of the mask, an expression.
    """

    batch: Any
    heads: int
    rows: Any
    keys: Any
    k_size: int
    v_size: int
    scale: float
    layout: Layout
    mask: tuple[bool, bool, bool] | None
    mask_rows: Any

    @property
    def count(self) -> Any:
        """Heads of the whole batch."""
        return self.batch * self.heads

    def has_row(self, row: Any) -> Any:
        """Whether q has a row, an expression of 32 bits."""
        return row < self.rows if isinstance(self.rows, int) else T.cast(row, "int64") < self.rows

    def q_at(self, head: Any, row: Any) -> Any:
        """Place of a row of q."""
        return self._at(self.layout.q, head, row, self.rows, self.k_size)

    def k_at(self, head: Any, row: Any) -> Any:
        """Place of a row of k."""
        return self._at(self.layout.k, head, row, self.keys, self.k_size)

    def v_at(self, head: Any, row: Any) -> Any:
        """Place of a row of v."""
        return self._at(self.layout.v, head, row, self.keys, self.v_size)

    def out_at(self, head: Any, row: Any) -> Any:
        """Place of a row of the output."""
        return self._at(self.layout.out, head, row, self.rows, self.v_size)

    def mask_at(self, head: Any, row: Any) -> Any:
        """Place of a row of the mask."""
        has_batch, has_head, has_row = self.mask or (False, False, False)
        index = head // self.heads if has_batch else tirx.const(0, "int64")
        if has_head:
            index = index * self.heads + head % self.heads
        return (index * self.mask_rows + T.truncmod(row, self.mask_rows) if has_row else index) * self.keys

    def kernel(self, body: Callable[..., Any]) -> Any:
        """The function whose flat buffers a macro `(q, k, v, mask, out)` works on."""
        layout, m, n = self.layout, self.rows, self.keys
        q_count, k_count = self.count * m, self.count * n
        if self.mask is None:

            @T.prim_func
            def without_mask(q_: T.handle, k_: T.handle, v_: T.handle, out_: T.handle):
                T.func_attr({"tirx.noalias": True})
                q_given = T.match_buffer(q_, self._shape(layout.q, m, self.k_size), "float32")
                k_given = T.match_buffer(k_, self._shape(layout.k, n, self.k_size), "float32")
                v_given = T.match_buffer(v_, self._shape(layout.v, n, self.v_size), "float32")
                out_given = T.match_buffer(out_, self._shape(layout.out, m, self.v_size), "float32")
                q = T.decl_buffer((q_count * self.k_size,), "float32", data=q_given.data)
                k = T.decl_buffer((k_count * self.k_size,), "float32", data=k_given.data)
                v = T.decl_buffer((k_count * self.v_size,), "float32", data=v_given.data)
                out = T.decl_buffer((q_count * self.v_size,), "float32", data=out_given.data)
                body(q, k, v, q, out)

            return without_mask
        has_batch, has_head, has_row = self.mask
        mask_shape = (
            self.batch if has_batch else 1,
            self.heads if has_head else 1,
            self.mask_rows if has_row else 1,
            n,
        )

        @T.prim_func
        def with_mask(q_: T.handle, k_: T.handle, v_: T.handle, mask_: T.handle, out_: T.handle):
            T.func_attr({"tirx.noalias": True})
            q_given = T.match_buffer(q_, self._shape(layout.q, m, self.k_size), "float32")
            k_given = T.match_buffer(k_, self._shape(layout.k, n, self.k_size), "float32")
            v_given = T.match_buffer(v_, self._shape(layout.v, n, self.v_size), "float32")
            mask_given = T.match_buffer(mask_, mask_shape, "float32")
            out_given = T.match_buffer(out_, self._shape(layout.out, m, self.v_size), "float32")
            q = T.decl_buffer((q_count * self.k_size,), "float32", data=q_given.data)
            k = T.decl_buffer((k_count * self.k_size,), "float32", data=k_given.data)
            v = T.decl_buffer((k_count * self.v_size,), "float32", data=v_given.data)
            added = T.decl_buffer((math.prod(mask_shape),), "float32", data=mask_given.data)
            out = T.decl_buffer((q_count * self.v_size,), "float32", data=out_given.data)
            body(q, k, v, added, out)

        return with_mask

    def _shape(self, turned: bool, rows: Any, size: int) -> tuple[Any, ...]:
        return (self.batch, rows, self.heads, size) if turned else (self.batch, self.heads, rows, size)

    def _at(self, turned: bool, head: Any, row: Any, rows: Any, size: int) -> Any:
        if turned:
            return ((head // self.heads * rows + row) * self.heads + head % self.heads) * size
        return (head * rows + row) * size
