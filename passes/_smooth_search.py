"""Searches scale and shift of each channel of an activation by the error that quantization leaves in the layers behind.

The activation is quantized per tensor with the range that `quantize` takes by default, the weights per output channel.
Candidates compete on one half of the sampled rows; the other half decides whether the best is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcomp.quant import activation_grid, observed_range, weight_grid
from onnxcomp.stats import Histogram
from onnxcomp.target import Array

Method = Literal["smoothquant", "repq", "best"]

_COLUMNS = 256  # of the weights, drawn at random, in which errors are counted
_BINS = 1024
_WIDTHS = (1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_FLOOR = 1e-2  # a channel is taken to be at least this wide, in widths of the median channel: data will differ


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Scale and shift of each channel of an activation.

    Attributes:
        scale: Float32 `(channels,)`, positive.
        shift: Float32 `(channels,)`.
        label: How they were found.
    """

    scale: Array
    shift: Array
    label: str


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Sampled rows of an activation and the weights that read it.

    Attributes:
        rows: Float32 `(rows, channels)`.
        low: Least value of each channel over all data, `(channels,)`.
        high: Largest value of each channel over all data.
        weight: All weights side by side, `(channels, outputs)`.
        activation_bits: Of the quantizer to come.
        weight_bits: Likewise.
        groups: Number of the group of each channel, where channels share their scale.
    """

    rows: Array
    low: Array
    high: Array
    weight: Array
    activation_bits: int
    weight_bits: int
    groups: Array | None = None


def smoothquant(layer: Layer, alpha: float, shift: Array) -> Array:
    """SmoothQuant's scale `max|x|^alpha / max|w|^(1 - alpha)` (arXiv 2211.10438), of geometric mean 1.

    Channels that hold next to nothing get the scale of a narrow channel, since other data may hold more.
    """
    reach = _reach(layer, shift)
    tops = _share(_floored(np.abs(layer.weight).max(axis=1)), layer.groups)
    scale = np.exp(alpha * np.log(reach) - (1.0 - alpha) * np.log(tops))
    return np.asarray(scale / np.exp(np.log(scale).mean()))


def narrowed(layer: Layer, width: float, shift: Array) -> Array:
    """Scale of at least 1 that brings channels wider than `width` median channels down to that; the others stay.

    Where few channels are wide, as behind a GELU, this spares the weights of all others.
    """
    reach = _reach(layer, shift)
    return np.asarray(np.maximum(reach / (width * np.median(reach)), 1.0))


def repq(low: Array, high: Array, bits: int) -> tuple[Array, Array]:
    """RepQ-ViT's scale and shift (arXiv 2212.08254): quantizers of each channel become one of the tensor.

    With scale `s` and zero point `z` of each channel, the activation is divided by `s / mean(s)` and shifted so that
    all zero points become `round(mean(z))`.

    Args:
        low: Least value of each channel, `(channels,)`.
        high: Largest value of each channel.
        bits: Of the quantizer.

    Returns:
        Scale and shift, such that `(x - shift) / scale` is what gets quantized.
    """
    step = np.maximum(_floored(high - low) / (2**bits - 1), np.finfo(np.float32).tiny)
    zero = np.rint(-low / step)
    return step / step.mean(), -step * (zero - np.rint(zero.mean()))


def search(
    layer: Layer, method: Method, alphas: Sequence[float], *, shifts: bool, seed: int
) -> tuple[Smoothing, float]:
    """The best smoothing.

    Args:
        layer: Rows and weights.
        method: Which candidates compete; `best` takes all.
        alphas: SmoothQuant's exponents; more than five are searched from coarse to fine.
        shifts: Whether channels can be shifted, too.
        seed: Draws the columns of the weights.

    Returns:
        The smoothing, and the output error on held-out rows over that without smoothing.
    """
    trial = _Trial(layer, seed)
    found = min(_candidates(layer, method, alphas, shifts, trial), key=lambda c: trial.error(c, held_out=False))
    none = Smoothing(scale=np.ones(len(layer.low)), shift=np.zeros(len(layer.low)), label="none")
    return found, trial.error(found, held_out=True) / max(trial.error(none, held_out=True), np.finfo(np.float64).tiny)


def _candidates(
    layer: Layer, method: Method, alphas: Sequence[float], shifts: bool, trial: _Trial
) -> Iterator[Smoothing]:
    nowhere = np.zeros(len(layer.low))
    if method != "repq":
        middle = _share((layer.low + layer.high) / 2.0, layer.groups, mean=True)
        centres = [(nowhere, "")] + ([(middle, ", centred")] if shifts and method == "best" else [])
        for shift, note in centres:
            yield from _along(layer, alphas, shift, note, trial)
            for width in _WIDTHS if method == "best" else ():
                label = f"channels wider than {width:g} medians{note}"
                yield Smoothing(scale=narrowed(layer, width, shift), shift=shift, label=label)
    if method != "smoothquant":
        narrow = np.quantile(layer.rows, [0.001, 0.999], axis=0)
        for (low, high), note in (((layer.low, layer.high), ""), ((narrow[0], narrow[1]), " without tails")):
            scale, shift = repq(low, high, layer.activation_bits)
            scale, shift = _share(scale, layer.groups), _share(shift, layer.groups, mean=True)
            yield Smoothing(scale=scale, shift=shift if shifts else nowhere, label=f"repq{note}")


def _along(layer: Layer, alphas: Sequence[float], shift: Array, note: str, trial: _Trial) -> Iterator[Smoothing]:
    """Every fifth or so exponent, and then those around the best of these."""
    made: dict[float, Smoothing] = {}

    def at(alpha: float) -> Smoothing:
        if alpha not in made:
            scale = smoothquant(layer, alpha, shift)
            made[alpha] = Smoothing(scale=scale, shift=shift, label=f"smoothquant alpha {alpha:.2f}{note}")
        return made[alpha]

    stride = max(1, (len(alphas) - 1) // 5)
    coarse = range(0, len(alphas), stride)
    best = min(coarse, key=lambda i: trial.error(at(alphas[i]), held_out=False))
    for i in range(max(0, best - stride + 1), min(len(alphas), best + stride)):
        yield at(alphas[i])


class _Trial:
    """Quantizes the layer with a smoothing and counts the error of its output."""

    def __init__(self, layer: Layer, seed: int) -> None:
        self.layer = layer
        outputs = layer.weight.shape[1]
        random = np.random.default_rng(seed)
        columns = random.permutation(outputs)[:_COLUMNS] if outputs > _COLUMNS else np.arange(outputs)
        self.weight = layer.weight[:, columns].astype(np.float32)
        self.norms = (layer.weight.astype(np.float64) ** 2).sum(axis=1)
        self.halves = layer.rows[::2], layer.rows[1::2]
        self._errors: dict[tuple[str, bool], float] = {}

    def error(self, smoothing: Smoothing, *, held_out: bool) -> float:
        key = smoothing.label, held_out
        if key not in self._errors:
            self._errors[key] = self._measure(smoothing, self.halves[held_out])
        return self._errors[key]

    def _measure(self, smoothing: Smoothing, rows: Array) -> float:
        scale, shift = smoothing.scale.astype(np.float32), smoothing.shift.astype(np.float32)
        seen = (self.halves[0] - shift) / scale
        histogram = Histogram(_BINS, weights=self.norms * scale.astype(np.float64) ** 2)
        histogram.update(seen)
        bits = self.layer.activation_bits
        grid = activation_grid(*observed_range(histogram, "mse", bits), bits)
        weight = self.weight * scale[:, None]
        rounded = weight_grid(weight, self.layer.weight_bits, 1, "minmax").round_trip(weight)
        smooth = (rows - shift) / scale
        difference = grid.round_trip(smooth) @ rounded - smooth @ weight
        return float(self._importance(rows) @ (difference.astype(np.float64) ** 2).sum(axis=1))

    def _importance(self, rows: Array) -> Array:
        """Weight of the error of each row: less where the output is far larger than that of most rows.

        A transformer has a few tokens with massive activations. Their errors would outweigh those of all others, while
        the norm behind the residual connection divides them by just that size.
        """
        power = ((rows @ self.weight).astype(np.float64) ** 2).sum(axis=1)
        usual = float(np.median(power))
        return np.asarray(1.0 / (1.0 + power / usual)) if usual > 0.0 else np.ones(len(rows))


def _reach(layer: Layer, shift: Array) -> Array:
    """Largest magnitude of each channel once it is shifted."""
    return _share(_floored(np.maximum(layer.high - shift, shift - layer.low)), layer.groups)


def _floored(values: Array) -> Array:
    median = float(np.median(values))
    return np.asarray(np.maximum(values.astype(np.float64), _FLOOR * median if median > 0.0 else 1e-6))


def _share(vector: Array, groups: Array | None, *, mean: bool = False) -> Array:
    """One value for all channels of a group: the largest, or the mean."""
    if groups is None:
        return vector
    _, group = np.unique(groups, return_inverse=True)
    if mean:
        return np.asarray((np.bincount(group, vector) / np.bincount(group))[group])
    tops = np.full(group.max() + 1, -np.inf)
    np.maximum.at(tops, group, vector)
    return np.asarray(tops[group])
