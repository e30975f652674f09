"""Second moments of what the outputs of a linear op see: rows of its input, or patches of it for a Conv."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import attribute
from onnxcomp.errors import CalibrationError
from onnxcomp.quant import Grid
from onnxcomp.stats import Observer
from onnxcomp.target import Array

_HELD_OUT = 4  # one sample of so many judges and does not fit
_SLAB = 1 << 24  # elements of patches that are in memory at a time


@dataclass(frozen=True, kw_only=True)
class Window:
    """How a Conv cuts patches from its input.

    Attributes:
        kernel: Size of the kernel.
        strides: Step between patches.
        dilations: Step between the taps of a patch.
        pads: Zeros before each axis, then behind each; None where `auto_pad` decides.
        lower: `auto_pad` is SAME_LOWER, which puts an odd zero before and not behind.
        groups: Groups of channels.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...] | None
    lower: bool
    groups: int

    def padding(self, size: tuple[int, ...]) -> list[tuple[int, int]]:
        """Zeros before and behind each spatial axis of an input of this size."""
        axes = len(self.kernel)
        if self.pads is not None:
            return list(zip(self.pads[:axes], self.pads[axes:], strict=True))
        found = []
        for length, extent, stride in zip(size, self.extents, self.strides, strict=True):
            total = max((-(-length // stride) - 1) * stride + extent - length, 0)
            found.append((total - total // 2, total // 2) if self.lower else (total // 2, total - total // 2))
        return found

    @property
    def extents(self) -> tuple[int, ...]:
        """Length of a patch along each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))


def window(node: ir.Node, kernel: tuple[int, ...]) -> Window | None:
    """The window of a Conv; None for a MatMul or Gemm, whose rows lie along the last axis.

    Args:
        node: The op.
        kernel: Shape of the weight behind its channels.
    """
    if node.op_type != "Conv":
        return None
    axes = len(kernel)
    auto = attribute(node, "auto_pad", "NOTSET")
    pads: tuple[int, ...] | None = tuple(attribute(node, "pads", ()) or (0,) * 2 * axes)
    if auto.startswith("SAME"):
        pads = None
    elif auto == "VALID":
        pads = (0,) * 2 * axes
    return Window(
        kernel=kernel,
        strides=tuple(attribute(node, "strides", ()) or (1,) * axes),
        dilations=tuple(attribute(node, "dilations", ()) or (1,) * axes),
        pads=pads,
        lower=auto == "SAME_LOWER",
        groups=int(attribute(node, "group", 1)),
    )


def rows_of(x: Array, cut: Window | None, chosen: list[Array | None]) -> Array:
    """Rows that the weight is multiplied with.

    Args:
        x: Input of the op: (samples, ..., K) or (samples, channels, spatial axes).
        cut: Window of a Conv.
        chosen: For each sample the numbers of the output positions to take, equally many; None takes all.

    Returns:
        Shape (samples, positions, groups, K), K being channels of a group times taps of the kernel, channels first.
    """
    if cut is None:
        rows = x.reshape(len(x), -1, 1, x.shape[-1])
        return rows if chosen[0] is None else np.stack([r[c] for r, c in zip(rows, chosen, strict=True)])
    padded = np.pad(x, [(0, 0), (0, 0), *cut.padding(x.shape[2:])])
    size = padded.shape[2:]
    steps = np.array([math.prod(size[i + 1 :]) for i in range(len(size))])
    taps = _flat(cut.kernel, steps * cut.dilations)
    corners = _flat(_positions(x, cut), steps * cut.strides)
    flat = padded.reshape(len(x), x.shape[1], -1)
    patches = [f[:, (corners if c is None else corners[c])[:, None] + taps] for f, c in zip(flat, chosen, strict=True)]
    cut_out = np.stack(patches).reshape(len(x), cut.groups, x.shape[1] // cut.groups, -1, len(taps))
    return np.moveaxis(cut_out, 3, 1).reshape(len(x), cut_out.shape[3], cut.groups, -1)


def position_count(x: Array, cut: Window | None) -> int:
    """Number of output positions of a sample."""
    return math.prod(x.shape[1:-1] if cut is None else _positions(x, cut))


def _positions(x: Array, cut: Window) -> tuple[int, ...]:
    sizes = zip(x.shape[2:], cut.padding(x.shape[2:]), cut.extents, cut.strides, strict=True)
    return tuple(max((length + sum(pad) - extent) // stride + 1, 0) for length, pad, extent, stride in sizes)


def _flat(shape: tuple[int, ...], steps: Array) -> Array:
    """Numbers of the points of a lattice of this shape in a flat array, where its axes have these steps."""
    return np.asarray(steps @ np.indices(shape).reshape(len(shape), -1))


class SecondMoments:
    """Sums of rows and of their products, by group.

    Attributes:
        count: Number of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Array = np.zeros(())
        self._products: Array = np.zeros(())

    def add(self, rows: Array) -> None:
        """Adds rows, shape (groups, rows, K)."""
        self.count += rows.shape[1]
        self._sum = self._sum + rows.sum(axis=1, dtype=np.float64)
        products = rows.swapaxes(1, 2) @ rows
        self._products = self._products + products.astype(np.float64)

    def merge(self, other: SecondMoments) -> None:
        """Adds what `other` has seen."""
        self.count += other.count
        self._sum, self._products = self._sum + other._sum, self._products + other._products

    @property
    def mean(self) -> Array:
        """Float64 (groups, K)."""
        return self._sum / self.count

    def about(self, center: Array) -> Array:
        """Mean of `(x - center) (x - center)^T`, float64 (groups, K, K); `center` has shape (groups, K)."""
        cross = center[:, :, None] * self.mean[:, None, :]
        return np.asarray(
            self._products / self.count - cross - cross.swapaxes(1, 2) + center[:, :, None] * center[:, None, :]
        )


class Gram(Observer):
    """Second moments of the rows that a linear op reads, apart for one sample in four, which is held out to judge.

    A sample is an entry of axis 0. Of each, some output positions are drawn.

    Args:
        cut: Window of a Conv.
        grid: Of the quantizer between the value and the op; the rows are what it makes of the value.
        errors: Rows are `[x', x - x']`, x' being the quantized input, and not x' alone.
        positions: Output positions of a sample that are drawn at most.
        seed: Seed of the draw.

    Attributes:
        fit: Moments to choose integers by.
        held_out: Moments to judge them by.
    """

    def __init__(self, cut: Window | None, grid: Grid | None, *, errors: bool, positions: int, seed: int = 0) -> None:
        self.cut, self.grid, self.errors, self.positions, self.seed = cut, grid, errors, positions, seed
        self.seen = 0
        self.fit, self.held_out = SecondMoments(), SecondMoments()

    @override
    def update(self, x: Array) -> None:
        x = np.atleast_2d(np.asarray(x, np.float32))
        if not np.isfinite(x).all():
            raise CalibrationError("it holds NaN or infinity")
        for start, part in self._slabs(x):
            numbers = range(self.seen + start, self.seen + start + len(part))
            rows = self._quantized(rows_of(part, self.cut, [self._draw(n, part) for n in numbers]))
            held = np.array([n % _HELD_OUT == 1 for n in numbers])
            for moments, mask in ((self.fit, ~held), (self.held_out, held)):
                if mask.any():
                    moments.add(np.ascontiguousarray(np.concatenate(rows[mask]).swapaxes(0, 1)))
        self.seen += len(x)

    @override
    def merge(self, other: Gram) -> None:
        if (other.cut, other.errors) != (self.cut, self.errors):
            raise CalibrationError("cannot merge second moments of different windows")
        self.seen += other.seen
        self.fit.merge(other.fit)
        self.held_out.merge(other.held_out)

    def _slabs(self, x: Array) -> Iterator[tuple[int, Array]]:
        """Parts of axis 0 whose patches are small enough, with the number of the first sample."""
        taps = 1 if self.cut is None else math.prod(self.cut.kernel)
        channels = x.shape[-1] if self.cut is None else x.shape[1]
        step = max(1, _SLAB // (channels * taps * max(min(position_count(x, self.cut), self.positions), 1)))
        for start in range(0, len(x), step):
            yield start, x[start : start + step]

    def _draw(self, number: int, x: Array) -> Array | None:
        count = position_count(x, self.cut)
        if count <= self.positions:
            return None
        return np.sort(np.random.default_rng((self.seed, number)).choice(count, self.positions, replace=False))

    def _quantized(self, rows: Array) -> Array:
        grid = self.grid
        if grid is None:
            return np.concatenate([rows, np.zeros_like(rows)], axis=-1) if self.errors else rows
        quantized = grid.round_trip(rows)
        if not self.errors:
            return quantized
        if int(grid.zero_point) == grid.qmin:
            # Stands for a ReLU or Clip that was dropped in favour of the quantizer: what it cut off is no error.
            rows = np.clip(rows, grid.low, grid.high)
        return np.concatenate([quantized, rows - quantized], axis=-1)
