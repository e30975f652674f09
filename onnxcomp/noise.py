"""Search for the additive bias of NoisyQuant (Liu et al., CVPR 2023, arXiv 2211.16056).

A fixed vector `N`, one value an input channel, is added before an activation is quantized and taken off again behind
the linear layer: `f(X) = Q(X + N) Wq + (b - N Wq)`. It is subtractive dither: the layer computes with
`Q(x + N) - N` in place of `Q(x)`. Where values pile up between two levels of the grid that is closer to `x`; where
they sit on a level, as zeros behind a ReLU do, it is farther away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.quant import Grid
from onnxcomp.target import Array

_TAIL = 0.99

Method = Literal["channel", "random", "scalar", "best"]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """A noise vector and what it did to the output error of the layers that read it, on rows the search did not see.

    Attributes:
        vector: Shape `(channels,)`, float32; all zero if no noise is best.
        method: The search that found it; `none` for zero.
        ratio: Held-out output error with the noise over that without; 1.0 for zero.
    """

    vector: Array
    method: str
    ratio: float


def find_noise(rows: Array, weight: Array, grid: Grid, method: Method, seed: int = 0) -> Noise:
    """Searches the noise on one half of the rows, and keeps it only if it lowers the output error on the other half.

    The error of the worst one percent of the held-out rows must not grow either: a few rows of their own kind, such as
    the class and register tokens of a vision transformer, weigh little in the mean and much in what the model does.

    Args:
        rows: Unquantized activations `(rows, channels)`, in random order.
        weight: Weight as the integer kernel uses it `(channels, outputs)`; side by side if several layers read the
            tensor.
        grid: Per-tensor grid of the activation.
        method: `random` and `scalar` are the paper's two searches, `channel` searches each channel's offset, `best`
            takes the best of the three.
        seed: Of the random draw.

    Returns:
        The noise.
    """
    half = len(rows) // 2
    search, held_out = rows[:half], rows[half:]
    base = row_errors(held_out, weight, grid, np.zeros(rows.shape[1], np.float32))
    best = Noise(vector=np.zeros(rows.shape[1], np.float32), method="none", ratio=1.0)
    for name in ("channel", "scalar", "random") if method == "best" else (method,):
        vector = _search(search, weight, grid, name, seed)
        errors = row_errors(held_out, weight, grid, vector)
        tail = np.quantile(errors, _TAIL) <= np.quantile(base, _TAIL)
        if base.any() and tail and errors.mean() / base.mean() < best.ratio:
            best = Noise(vector=vector, method=name, ratio=float(errors.mean() / base.mean()))
    return best


def _search(rows: Array, weight: Array, grid: Grid, method: str, seed: int) -> Array:
    if method == "channel":
        return channel_noise(rows, grid)
    if method == "scalar":
        return scalar_noise(rows, weight, grid)
    return random_noise(rows, weight, grid, seed)


def output_error(rows: Array, weight: Array, grid: Grid, noise: Array) -> float:
    """Mean squared error of the layer's output, `mean(((Q(x + N) - N - x) W)**2)`.

    Args:
        rows: `(rows, channels)`.
        weight: `(channels, outputs)`.
        grid: Of the activation.
        noise: `(channels,)`.
    """
    return float(row_errors(rows, weight, grid, noise).mean())


def row_errors(rows: Array, weight: Array, grid: Grid, noise: Array) -> Array:
    """`output_error` of each row, shape `(rows,)`."""
    return np.asarray((((grid.round_trip(rows + noise) - noise - rows) @ weight) ** 2).mean(axis=1))


def channel_noise(rows: Array, grid: Grid, candidates: int = 32) -> Array:
    """For each channel the offset in `[-s/2, s/2)` with the least squared error of that channel.

    The grid is periodic with its step `s`, so no other offset has to be tried.
    """
    best = np.zeros(rows.shape[1], np.float32)
    lowest = ((grid.round_trip(rows) - rows) ** 2).sum(axis=0)
    for offset in (np.arange(candidates, dtype=np.float32) / candidates - 0.5) * grid.scale:
        error = ((grid.round_trip(rows + offset) - offset - rows) ** 2).sum(axis=0)
        better = error < lowest
        lowest[better], best[better] = error[better], offset
    return best


def scalar_noise(rows: Array, weight: Array, grid: Grid, candidates: int = 64) -> Array:
    """One offset in `[-s/2, s/2)` for all channels, with the least output error."""
    offsets = (np.arange(candidates, dtype=np.float32) / candidates - 0.5) * grid.scale
    vectors = [np.full(rows.shape[1], offset, np.float32) for offset in (np.float32(0.0), *offsets)]
    return min(vectors, key=lambda vector: output_error(rows, weight, grid, vector))


def random_noise(rows: Array, weight: Array, grid: Grid, seed: int, candidates: int = 40) -> Array:
    """The paper's noise: a uniform draw in `[-1, 1]`, scaled by the half range in `[0, 2 s]` of least output error."""
    draw = np.asarray(np.random.default_rng(seed).uniform(-1.0, 1.0, rows.shape[1]), np.float32)
    vectors = [draw * np.float32(2.0 * i / candidates) * grid.scale for i in range(candidates + 1)]
    return min(vectors, key=lambda vector: output_error(rows, weight, grid, vector))
