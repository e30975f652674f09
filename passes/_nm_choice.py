"""Chooses mask and weights of one layer, and says what that keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcomp.passes._nm_inputs import Moments
from onnxcomp.passes._nm_scores import SCORE_NAMES, Method, Pattern, score_of, scores_of
from onnxcomp.passes._nm_solve import least_squares, output_errors, sparsegpt
from onnxcomp.passes._nm_weights import Stored
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Choice:
    """New weights of a layer.

    Attributes:
        rows: Float64 (groups, N / groups, K).
        mask: What stays, bool in the same shape.
        detail: What that keeps of the layer.
    """

    rows: Array
    mask: Array
    detail: str


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """How to go about it; see the fields of the pass."""

    pattern: Pattern
    method: Method
    reconstruct: bool
    damp: float
    block: int

    def choose(self, stored: Stored, moments: Moments | None) -> Choice:
        """Mask and weights of a layer.

        An output gets weights that were changed to make up for others only where that lowers its error on held-out
        data: with few samples, they fit what will not come again.

        Args:
            stored: The weight.
            moments: Of its inputs; None for `magnitude` without reconstruction.
        """
        weight = stored.weight
        squares = None if moments is None else moments.squares
        plain = score_of(self.method)
        scores = scores_of(plain, weight, squares)
        mask = self.pattern.choose(scores, np.abs(weight))
        rows = np.where(mask, weight, 0.0)
        notes = []
        if self.method == "sparsegpt":
            assert moments is not None
            found, other = self._sparsegpt(stored, weight, moments)
            better = _falls(weight, rows, found, moments)
            rows, mask = np.where(better, found, rows), np.where(better, other, mask)
            if not better.all():
                notes.append(
                    f"wanda for {int((~better).sum())} of {better.size} outputs, whose held-out error is lower"
                )
        notes.insert(0, f"keeps {_share(scores[mask].sum(), scores.sum()):.1%} of {SCORE_NAMES[plain]}")
        if self.reconstruct:
            assert moments is not None
            before = _error(weight, rows, moments)
            solved = _each(least_squares, weight, mask, moments.fit, damp=self.damp)
            solved = np.where(mask, stored.snap(solved), 0.0)
            rows = np.where(_falls(weight, rows, solved, moments), solved, rows)
            notes.append(f"least squares takes the error from {before:.1%} to {_error(weight, rows, moments):.1%}")
        if moments is not None and moments.judge is not None:
            notes.append(f"output error {_error(weight, rows, moments):.1%} on held-out data")
        return Choice(rows=rows, mask=mask, detail="; ".join(notes))

    def _sparsegpt(self, stored: Stored, weight: Array, moments: Moments) -> tuple[Array, Array]:
        assert moments.fit is not None
        snaps = stored.snaps()
        found = [
            sparsegpt(part, gram, self.pattern, damp=self.damp, block=self.block, snap=snap)
            for part, gram, snap in zip(weight, moments.fit, snaps, strict=True)
        ]
        return np.stack([f[0] for f in found]), np.stack([f[1] for f in found])


def _each(solve: Callable[..., Array], weight: Array, mask: Array, grams: Array | None, *, damp: float) -> Array:
    """Solves every group of channels by itself."""
    assert grams is not None
    return np.stack([solve(w, m, g, damp=damp) for w, m, g in zip(weight, mask, grams, strict=True)])


def _falls(weight: Array, old: Array, new: Array, moments: Moments) -> Array:
    """For which outputs new weights have the lower held-out error, bool (groups, N / groups, 1)."""
    return np.asarray(_errors(weight - new, moments) < _errors(weight - old, moments))[..., None]


def _error(weight: Array, rows: Array, moments: Moments) -> float:
    """Root mean square of the error of all outputs on held-out data, relative to that of the outputs."""
    return float(np.sqrt(_share(_errors(weight - rows, moments).sum(), _errors(weight, moments).sum())))


def _errors(change: Array, moments: Moments) -> Array:
    assert moments.judge is not None
    return np.stack([np.maximum(output_errors(c, g), 0.0) for c, g in zip(change, moments.judge, strict=True)])


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
