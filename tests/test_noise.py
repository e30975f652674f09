"""NoisyQuant: the closed forms of the theory against the real quantizer, and the searches on known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcomp.noise import channel_noise, find_noise, output_error, random_noise, scalar_noise
from onnxcomp.quant import Grid, activation_grid, observed_range, weight_grid
from onnxcomp.stats import Histogram

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


def gelu(x: np.ndarray) -> np.ndarray:
    erf = np.vectorize(math.erf)
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(np.float32)


def layer(kind: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of activations with channels of different means and spreads, and a weight."""
    random = np.random.default_rng(seed)
    channels = 256
    mean, spread = random.normal(-0.5, 0.7, channels), random.lognormal(-0.3, 0.5, channels)
    rows = (random.normal(size=(1600, channels)) * spread + mean).astype(np.float32)
    rows = {"gelu": gelu, "relu": lambda x: np.maximum(x, 0), "norm": lambda x: x}[kind](rows)
    weight = random.normal(0, 0.05, (channels, 64)).astype(np.float32)
    return np.asarray(rows, np.float32), weight_grid(weight, 8, 1, "minmax").round_trip(weight)


def grid_for(rows: np.ndarray, bits: int) -> Grid:
    histogram = Histogram()
    histogram.update(rows)
    return activation_grid(*observed_range(histogram, "mse", bits), bits)


def gains(kind: str, bits: int) -> dict[str, float]:
    """Output error with noise over that without, on rows that the search did not see."""
    rows, weight = layer(kind)
    seen, unseen = rows[:800], rows[800:]
    grid = grid_for(seen, bits)
    base = output_error(unseen, weight, grid, np.zeros(rows.shape[1], np.float32))
    vectors = {
        "random": random_noise(seen, weight, grid, 0),
        "scalar": scalar_noise(seen, weight, grid),
        "channel": channel_noise(seen, grid),
    }
    return {name: output_error(unseen, weight, grid, v) / base for name, v in vectors.items()}


@pytest.mark.parametrize("bits", [4, 6])
def test_gains_behind_a_gelu(bits):
    found = gains("gelu", bits)
    assert found["channel"] < 0.95
    assert found["channel"] < found["random"]
    assert found["random"] < 1.02


def test_gains_behind_a_layer_norm_are_small():
    found = gains("norm", 6)
    assert 0.9 < found["channel"] < 1.0


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_noise_is_refused_behind_a_relu_by_its_own_measure(bits):
    random = np.random.default_rng(1)
    rows = np.maximum(random.normal(-1.5, 1, (1600, 64)), 0).astype(np.float32)
    weight = random.normal(0, 0.05, (64, 32)).astype(np.float32)
    noise = find_noise(rows, weight, grid_for(rows, bits), "random")
    assert noise.method == "none"
    assert not noise.vector.any()
    assert noise.ratio == 1.0


def test_find_noise_never_worsens_held_out_rows():
    rows, weight = layer("gelu", seed=3)
    grid = grid_for(rows, 6)
    noise = find_noise(rows[:1000], weight, grid, "best")
    assert noise.ratio <= 1.0
    fresh = rows[1000:]
    zero = np.zeros_like(noise.vector)
    assert output_error(fresh, weight, grid, noise.vector) < output_error(fresh, weight, grid, zero)


def test_channel_noise_puts_constant_channels_on_the_grid():
    rows = np.tile(np.array([0.13, -0.21, 0.4], np.float32), (50, 1))
    grid = activation_grid(-1.0, 1.0, 4)
    left = grid.round_trip(rows + channel_noise(rows, grid, 64)) - channel_noise(rows, grid, 64) - rows
    assert np.abs(left).max() <= float(grid.scale) / 64
    assert np.abs(grid.round_trip(rows) - rows).max() > float(grid.scale) / 8
