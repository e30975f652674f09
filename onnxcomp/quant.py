"""Uniform affine quantization: the grid, its error, and the search for its range.

`q = clip(round(x / scale) + zero_point, qmin, qmax)` and `x' = (q - zero_point) * scale`, as ONNX `QuantizeLinear` and
`DequantizeLinear` define it (round half to even). Fewer than 8 bits are carried in an 8-bit container, so that `qmin`
and `qmax` are narrower than the container; activations may have 16 bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import CalibrationError
from onnxcomp.histogram import Histogram
from onnxcomp.target import Array

RangeMethod = Literal["minmax", "percentile", "mse"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Integer grid of a quantized tensor.

    Attributes:
        scale: Step size, float32, shape `()` per tensor or `(channels,)` per channel.
        zero_point: Integer that stands for 0.0, same shape as `scale`.
        qmin: Smallest integer used.
        qmax: Largest integer used.
        dtype: Container: uint8 or int8, for activations uint16 or int16 as well.
        axis: Channel axis, or None for per-tensor parameters.
    """

    scale: Array
    zero_point: Array
    qmin: int
    qmax: int
    dtype: np.dtype[Any]
    axis: int | None = None

    @property
    def narrow(self) -> bool:
        """Whether the grid uses fewer integers than its container holds, so that values have to be clipped."""
        info = np.iinfo(self.dtype)
        return (self.qmin, self.qmax) != (info.min, info.max)

    @property
    def low(self) -> Array:
        """Smallest representable value."""
        return np.asarray((self.qmin - self.zero_point.astype(np.float32)) * self.scale)

    @property
    def high(self) -> Array:
        """Largest representable value."""
        return np.asarray((self.qmax - self.zero_point.astype(np.float32)) * self.scale)

    def quantize(self, x: Array) -> Array:
        """Integers for `x`, in the container's dtype and the shape of `x`."""
        q = np.rint(x / self._spread(self.scale, x)) + self._spread(self.zero_point, x)
        return np.asarray(np.clip(q, self.qmin, self.qmax).astype(self.dtype))

    def dequantize(self, q: Array) -> Array:
        """Float32 values for integers `q`."""
        shifted = q.astype(np.int32) - self._spread(self.zero_point, q).astype(np.int32)
        return (shifted * self._spread(self.scale, q)).astype(np.float32)

    def round_trip(self, x: Array) -> Array:
        """Float32 value that stands for `x` after quantization."""
        return self.dequantize(self.quantize(x))

    def _spread(self, parameter: Array, x: Array) -> Array:
        if self.axis is None:
            return parameter
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)


def activation_grid(
    low: float, high: float, bits: int, *, symmetric: bool = False, dtype: npt.DTypeLike = np.uint8
) -> Grid:
    """Per-tensor grid of `2**bits` levels that covers `[low, high]` and zero.

    Args:
        low: Smallest value to represent.
        high: Largest value to represent.
        bits: 2 to the bits of the container.
        symmetric: Put the zero point in the middle of the levels.
        dtype: Container; the levels of a signed one lie around 0.

    Returns:
        A grid in which 0.0 is exact.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    levels, middle = 2**bits - 1, 2 ** (bits - 1)
    step = max(-low / middle, high / (levels - middle)) if symmetric else (high - low) / levels
    # A scale below the smallest normal float32 would overflow in 1/scale; such a tensor is all zero to the runtime.
    scale = np.float32(max(step, float(np.finfo(np.float32).tiny)))
    zero_point = middle if symmetric else int(np.clip(np.rint(-low / scale), 0, levels))
    container: np.dtype[Any] = np.dtype(dtype)
    qmin = -middle if container.kind == "i" else 0
    return Grid(
        scale=np.asarray(scale, np.float32),
        zero_point=np.asarray(qmin + zero_point, container),
        qmin=qmin,
        qmax=qmin + levels,
        dtype=container,
    )


def observed_range(
    histogram: Histogram, method: RangeMethod, bits: int, *, percentile: float = 99.99
) -> tuple[float, float]:
    """Range `(low, high)`, zero included, to quantize an observed tensor with.

    Args:
        histogram: What was observed.
        method: `minmax` covers everything; `percentile` cuts the same share off both tails; `mse` minimises the
            expected squared error of the quantizer over both ends.
        bits: Bits of the quantizer, for `mse`.
        percentile: Share of values to cover in percent, for `percentile`.

    Raises:
        CalibrationError: If nothing was observed.
    """
    if not histogram.count:
        raise CalibrationError("no data was observed")
    low, high = min(histogram.min, 0.0), max(histogram.max, 0.0)
    if method == "percentile":
        tail = (100.0 - percentile) / 200.0
        return max(low, min(histogram.quantile(tail), 0.0)), min(high, max(histogram.quantile(1.0 - tail), 0.0))
    if method == "mse" and high > low:
        return _mse_range(histogram, low, high, bits)
    return low, high


def _mse_range(histogram: Histogram, low: float, high: float, bits: int) -> tuple[float, float]:
    """Both ends in turn, each over a geometric grid of candidates, by the error of the quantizer on the histogram.

    The rounding error is taken from the values and not as `step**2 / 12`: activations such as those behind a GELU pile
    up within one step of zero, where the usual assumption is off by a factor.
    """
    points, counts = _points(histogram)
    wrong, container = np.empty_like(points), np.uint8 if bits <= 8 else np.uint16

    def error(ends: tuple[float, float]) -> float:
        grid = activation_grid(*ends, bits, dtype=container)
        np.rint(np.divide(points, grid.scale, out=wrong), out=wrong)
        np.clip(wrong, grid.qmin - float(grid.zero_point), grid.qmax - float(grid.zero_point), out=wrong)
        np.subtract(np.multiply(wrong, grid.scale, out=wrong), points, out=wrong)
        # Not a dot product, which would wake BLAS's threads.
        return float(np.einsum("i,i,i->", counts, wrong, wrong, dtype=np.float64))

    def improved(ends: tuple[float, float], end: int, candidates: Array) -> tuple[float, float]:
        return min([ends, *((float(c), ends[1]) if end == 0 else (ends[0], float(c)) for c in candidates)], key=error)

    # Coarse over two decades, then fine between the neighbours of the best; each end twice if both are open.
    ends = low, high
    for end in (1, 0, 1, 0) if low < 0.0 < high else (int(high > 0.0),):
        ends = improved(ends, end, (low, high)[end] * np.geomspace(1.0, 0.01, 25))
        ends = improved(ends, end, np.clip(ends[end] * np.geomspace(1.2, 1 / 1.2, 9), low, high))
    return ends


def _points(histogram: Histogram) -> tuple[Array, Array]:
    """Four points a bin with a quarter of its count each, empty bins left out; clipped to what was really seen.

    One point would not do: where outliers make bins as wide as steps, it falls on a level or it does not.
    """
    used = histogram.counts > 0
    offsets = np.array([-0.375, -0.125, 0.125, 0.375]) * histogram.width
    points = (histogram.centers[used, None] + offsets).ravel()
    points = np.clip(points, histogram.min, histogram.max)
    return points.astype(np.float32), np.repeat(histogram.counts[used] / 4.0, 4)


def weight_grid(
    weight: Array, bits: int, axis: int | None, method: RangeMethod = "mse", dtype: npt.DTypeLike = np.int8
) -> Grid:
    """Symmetric grid for a weight, with zero point 0 in int8 and 128 in uint8.

    Args:
        weight: Float array.
        bits: 2 to 8; the levels are `-(2**(bits-1) - 1) .. 2**(bits-1) - 1`.
        axis: Channel axis for one scale a channel, None for one scale.
        method: `mse` searches the clip that minimises the squared error of each channel; anything else takes absmax.
        dtype: Container, int8 or uint8.
    """
    axis = None if axis is None else axis % weight.ndim
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    rows = rows.astype(np.float32)
    qmax = 2 ** (bits - 1) - 1
    top = np.abs(rows).max(axis=1, initial=0.0)
    best = np.maximum(top / qmax, np.finfo(np.float32).tiny).astype(np.float32)
    if method == "mse":
        best = _mse_scales(rows, top, qmax)
    container: np.dtype[Any] = np.dtype(dtype)
    zero = 0 if container.kind == "i" else 128
    return Grid(
        scale=best[0] if axis is None else best,
        zero_point=np.full(() if axis is None else len(best), zero, container),
        qmin=zero - qmax,
        qmax=zero + qmax,
        dtype=container,
        axis=axis,
    )


def _mse_scales(rows: Array, top: Array, qmax: int) -> Array:
    """Scale of each row that minimises its squared error: 40 to 100 % of the largest magnitude, to within 1 %."""
    lowest = np.full(len(rows), np.inf)
    best = np.ones(len(rows), np.float32)

    def improve(fractions: Array) -> None:
        scale = np.maximum(top * fractions / qmax, np.finfo(np.float32).tiny).astype(np.float32)[:, None]
        rounded = rows / scale
        np.clip(np.rint(rounded, out=rounded), -qmax, qmax, out=rounded)
        rounded *= scale
        rounded -= rows
        error = np.einsum("ij,ij->i", rounded, rounded)
        better = error < lowest
        lowest[better], best[better] = error[better], fractions[better]

    for fraction in np.linspace(1.0, 0.4, 13, dtype=np.float32):
        improve(np.full_like(best, fraction))
    middle = best.copy()
    for step in np.float32(0.01) * np.array([-4, -3, -2, -1, 1, 2, 3, 4], np.float32):
        improve(np.minimum(middle + step, np.float32(1.0)))
    return np.asarray(np.maximum(top * best / qmax, np.finfo(np.float32).tiny).astype(np.float32))
