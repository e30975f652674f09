"""GPTQ for matrices in blocks: second moments of their inputs, and the integers chosen by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.block_grids import Grid
from onnxcomp.blockwise import Blocks, quantize_blocks
from onnxcomp.edit import in_main_graph
from onnxcomp.errors import CalibrationError
from onnxcomp.passes._gptq import gptq_round
from onnxcomp.passes._gram import Gram
from onnxcomp.passes._matrices import Matrix
from onnxcomp.rewrite import Context
from onnxcomp.stats import Group, Observer
from onnxcomp.target import Array

_LOOKED_UP = 0.3  # what the error of a row that is looked up counts, in mean second moments of the product's inputs


@dataclass(frozen=True, kw_only=True)
class Rounder:
    """How GPTQ goes about it.

    Attributes:
        damp: See `gptq_round`.
        act_order: See `gptq_round`.
        positions: Rows of a sample that are drawn at most.
        memory: Bytes of second moments that are held at a time.
    """

    damp: float
    act_order: bool
    positions: int
    memory: int


class InputMoments:
    """Second moments of the inputs of a matrix, all its products together.

    Args:
        grams: One for each input; every matrix that reads an input may use the same.
        looked_up: Rows of the matrix are looked up as well, so that their own error counts, too.

    Attributes:
        fit: Mean of `x x^T` to choose integers by, float64 (K, K).
        judge: The same of data held out.

    Raises:
        CalibrationError: If nothing could be held out.
    """

    def __init__(self, grams: Sequence[Gram], *, looked_up: bool = False) -> None:
        if not all(gram.held_out.count for gram in grams):
            raise CalibrationError("method = 'gptq' takes two samples or more, since one in four is held out to judge")
        moments = [[part.about(np.zeros_like(part.mean))[0] for part in (g.fit, g.held_out)] for g in grams]
        self.fit, self.judge = (np.mean(found, axis=0) for found in zip(*moments, strict=True))
        if looked_up:
            own = _LOOKED_UP * np.diagonal(self.fit).mean() * np.eye(len(self.fit))
            self.fit, self.judge = self.fit + own, self.judge + own


def inputs_of(matrix: Matrix, model: ir.Model) -> list[str]:
    """Values that are observed for a matrix: what its products read in the main graph."""
    return list(dict.fromkeys(
        node.inputs[0].name for node in matrix.products
        if in_main_graph(model, node) and node.inputs[0] is not None and node.inputs[0].name
    ))  # fmt: skip


def moment_bytes(matrix: Matrix) -> int:
    """Size of the second moments of one input, those that are held out included."""
    return 2 * 8 * matrix.columns**2


def chunks(matrices: Sequence[Matrix], model: ir.Model, memory: int) -> Iterator[list[Matrix]]:
    """Matrices in graph order, as many at a time as memory allows; those of the same input stay together."""
    chunk: list[Matrix] = []
    held: set[str] = set()
    used = 0
    for matrix in matrices:
        new = set(inputs_of(matrix, model)) - held
        needed = len(new) * moment_bytes(matrix)
        if chunk and new and used + needed > memory:
            yield chunk
            chunk, held, used = [], set(), 0
            new = set(inputs_of(matrix, model))
            needed = len(new) * moment_bytes(matrix)
        chunk.append(matrix)
        held |= new
        used += needed
    if chunk:
        yield chunk


def observe(model: ir.Model, context: Context, chunk: Sequence[Matrix], rounder: Rounder) -> dict[str, Gram]:
    """Second moments of all inputs of a chunk, from one run over the data through the model as it is by now."""
    assert context.sweep is not None
    names = dict.fromkeys(name for matrix in chunk for name in inputs_of(matrix, model))
    grams = {n: Gram(None, None, errors=False, positions=rounder.positions, seed=context.seed) for n in names}
    observers: dict[str, Observer] = {name: Group(gram) for name, gram in grams.items()}
    context.sweep(model, observers)
    return grams


def round_blocks(
    rows: Array, bits: int, block_size: int, moments: InputMoments, rounder: Rounder, *, symmetric: bool
) -> tuple[Blocks, float]:
    """Quantizes a matrix by GPTQ.

    Scales and zero points are found first, for errors that count as much as the inputs are large, and stay with their
    block whatever the order in which columns are rounded. A row whose error on held-out data does not fall is rounded
    to nearest.

    Args:
        rows: (N, K).
        bits: Of an integer.
        block_size: Columns in a block.
        moments: Of the inputs.
        rounder: How to go about it.
        symmetric: See `quantize_blocks`.

    Returns:
        The matrix, and the held-out squared output error relative to that of the same grid with nearest integers.
    """
    diagonal = np.diagonal(moments.fit)
    importance = np.maximum(diagonal / (diagonal.mean() or 1.0), 1e-4)
    top = (1 << bits) - 1
    sums = np.zeros(2)

    def choose(part: Array, grid: Grid) -> Array:
        def quantize(number: Array, column: Array) -> tuple[Array, Array]:
            scale, zero = grid.scale[:, int(number) // block_size], grid.zero[:, int(number) // block_size]
            integers = np.clip(np.rint(column / scale) + zero, 0, top)
            return integers, (integers - zero) * scale

        found, values = gptq_round(part, moments.fit, quantize, damp=rounder.damp, act_order=rounder.act_order)
        scale, zero = (np.repeat(a, block_size, axis=1)[:, : part.shape[1]] for a in (grid.scale, grid.zero))
        nearest = np.clip(np.rint(part / scale) + zero, 0, top)
        judge = moments.judge.astype(np.float32)
        before, after = (_errors(v - part, judge) for v in ((nearest - zero) * scale, values))
        better = after < before
        sums[:] += before.sum(), np.where(better, after, before).sum()
        return np.where(better[:, None], found, nearest)

    blocks = quantize_blocks(
        rows, bits, block_size, symmetric=symmetric, method="mse", importance=importance, rounding=choose
    )
    return blocks, float(sums[1] / sums[0]) if sums[0] else 1.0


def _errors(change: Array, gram: Array) -> Array:
    """Squared error of each output, (N,)."""
    return np.asarray(np.einsum("nk,nk->n", change @ gram, change, dtype=np.float64))
