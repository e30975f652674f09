"""GPTQ: rounds a weight column by column, each column making up for the errors of those before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from onnxcomp.errors import CalibrationError
from onnxcomp.target import Array

ColumnQuantizer: TypeAlias = Callable[[Array, Array], tuple[Array, Array]]
"""Called with the column number (...) and what the column should hold (..., N); returns its integers and their values,
both (..., N). A grid with one scale for each block of `size` columns picks it by `number // size`."""


def gptq_round(
    weight: Array,
    gram: Array,
    quantize: ColumnQuantizer,
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> tuple[Array, Array]:
    """Integers for a weight that keep its output on given inputs, after GPTQ (Frantar et al., arXiv 2210.17323).

    Minimises `(w - q) H (w - q)^T` of each row greedily. With `H = R R^T`, R upper triangular, the error is the squared
    length of `(w - q) R`, whose entry j depends on the columns up to j alone. So the best value of column j, given the
    errors `d` of earlier columns, is `w[j] + sum(d[i] R[i, j]) / R[j, j]`. That is what GPTQ's updates with a factor of
    the inverse come to, without an inverse and with the weight left alone. What is exactly zero stays so and makes up
    for nothing, since it is most likely a mask's.

    Args:
        weight: Float (..., N, K), N outputs and K inputs; its precision is that of the updates.
        gram: Second moments of the inputs, float64 (..., K, K); leading dimensions are independent problems.
        quantize: Rounds one column.
        damp: Added to the diagonal, relative to its mean; ten times as much as long as `gram` is not positive definite.
        act_order: Columns of largest second moment first, while there are most others left to make up for them.
        block: Columns whose updates from earlier blocks are made in one matrix product.

    Returns:
        Integers as `quantize` returns them, and their values in the type of `weight`; both (..., N, K).

    Raises:
        CalibrationError: If `gram` is far from positive definite.
    """
    columns = weight.shape[-1]
    order = np.broadcast_to(np.arange(columns), gram.shape[:-1])
    if act_order:
        order = np.argsort(-np.diagonal(gram, axis1=-2, axis2=-1), axis=-1, kind="stable")
        gram = np.take_along_axis(np.take_along_axis(gram, order[..., None], -2), order[..., None, :], -1)
    # One row a column of the weight, since columns are what is worked on.
    wanted = np.ascontiguousarray(np.take_along_axis(weight, order[..., None, :], -1).swapaxes(-1, -2))
    feed = _feed(gram, damp).astype(weight.dtype)
    codes, values, errors = (np.empty_like(wanted) for _ in range(3))
    for start in range(0, columns, block):
        part = slice(start, min(start + block, columns))
        target = wanted[..., part, :] + feed[..., part, :start] @ errors[..., :start, :]
        for j in range(part.start, part.stop):
            near = feed[..., j, None, start:j] @ errors[..., start:j, :]
            column = np.where(wanted[..., j, :] == 0.0, 0.0, target[..., j - start, :] + near[..., 0, :])
            codes[..., j, :], values[..., j, :] = quantize(order[..., j], column)
            errors[..., j, :] = wanted[..., j, :] - values[..., j, :]
    back = np.argsort(order, axis=-1)[..., None]
    return tuple(np.take_along_axis(a, back, -2).swapaxes(-1, -2) for a in (codes, values))  # type: ignore[return-value]


def _feed(gram: Array, damp: float) -> Array:
    """How much of the error of column i column j makes up for, at `[..., j, i]` for i < j."""
    lower = damped_factor(gram, damp)
    return np.asarray(lower / np.diagonal(lower, axis1=-2, axis2=-1)[..., None])


def damped_factor(gram: Array, damp: float) -> Array:
    """`R^T`, lower triangular, where `R R^T` is `gram` with `damp` added to the diagonal, relative to its mean.

    Raises:
        CalibrationError: If `gram` is not positive definite with a million times as much, either.
    """
    mean = np.maximum(np.diagonal(gram, axis1=-2, axis2=-1).mean(axis=-1), 0.0)
    mean = np.where(mean > 0.0, mean, 1.0)[..., None, None]
    for factor in 10.0 ** np.arange(7):
        lower = _cholesky((gram + factor * damp * mean * np.eye(gram.shape[-1]))[..., ::-1, ::-1])
        if lower is not None:
            return np.asarray(lower[..., ::-1, ::-1].swapaxes(-1, -2))
    raise CalibrationError("the second moments of an input are not positive definite; are its values very large?")


def _cholesky(matrix: Array) -> Array | None:
    try:
        return np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
