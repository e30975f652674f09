"""The block of sums that integer products and convolutions are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script import tirx as T

from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats
from onnxcomp.targets.tvm.machine import Machine

_WIDEST = 6

_WORTH_THREADS = 1 << 21
"""Multiply-accumulates from which on threads are started: below, that takes longer than the work."""


@dataclass(frozen=True, kw_only=True)
class Panels:
    """How columns of the output are dealt out.

    Attributes:
        machine: What for.
        n: Columns.
    """

    machine: Machine
    n: int

    @property
    def lanes(self) -> int:
        """Columns of a vector."""
        return int8_dot.lanes(self.machine)

    @property
    def vectors(self) -> int:
        """Vectors of a panel: as many as leave the fewest columns idle.

        Where vectors are short, a word that is spread out has to serve many of them; else two or three will do. On a
        GPU a panel is what a block of threads makes.
        """
        total, widest = -(-self.n // self.lanes), _WIDEST if self.machine.registers >= 32 else 2
        best = {"sdot": 6, "mull": 4, "dp4a": 4}.get(int8_dot.way(self.machine), 2.4)
        choices = (1, 2, 4) if int8_dot.way(self.machine) == "dp4a" else range(1, widest + 1)
        return min(choices, key=lambda v: (-(-total // v) * v, abs(v - best)))

    @property
    def columns(self) -> int:
        """Columns of a panel."""
        return self.vectors * self.lanes

    @property
    def count(self) -> int:
        """Panels."""
        return -(-self.n // self.columns)

    @property
    def high(self) -> int:
        """Rows of a block: its sums fill the registers that are left beside weights and an activation."""
        many = self.machine.registers >= 32
        free = {"mull": 20, "madd": 16 if many else 8, "plain": 16 if many else 8}.get(
            int8_dot.way(self.machine), 24 if many else 12
        )
        return max(1, free // self.vectors)

    def pack(self, weight: Array) -> Array:
        """Weight of shape (K, N), K whole groups, as (panels, K / 4, vectors, 4 * lanes)."""
        k = weight.shape[0]
        wide = np.zeros((k, self.count * self.columns), np.int8)
        wide[:, : self.n] = weight
        groups = int8_dot.pack(self.machine, wide).reshape(k // 4, self.count, self.vectors, 4 * self.lanes)
        return np.ascontiguousarray(groups.transpose(1, 0, 2, 3))

    def shape(self, k: int) -> tuple[int, int, int, int]:
        """Shape of a packed weight of `k` rows."""
        return self.count, -(-k // 4), self.vectors, 4 * self.lanes

    def offset(self, values: Array) -> Array:
        """Integers that sums start from, (N,), filled up to whole panels: int32, which may overflow as sums may."""
        wide = np.zeros(self.count * self.columns, np.int64)
        wide[: self.n] = values
        return wide.astype(np.int32)

    def affine(self, scale: Array, bias: Array | None = None) -> Array:
        """Scale and bias, (N,) or one for all, as the two rows of an array that is filled up to whole panels."""
        wide = np.zeros((2, self.count * self.columns), np.float32)
        wide[0, : self.n] = scale
        if bias is not None:
            wide[1, : self.n] = bias
        return wide


def over_tasks(work: int | None) -> Callable[..., Any]:
    """The loop over tasks of a kernel: parallel, unless its multiply-accumulates are known to be few."""
    return T.serial if work is not None and work < _WORTH_THREADS else T.parallel


def block(
    panels: Panels,
    height: int,
    runs: int,
    groups: int,
    output: Codes | Floats,
    *,
    word: Callable[..., Any],
    tail: Callable[..., Any] | None = None,
) -> Any:
    """A macro `(x, w, offset, affine, residual, y, base, row, panel)` that fills `height` rows of a panel.

    Args:
        panels: Of the weight.
        height: Rows.
        runs: Runs of activations that lie side by side.
        groups: Words of a run.
        output: What is stored.
        word: `(x, base, i, run, j)` is word `j` of a run of row `i`.
        tail: `(x, base, i)` is a last word behind the runs.
    """
    machine, lanes, vectors = panels.machine, panels.lanes, panels.vectors
    vector, columns, n = f"int32x{lanes}", panels.columns, panels.n
    ragged, full = n % lanes, n // lanes
    even = panels.count * columns == n

    def weights(w: Any, panel: Any, j: Any, v: Any) -> Callable[[int, int], Any]:
        return lambda start, count: w[panel, j, v, T.ramp(start, 1, count)]

    @T.inline
    def step(sums, w, words, panel, j, i):
        for v in T.unroll(vectors):
            sums[i * vectors + v] = int8_dot.dot(machine, sums[i * vectors + v], words, weights(w, panel, j, v))

    def affine(values: Any, at: Any) -> Callable[[int], Any]:
        return lambda row: values[row, T.ramp(at, 1, lanes)]

    @T.inline
    def put(sums, values, r, y, row, at, v):
        for i in T.unroll(height):
            if output.residual:
                y[row + i, T.ramp(at, 1, lanes)] = output(
                    sums[i * vectors + v], affine(values, at), r[row + i, T.ramp(at, 1, lanes)]
                )
            else:
                y[row + i, T.ramp(at, 1, lanes)] = output(sums[i * vectors + v], affine(values, at))

    @T.inline
    def put_some(sums, values, r, y, row, at, v):
        line = T.alloc_buffer((lanes,), output.dtype, scope="local")
        for i in T.unroll(height):
            if output.residual:
                for c in T.serial(ragged):
                    line[c] = r[row + i, at + c]
                line[T.ramp(0, 1, lanes)] = output(sums[i * vectors + v], affine(values, at), line[T.ramp(0, 1, lanes)])
            else:
                line[T.ramp(0, 1, lanes)] = output(sums[i * vectors + v], affine(values, at))
            for c in T.serial(ragged):
                y[row + i, at + c] = line[c]

    @T.inline
    def fill(x, w, offset, values, r, y, base, row, panel):
        sums = T.alloc_buffer((height * vectors,), vector, scope="local")
        for i in T.unroll(height):
            for v in T.unroll(vectors):
                sums[i * vectors + v] = offset[T.ramp(panel * columns + v * lanes, 1, lanes)]
        for run in T.serial(runs):
            for j in T.serial(groups):
                for i in T.unroll(height):
                    step(sums, w, T.broadcast(word(x, base, i, run, j), lanes), panel, run * groups + j, i)
        if tail is not None:
            for i in T.unroll(height):
                step(sums, w, T.broadcast(tail(x, base, i), lanes), panel, runs * groups, i)
        for v in T.unroll(vectors):
            if even:
                put(sums, values, r, y, row, panel * columns + v * lanes, v)
            else:
                if panel * vectors + v < full:
                    put(sums, values, r, y, row, panel * columns + v * lanes, v)
                if ragged > 0:  # noqa: SIM102 - the first one is decided here, the second one where it runs
                    if panel * vectors + v == full:
                        put_some(sums, values, r, y, row, panel * columns + v * lanes, v)

    return fill
