"""NoisyQuant: the closed forms of the theory against the real quantizer. What it gains is in `test_noise_gains.py`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcomp.noise import channel_noise
from onnxcomp.quant import Grid, activation_grid

HALF_STEP = 0.5  # b: the grid points around the bin in question stand at -b and b
STEP = 2 * HALF_STEP


def mean_error(x: float, n: float, points: int = 40001) -> float:
    """Mean over noise in [-n, n] of the squared error of the real quantizer, for a value `x` off the bin's center."""
    grid = Grid(
        scale=np.asarray(STEP, np.float64), zero_point=np.asarray(128, np.uint8), qmin=0, qmax=255, dtype=np.dtype("u1")
    )
    noise = (np.arange(points) + 0.5) / points * 2 * n - n
    value = HALF_STEP + x  # a center of a bin, since 0 is a grid point
    shifted = value + noise
    rounded = (np.clip(np.rint(shifted / STEP) + 128, grid.qmin, grid.qmax) - 128) * STEP
    return float(((rounded - noise - value) ** 2).mean())


def closed_form(x: float, n: float) -> float:
    b = HALF_STEP
    return b**2 - b * n + n**2 / 3 - b * x**2 / n + x**2


@pytest.mark.parametrize("x", [0.0, 0.05, 0.11, 0.2, 0.31])
@pytest.mark.parametrize("n", [0.32, 0.4, 0.5, 0.6, 0.68])
def test_expected_error_in_closed_form(x, n):
    assert x <= n <= 2 * HALF_STEP - x
    assert mean_error(x, n) == pytest.approx(closed_form(x, n), abs=5e-5)


@pytest.mark.parametrize("n", [0.2, 0.35, 0.5])
def test_noise_helps_below_the_threshold_and_hurts_above(n):
    threshold = n - math.sqrt(n**3 / (3 * HALF_STEP))
    for x, helps in ((threshold - 0.01, True), (threshold + 0.01, False)):
        without = (HALF_STEP - x) ** 2
        assert (mean_error(x, n) < without) is helps
        assert (closed_form(x, n) < without) is helps


def test_half_a_step_of_noise_gives_the_same_error_everywhere():
    for x in np.linspace(0, HALF_STEP, 11):
        assert mean_error(float(x), HALF_STEP) == pytest.approx(HALF_STEP**2 / 3, abs=5e-5)


def test_best_noise_at_the_center_of_a_bin():
    assert mean_error(0.0, 1.5 * HALF_STEP) == pytest.approx(HALF_STEP**2 / 4, abs=5e-5)
    assert closed_form(0.0, 1.5 * HALF_STEP) == pytest.approx(HALF_STEP**2 / 4, abs=1e-12)


def test_channel_noise_puts_constant_channels_on_the_grid():
    rows = np.tile(np.array([0.13, -0.21, 0.4], np.float32), (50, 1))
    grid = activation_grid(-1.0, 1.0, 4)
    left = grid.round_trip(rows + channel_noise(rows, grid, 64)) - channel_noise(rows, grid, 64) - rows
    assert np.abs(left).max() <= float(grid.scale) / 64
    assert np.abs(grid.round_trip(rows) - rows).max() > float(grid.scale) / 8
