"""Observers of sparsity against numpy, merged and in parts; tail errors against their definition."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.errors import CalibrationError
from onnxcomp.sparsity import Firing, Magnitudes, MeanMagnitude, TailError, firing_histogram


def spiky(rows: int = 400, channels: int = 24, seed: int = 0) -> np.ndarray:
    """Values over many decades, with massive outliers, as before the last product of SwiGLU."""
    random = np.random.default_rng(seed)
    x = random.standard_t(1.5, size=(rows, channels)) * np.exp(random.normal(size=channels) * 3)
    x[::50, 3] = 1e6
    return x.astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("q", [0.0, 0.05, 0.25, 0.5, 0.9, 0.99])
def test_quantiles(q, weighted):
    x = spiky()
    weights = np.random.default_rng(1).uniform(0.1, 10, x.shape[1]).astype(np.float32) if weighted else None
    seen = Magnitudes(weights)
    for part in np.split(x, 4):
        seen.update(part.reshape(10, 10, -1))
    values = np.abs(x) * (1 if weights is None else weights)
    level = seen.quantile(q)
    assert abs((values <= level).mean() - q) < 0.005
    np.testing.assert_allclose(seen.share(level), q, atol=1e-6)
    if q:
        np.testing.assert_allclose(level, np.quantile(values, q), rtol=0.01)


def test_zeros():
    seen = Magnitudes()
    seen.update(np.array([[0.0, -0.0, 0.0, 1.0]], np.float32))
    assert seen.quantile(0.5) == seen.quantile(0.75) == 0.0
    assert seen.quantile(1.0) > 1.0 - 1 / 128
    assert seen.share(0.0) == 0.75
    assert seen.share(-1.0) == 0.0


def test_merge():
    a, b = spiky(seed=1), spiky(seed=2)
    for make in (Magnitudes, MeanMagnitude, lambda: Firing(0.5)):
        whole, first, second = make(), make(), make()
        for observer, parts in ((whole, (a, b)), (first, (a,)), (second, (b,))):
            for part in parts:
                observer.update(part)
        first.merge(second)
        for name in ("counts", "mean", "rates", "density"):
            if hasattr(whole, name):
                np.testing.assert_allclose(getattr(first, name), getattr(whole, name), rtol=1e-12)
    with pytest.raises(CalibrationError, match="different weights"):
        Magnitudes().merge(Magnitudes(np.ones(3)))
    with pytest.raises(CalibrationError, match="different thresholds"):
        Firing(0.5).merge(Firing(0.25))


@pytest.mark.parametrize("kind", [Magnitudes, MeanMagnitude])
def test_bad_values(kind):
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        kind().update(np.array([[1.0, np.nan]], np.float32))
    with pytest.raises(CalibrationError, match="no data"):
        kind().quantile(0.5) if kind is Magnitudes else kind().mean


def test_mean_magnitude():
    x = spiky().reshape(4, 100, -1)
    seen = MeanMagnitude()
    seen.update(x)
    np.testing.assert_allclose(seen.mean, np.abs(x.astype(np.float64)).mean(axis=(0, 1)), rtol=1e-12)


def test_firing():
    x = np.random.default_rng(0).normal(size=(500, 20)).astype(np.float32)
    x[:, 4] = 0.0
    threshold = np.linspace(0, 2, 20).astype(np.float32)
    seen = Firing(threshold)
    for part in np.split(x, 5):
        seen.update(part)
    fires = np.abs(x) > threshold
    np.testing.assert_allclose(seen.rates, fires.mean(axis=0))
    assert seen.density == pytest.approx(fires.mean())
    per_token = fires.mean(axis=1)
    for percent in (5, 50, 95):
        want = np.percentile(per_token, percent, method="inverted_cdf")
        assert seen.density_percentile(percent) == pytest.approx(want)
    counts = firing_histogram(seen.rates, (0.0, 0.1, 0.5, 1.0))
    assert counts[0] == (fires.sum(axis=0) == 0).sum() >= 1
    assert sum(counts) == 20


def test_tail_error():
    random = np.random.default_rng(0)
    rows, down = spiky(64, 32).clip(-50, 50), random.normal(size=(32, 8)).astype(np.float32)
    tail = TailError(rows, down)
    level = tail.at(0.5)
    norms = np.abs(rows) * np.linalg.norm(down, axis=1)
    dropped = np.where(norms <= level, rows, 0) @ down
    want = (np.linalg.norm(dropped, axis=1) / np.linalg.norm(rows @ down, axis=1)).mean()
    assert tail.error(level) == pytest.approx(want, rel=1e-5)
    assert tail.sparsity(level) == pytest.approx(0.5, abs=1e-3)
    curve = tail.curve((0.0, 0.25, 0.5, 0.75))
    assert curve[0] == 0.0
    assert list(curve) == sorted(curve)
    found = tail.threshold(0.1)
    assert tail.error(found) <= 0.1 < tail.error(tail.at(tail.sparsity(found) + 0.01))


def test_tail_error_of_nothing():
    tail = TailError(np.zeros((4, 3), np.float32), np.ones((3, 2), np.float32))
    assert tail.error(1.0) == 0.0
