"""Searches AWQ's exponent by the error that rounding to nearest leaves in the outputs of the layers behind."""

from __future__ import annotations

import numpy as np

from onnxcomp.blockwise import quantize_blocks
from onnxcomp.target import Array

_OUTPUTS = 256  # drawn at random, in which errors are counted
_FLOOR = 1e-3  # of the mean: a channel whose inputs are next to nothing on this data may hold more on other data
_ALPHAS = tuple(i / 20 for i in range(1, 21))


class Trial:
    """Rounds the weights that read an activation with a scale and counts the error of their outputs.

    Half of the rows choose the exponent, the other half judges it.

    Args:
        rows: Sample of the activation, (rows, K).
        weight: All weights side by side, (K, N).
        bits: Of the rounding.
        block_size: Likewise.
        symmetric: Likewise.
        groups: For each channel, the number of its group, where channels have to share their scale.
        seed: Draws the outputs that count.
    """

    def __init__(
        self,
        rows: Array,
        weight: Array,
        *,
        bits: int,
        block_size: int,
        symmetric: bool,
        groups: Array | None,
        seed: int,
    ) -> None:
        self.bits, self.block_size, self.symmetric = bits, block_size, symmetric
        size = np.abs(rows).mean(axis=0, dtype=np.float64)
        size = np.maximum(size, _FLOOR * (size.mean() or 1.0))
        if groups is not None:
            size = np.array([size[groups == group].mean() for group in groups])
        self.size = size
        count = weight.shape[1]
        drawn = np.random.default_rng(seed).permutation(count)[:_OUTPUTS]
        self.weight = np.ascontiguousarray(weight[:, drawn].T, np.float32)
        self.halves = rows[::2].astype(np.float32), rows[1::2].astype(np.float32)

    def scale(self, alpha: float) -> Array:
        """What the activation is divided by: `mean|x|^alpha`, of geometric mean 1 between its extremes; (K,)."""
        scale = self.size**alpha
        return np.asarray(scale / np.sqrt(scale.max() * scale.min()))

    def best(self) -> tuple[float, float]:
        """The exponent of least error, and its error on held-out rows relative to that without a scale."""
        alpha = min((0.0, *_ALPHAS), key=lambda a: self._error(a, 0))
        without = self._error(0.0, 1)
        return alpha, self._error(alpha, 1) / without if without else 1.0

    def _error(self, alpha: float, half: int) -> float:
        scale = self.scale(alpha).astype(np.float32)
        blocks = quantize_blocks(
            self.weight * scale, self.bits, self.block_size, symmetric=self.symmetric, method="rtn"
        )
        wrong = self.halves[half] @ (blocks.dequantize() / scale - self.weight).T
        return float(np.square(wrong, dtype=np.float64).sum())
