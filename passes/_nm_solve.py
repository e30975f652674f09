"""What the weights that stay should be once others are zero: SparseGPT, and least squares for a mask that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from onnxcomp.passes._gptq import damped_factor
from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.target import Array

Snap: TypeAlias = Callable[[slice, Array], Array]
"""Nearest values on the grid of a quantized weight. Called with columns of the weight and what they should hold,
float64 (N, columns)."""

_ROOM = 1 << 25  # bytes of the systems of equations that are solved at once


def sparsegpt(
    weight: Array, gram: Array, pattern: Pattern, *, damp: float, block: int, snap: Snap | None
) -> tuple[Array, Array]:
    """Mask and weights of SparseGPT (Frantar and Alistarh, arXiv 2301.00774).

    Columns are fixed from the first to the last, and those behind make up for each error: with `U^T U` the inverse of
    the damped second moments, U upper triangular, the error `e` of column j takes `e / U[j, j] * U[j, k]` off column k.
    A group keeps the weights of largest `w^2 / U[j, j]^2`, by what earlier columns have made of them by then. A weight
    on a grid is rounded in the same sweep, so that later columns make up for that, too.

    Args:
        weight: Float64 (N, K).
        gram: Second moments of the inputs, float64 (K, K).
        pattern: Groups begin at column 0.
        damp: Added to the diagonal of `gram`, relative to its mean.
        block: Columns whose effect on those behind the block is worked out in one matrix product; the outcome is the
            same up to rounding.
        snap: Of a quantized weight.

    Returns:
        Weights, float64 (N, K), and which of them were kept, bool (N, K).
    """
    columns = weight.shape[1]
    factor = np.linalg.inv(damped_factor(gram, damp).T)
    diagonal = np.diagonal(factor)
    work = np.array(weight.T, order="C")  # one row a column of the weight, since columns are what is worked on
    mask = np.zeros(work.shape, bool)
    step = max(block // pattern.size, 1) * pattern.size
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = np.empty((stop - start, len(weight)))
        for j in range(start, stop):
            if j % pattern.size == 0:
                group = slice(j, min(j + pattern.size, stop))
                scores = (work[group] / diagonal[group, None]) ** 2
                mask[group] = pattern.choose(scores.T, np.abs(work[group]).T).T
            value = np.where(mask[j], work[j], 0.0)
            if snap is not None:
                value = snap(slice(j, j + 1), value[:, None])[:, 0]
            errors[j - start] = (work[j] - value) / diagonal[j]
            work[j] = value
            work[j + 1 : stop] -= factor[j, j + 1 : stop, None] * errors[j - start]
        work[stop:] -= factor[start:stop, stop:].T @ errors
    return work.T, mask.T


def least_squares(weight: Array, mask: Array, gram: Array, *, damp: float) -> Array:
    """The weights within a mask that keep the output closest to that of the whole weight.

    For each row, with S what stays, P what goes and `H` the damped second moments: `w[S] + H[S,S]^-1 H[S,P] w[P]`, the
    minimum of `(w - v) H (w - v)^T` over rows v that are zero on P. The damping pulls towards the old weights, not
    towards zero.

    Args:
        weight: Float64 (N, K).
        mask: What stays, bool (N, K), equally many in each row.
        gram: Second moments of the inputs, float64 (K, K).
        damp: Added to the diagonal of `gram`, relative to its mean.

    Returns:
        Float64 (N, K), zero outside of the mask.
    """
    mean = float(np.diagonal(gram).mean())
    damped = gram + damp * (mean if mean > 0.0 else 1.0) * np.eye(len(gram))
    found = np.where(mask, weight, 0.0)
    wanted = (weight - found) @ gram
    stays = np.nonzero(mask)[1].reshape(len(weight), -1)
    kept = stays.shape[1]
    together = max(1, min(len(weight), _ROOM // (8 * max(kept, 1) ** 2)))
    systems = np.empty((together, kept, kept))
    for start in range(0, len(weight), together):
        part = stays[start : start + together]
        for system, row in zip(systems, part, strict=False):  # into the same memory: new pages cost more than the copy
            damped.take(row, axis=0).take(row, axis=1, out=system, mode="clip")
        right = np.take_along_axis(wanted[start : start + together], part, axis=1)
        change = np.linalg.solve(systems[: len(part)], right[..., None])[..., 0]
        rows = np.arange(start, start + len(part))[:, None]
        found[rows, part] += change
    return found


def output_errors(change: Array, gram: Array) -> Array:
    """Mean squared error of each output, (N,), when the weight changes by (N, K) and inputs have these moments."""
    return np.asarray(np.einsum("nk,nk->n", change @ gram, change))
