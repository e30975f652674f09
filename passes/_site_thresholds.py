"""Thresholds of sites from calibration data, and how much sparsity each site gets."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._sites import Site
from onnxcomp.rewrite import Context, Sweep
from onnxcomp.sparsity import Magnitudes, MeanMagnitude, TailError
from onnxcomp.stats import Group, Observer, RowSample
from onnxcomp.target import Array

_LEVELS = tuple(i / 20 for i in range(20))
"""Sparsities that an allocation chooses from."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What is dropped at a site.

    Attributes:
        value: Values of at most this magnitude are dropped: float32, a scalar or one value a channel.
        sparsity: Share of the calibration values that it drops.
    """

    value: Array
    sparsity: float


class Calibration:
    """Statistics of sites, gathered by as few runs over the data as will do.

    Args:
        model: The model.
        sites: The sites.
        context: With a sweep over the data.

    Raises:
        CalibrationError: If there is no data.
    """

    def __init__(self, model: ir.Model, sites: Sequence[Site], context: Context) -> None:
        if context.sweep is None:
            raise CalibrationError("it needs calibration data; give some with --data")
        self._model, self._sites, self._sweep, self._seed = model, sites, context.sweep, context.seed
        self._factors = _factors(model, sites, context.sweep)
        self._magnitudes: dict[Site, Magnitudes] = {}
        self._samples: dict[str, RowSample] = {}

    def observe(self, rows: int = 0) -> None:
        """Runs the data; `rows` of each tensor are sampled besides."""
        parts: dict[str, list[Observer]] = {}
        shared: dict[str, Magnitudes] = {}
        for site in self._sites:
            name, factor = _name(site.observed), self._factors[site]
            if factor is None and name in shared:
                self._magnitudes[site] = shared[name]
                continue
            magnitudes = Magnitudes(factor)
            self._magnitudes[site] = magnitudes
            if factor is None:
                shared[name] = magnitudes
            parts.setdefault(name, []).append(magnitudes)
        if rows:
            for site in self._sites:
                for value in (site.observed, _linear(site)):
                    if value is not None and _name(value) not in self._samples:
                        # Samples of the same seed keep the same tokens.
                        sample = self._samples[_name(value)] = RowSample(rows, seed=self._seed)
                        parts.setdefault(_name(value), []).append(sample)
        self._sweep(self._model, {name: Group(*group) for name, group in parts.items()})

    def threshold(self, site: Site, sparsity: float) -> Threshold:
        """Drops a share of the values."""
        seen = self._magnitudes[site]
        level = seen.quantile(sparsity)
        return self._spread(site, level, seen.share(level))

    def fixed(self, site: Site, value: float) -> Threshold:
        """Drops what has a score of at most `value`."""
        return self._spread(site, value, self._magnitudes[site].share(value))

    def tail(self, site: Site, error: float) -> Threshold:
        """Drops as much as a mean relative tail error allows; the score has to be the norm of a neuron's output."""
        found = TailError(self._samples[_name(site.observed)].sample, site.dense.matrix())
        return self.fixed(site, found.threshold(error))

    def errors(self, site: Site) -> Array:
        """Squared error of the output over its squared norm, for each of the levels, on the sampled tokens."""
        rows = self._samples[_name(site.observed)].sample
        linear, factor = _linear(site), self._factors[site]
        scores = np.abs(rows) if factor is None else np.abs(rows) * factor
        if linear is not None:
            rows = rows * self._samples[_name(linear)].sample
        matrix = site.dense.matrix()
        power = float(np.square(rows @ matrix, dtype=np.float64).sum())
        found = [0.0]
        for level in _LEVELS[1:]:
            dropped = np.where(scores <= self._magnitudes[site].quantile(level), rows, np.float32(0.0))
            noise = float(np.square(dropped @ matrix, dtype=np.float64).sum())
            found.append(noise / power if power else 0.0)
        return np.maximum.accumulate(np.asarray(found))

    def _spread(self, site: Site, level: float, sparsity: float) -> Threshold:
        factor = self._factors[site]
        if factor is None:
            return Threshold(value=np.asarray(level, np.float32), sparsity=sparsity)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.where(factor > 0.0, np.float32(level) / factor, np.inf)
        # A channel that adds nothing is always dropped; infinity is no constant for a kernel.
        return Threshold(value=np.minimum(value, np.finfo(np.float32).max).astype(np.float32), sparsity=sparsity)


def allocate(
    sites: Sequence[Site], errors: Mapping[Site, Array], sparsity: float, max_error: float | None
) -> dict[Site, float]:
    """Raises the sparsity, step by step, where a weight that is skipped costs the least error of its layer's output.

    After TEAL (Liu et al., arXiv 2408.14690), over all layers at once. As single steps of a convex curve cost more and
    more, this minimises the sum of the errors; steps that cost less than those before are taken together.

    Args:
        sites: The sites.
        errors: Error at each level of sparsity.
        sparsity: Mean over all weights to reach.
        max_error: Mean error over the sites not to exceed, instead.

    Returns:
        Sparsity of each site.
    """
    levels = dict.fromkeys(sites, 0)
    paths = {site: _convex(errors[site]) for site in sites}
    queue = [_step(i, site, 0, paths[site], errors[site]) for i, site in enumerate(sites)]
    heapq.heapify(queue)
    total = sum(site.weights for site in sites)
    reached = error = 0.0
    while queue:
        _, index, at = heapq.heappop(queue)
        site = sites[index]
        path = paths[site]
        gained = site.weights / total * (_LEVELS[path[at + 1]] - _LEVELS[path[at]])
        cost = float(errors[site][path[at + 1]] - errors[site][path[at]]) / len(sites)
        if reached + gained / 2 > sparsity if max_error is None else error + cost > max_error:
            continue  # a site with fewer weights may still fit
        reached, error, levels[site] = reached + gained, error + cost, path[at + 1]
        if at + 2 < len(path):
            heapq.heappush(queue, _step(index, site, at + 1, path, errors[site]))
    return {site: _LEVELS[level] for site, level in levels.items()}


def _step(index: int, site: Site, at: int, path: Sequence[int], errors: Array) -> tuple[float, int, int]:
    """Price of the step from point `at` of a path, for the queue."""
    now, then = path[at], path[at + 1]
    return float(errors[then] - errors[now]) / (site.weights * (_LEVELS[then] - _LEVELS[now])), index, at


def _convex(errors: Array) -> list[int]:
    """Levels on the lower convex hull of the errors."""
    hull: list[int] = []
    for level in range(len(errors)):
        hull.append(level)
        while len(hull) > 2:
            slopes = [(errors[b] - errors[a]) / (b - a) for a, b in pairwise(hull[-3:])]
            if slopes[0] < slopes[1]:
                break
            del hull[-2]
    return hull


def _factors(model: ir.Model, sites: Sequence[Site], sweep: Sweep) -> dict[Site, Array | None]:
    """Factor of each channel's score; None for 1."""
    means = {_name(v): MeanMagnitude() for s in sites if s.by_linear and (v := _linear(s)) is not None}
    if means:
        sweep(model, means)
    found: dict[Site, Array | None] = {}
    for site in sites:
        factor: Array | None = None
        if site.by_linear and (linear := _linear(site)) is not None:
            factor = means[_name(linear)].mean.astype(np.float32)
        if site.by_norms:
            norms = site.dense.row_norms()
            factor = norms if factor is None else factor * norms
        found[site] = factor
    return found


def _linear(site: Site) -> ir.Value | None:
    """What the gate is multiplied by, where the decision is taken before."""
    block = site.block
    return block.linear if block is not None and site.observed is block.activated else None


def _name(value: ir.Value) -> str:
    return value.name or ""
