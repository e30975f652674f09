"""Searches scale and shift of each channel of an activation by the error that quantization leaves in the layers behind.

The activation is quantized per tensor with the range that `quantize` takes by default, the weights per output channel.
Candidates compete on one half of the sampled rows; the other half decides whether the best is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxcomp.histogram import Histogram
from onnxcomp.quant import activation_grid, observed_range, weight_grid
from onnxcomp.target import Array

Method = Literal["smoothquant", "repq", "best"]

_COLUMNS = 192  # of the weights, drawn at random, in which errors are counted
_BINS = 512
_WIDTHS = (1.5, 3.0, 6.0, 12.0)
_APART = (1, 2, 4, 8)
_FLOOR = 1e-2  # a channel is taken to be at least this wide, in widths of the median channel: data will differ


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """Scale and shift of each channel of an activation.

    Attributes:
        scale: Float32 `(channels,)`, positive.
        shift: Float32 `(channels,)`.
        label: How they were found.
        apart: Numbers of channels that the quantized layers are spared, int64; a product in float stands for them.
    """

    scale: Array
    shift: Array
    label: str
    apart: Array = field(default_factory=lambda: np.zeros(0, np.int64))


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
    layer: Layer, method: Method, alphas: Sequence[float], *, shifts: bool, seed: int, apart: bool = False
) -> tuple[Smoothing, float]:
    """The best smoothing.

    Args:
        layer: Rows and weights.
        method: Which candidates compete; `best` takes all.
        alphas: SmoothQuant's exponents; more than five are searched from coarse to fine.
        shifts: Whether channels can be shifted, too.
        seed: Draws the columns of the weights.
        apart: Whether few channels can be taken out of the layer.

    Returns:
        The smoothing, and the output error on held-out rows over that without smoothing.
    """
    trial = _Trial(layer, seed)
    candidates = [*_candidates(layer, method, alphas, shifts, trial), *(_without_widest(layer) if apart else ())]
    found = min(candidates, key=lambda c: trial.error(c, held_out=False))
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


def _without_widest(layer: Layer) -> Iterator[Smoothing]:
    """Massive activations of single tokens stand in few channels, and neither a scale nor a range can do without."""
    ones, nowhere = np.ones(len(layer.low)), np.zeros(len(layer.low))
    order = np.argsort(_reach(layer, nowhere))[::-1]
    for count in _APART:
        if 16 * count <= len(order):
            yield Smoothing(scale=ones, shift=nowhere, label=f"{count} channels apart", apart=np.sort(order[:count]))


def _along(layer: Layer, alphas: Sequence[float], shift: Array, note: str, trial: _Trial) -> Iterator[Smoothing]:
    """Every fourth exponent or so, then those around the best, at half the distance each time."""
    made: dict[int, Smoothing] = {}

    def error(i: int) -> float:
        if i not in made:
            label = f"smoothquant alpha {alphas[i]:.2f}{note}"
            made[i] = Smoothing(scale=smoothquant(layer, alphas[i], shift), shift=shift, label=label)
        return trial.error(made[i], held_out=False)

    stride = max(1, (len(alphas) - 1) // 5)
    best = min(range(0, len(alphas), stride), key=error)
    while stride > 1:
        stride //= 2
        best = min((i for i in (best, best - stride, best + stride) if 0 <= i < len(alphas)), key=error)
    yield made[best]


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
        self.exact = tuple(rows @ self.weight for rows in self.halves)
        self.importance = tuple(_importance(y) for y in self.exact)
        self._errors: dict[tuple[str, bool], float] = {}

    def error(self, smoothing: Smoothing, *, held_out: bool) -> float:
        key = smoothing.label, held_out
        if key not in self._errors:
            self._errors[key] = self._measure(smoothing, int(held_out))
        return self._errors[key]

    def _measure(self, smoothing: Smoothing, half: int) -> float:
        scale, shift = smoothing.scale.astype(np.float32), smoothing.shift.astype(np.float32)
        bits = self.layer.activation_bits
        apart = smoothing.apart
        x = (self.halves[0] - shift) / scale
        x[:, apart] = 0.0
        histogram = Histogram(_BINS, weights=self.norms * scale.astype(np.float64) ** 2)
        histogram.update(x)
        grid = activation_grid(*observed_range(histogram, "mse", bits), bits)
        if half:
            x = (self.halves[half] - shift) / scale
            x[:, apart] = 0.0
        weight = self.weight * scale[:, None]
        weight[apart] = 0.0
        steps = weight_grid(weight, self.layer.weight_bits, 1, "minmax").scale
        wrong = _rounded(x, grid.scale, grid.low, grid.high) @ _rounded(weight, steps)
        wrong -= self.exact[half]
        if shift.any():
            wrong += shift @ self.weight
        if len(apart):
            wrong += self.halves[half][:, apart] @ self.weight[apart]
        return float(self.importance[half] @ np.einsum("ij,ij->i", wrong, wrong).astype(np.float64))


def _rounded(x: Array, step: Array, low: Array | None = None, high: Array | None = None) -> Array:
    """What stands for float32 `x` on a grid, in place: `x` is used up."""
    x /= step
    np.rint(x, out=x)
    x *= step
    return x if low is None else np.clip(x, low, high, out=x)


def _importance(outputs: Array) -> Array:
    """Weight of the error of each row: less where the output is far larger than that of most rows.

    A transformer has a few tokens with massive activations. Their errors would outweigh those of all others, while the
    norm behind the residual connection divides them by just that size.
    """
    power = (outputs.astype(np.float64) ** 2).sum(axis=1)
    usual = float(np.median(power))
    return np.asarray(1.0 / (1.0 + power / usual)) if usual > 0.0 else np.ones(len(outputs))


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
