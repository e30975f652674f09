"""When sparse kernels pay: the sparsity from which on they beat dense ones, measured for some shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Weights = Literal["fp32", "int8", "int4"]
Op = Literal["matmul", "gated_mlp", "nm_matmul"]

AS_ACCURATE: Mapping[str, Weights] = {"fp32": "fp32", "int8": "int8", "int4": "int8"}
"""Weights of sparse kernels to those of the dense op that can take their place at no loss: 4-bit weights of the sparse
ones have their scales along the other axis."""


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """From which sparsity on a sparse kernel beats a target's fastest dense op.

    Attributes:
        op: `matmul`, one product; `gated_mlp`, the up and down projections of a gated MLP; `nm_matmul`, a product with
            a weight that is N:M sparse.
        weights: Type of the weights.
        dense: Type of the weights of the dense op, whose activations are as exact.
        inputs: Rows of the weight, of the up projection for `gated_mlp`.
        outputs: Its columns.
        rows: Rows of the activations: tokens that are computed at once.
        threads: Threads of a run.
        sparsity: Share of inputs, or neurons, that has to be dropped, or of weights that has to be zero: 0 if the
            kernel always wins, 1 if it never does.
    """

    op: Op
    weights: Weights
    dense: Weights
    inputs: int
    outputs: int
    rows: int
    threads: int
    sparsity: float


@dataclass(frozen=True, kw_only=True)
class Product:
    """A sparse op to be decided on; attributes as in `BreakEven`."""

    op: str
    weights: str
    inputs: int
    outputs: int

    def break_even(
        self, entries: Iterable[BreakEven], rows: int = 1, *, dense: str | None = None, threads: int = 1
    ) -> float | None:
        """Break-even of the measured case that is most like this one, or None if there is none of its op and types.

        Rows count first, then threads, then the shape.

        Args:
            entries: What was measured.
            rows: Rows of activations.
            dense: Type of the dense weights; by default what is as accurate.
            threads: Threads of a run.
        """
        kind = (self.op, self.weights, dense or AS_ACCURATE[self.weights])

        def distance(entry: BreakEven) -> tuple[float, float, float]:
            apart = abs(math.log(entry.inputs / self.inputs)) + abs(math.log(entry.outputs / self.outputs))
            return abs(math.log(entry.rows / rows)), abs(math.log(entry.threads / max(threads, 1))), apart

        alike = [e for e in entries if (e.op, e.weights, e.dense) == kind]
        return min(alike, key=distance).sparsity if alike else None

    def worst_break_even(self, entries: Iterable[BreakEven], beyond: int = 1) -> float | None:
        """Highest break-even of all numbers of rows beyond some; None if none of them was measured."""
        entries = list(entries)
        found = [self.break_even(entries, count) for count in sorted({e.rows for e in entries if e.rows > beyond})]
        return max((f for f in found if f is not None), default=None)


def entries(measured: Mapping[tuple[Op, Weights, Weights, int, int], Mapping[int, float]]) -> tuple[BreakEven, ...]:
    """Entries of a table for one thread: op, sparse and dense weights, inputs and outputs to sparsities by rows."""
    return tuple(
        BreakEven(
            op=op, weights=weights, dense=dense, inputs=inputs, outputs=outputs, rows=rows, threads=1, sparsity=sparsity
        )
        for (op, weights, dense, inputs, outputs), found in measured.items()
        for rows, sparsity in found.items()
    )
