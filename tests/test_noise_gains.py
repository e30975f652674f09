"""How much NoisyQuant's noise lowers the output error of a layer, on rows that the search did not see.

For the three searches (random draw, one offset, an offset a channel) an earlier study found .956 / .867 / .812 for
6-bit inputs behind a GELU, 1.0 / .912 / .893 at 4 bits, .996 / .991 / .984 behind a LayerNorm and 1.0 behind a ReLU;
its distribution is not known. Here every channel is normal before the activation, with a mean from N(0, 1) and a
standard deviation from LogNormal(0, 0.25), the weight has 8 bits, the range is min-max unless stated otherwise, and the
gain is a mean over six seeds. The tests hold what was measured for that. Behind a GELU it varies by .06 from seed to
seed, as the place of the lump between two levels does.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from onnxcomp.histogram import Histogram
from onnxcomp.noise import channel_noise, find_noise, output_error, random_noise, scalar_noise
from onnxcomp.quant import Grid, activation_grid, observed_range, weight_grid

CHANNELS, OUTPUTS, ROWS = 192, 96, 1024


def rows_of(kind: str, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    mean, spread = random.normal(0, 1, CHANNELS), random.lognormal(0, 0.25, CHANNELS)
    x = random.normal(size=(2 * ROWS, CHANNELS)) * spread + mean
    if kind == "gelu":
        # The approximation with tanh: within 1e-3 of the GELU, and fast without scipy.
        x = x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if kind == "relu":
        x = np.maximum(x, 0)
    return x.astype(np.float32)


def layer(kind: str, bits: int, seed: int, method: str = "minmax") -> tuple[np.ndarray, np.ndarray, Grid]:
    """Rows to search on and as many others, the weight as the kernel uses it, and the grid of the activation."""
    x = rows_of(kind, seed)
    histogram = Histogram()
    histogram.update(x[:ROWS])
    weight = np.random.default_rng(100 + seed).normal(0, CHANNELS**-0.5, (CHANNELS, OUTPUTS)).astype(np.float32)
    weight = weight_grid(weight, 8, 1, "minmax").round_trip(weight)
    return x, weight, activation_grid(*observed_range(histogram, method, bits), bits)


def gains(kind: str, bits: int, seed: int, method: str = "minmax") -> list[float]:
    """Output error with the noise of each search over that without noise."""
    x, weight, grid = layer(kind, bits, seed, method)
    seen, unseen = x[:ROWS], x[ROWS:]
    base = output_error(unseen, weight, grid, np.zeros(CHANNELS, np.float32))
    vectors = (random_noise(seen, weight, grid, seed), scalar_noise(seen, weight, grid), channel_noise(seen, grid))
    return [output_error(unseen, weight, grid, vector) / base for vector in vectors]


@pytest.mark.parametrize(
    ("kind", "bits", "measured", "tolerance"),
    [
        ("gelu", 6, (0.958, 0.800, 0.794), 0.02),
        ("gelu", 4, (0.999, 0.735, 0.731), 0.02),
        ("norm", 6, (1.004, 1.005, 1.003), 0.005),
        ("relu", 6, (1.000, 1.000, 1.004), 0.005),
    ],
)
def test_gains(kind, bits, measured, tolerance):
    found = np.mean([gains(kind, bits, seed) for seed in range(6)], axis=0)
    np.testing.assert_allclose(found, measured, rtol=0, atol=tolerance)


def test_gains_in_the_range_of_least_squared_error():
    np.testing.assert_allclose(gains("gelu", 4, 0, "mse"), (0.873, 0.724, 0.671), rtol=0, atol=0.02, err_msg="one seed")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 6])
def test_more_freedom_is_worth_more_behind_a_gelu(bits, seed):
    by_random, by_scalar, by_channel = gains("gelu", bits, seed)
    assert by_channel <= by_scalar + 0.01
    assert by_scalar < by_random < 1.02
    assert by_channel < 0.97


@pytest.mark.parametrize(("method", "bits"), [("random", 6), ("scalar", 6), ("channel", 6), ("best", 4), ("best", 8)])
def test_no_noise_behind_a_relu(method, bits):
    """Zeros sit on a level already; the other half of the values is spread evenly between levels."""
    x, weight, grid = layer("relu", bits, 0)
    noise = find_noise(x, weight, grid, method)
    assert noise.ratio > 0.99, "no search gains a percent, so the pass refuses it"
    assert (noise.method == "none") == (noise.ratio == 1.0) == (not noise.vector.any())


@pytest.mark.parametrize("method", ["random", "scalar", "channel"])
def test_the_ratio_is_that_of_held_out_rows(method):
    x, weight, grid = layer("gelu", 4, 1)
    noise = find_noise(x, weight, grid, method, seed=1)
    held_out = x[ROWS:]
    base = output_error(held_out, weight, grid, np.zeros(CHANNELS, np.float32))
    assert noise.ratio == pytest.approx(output_error(held_out, weight, grid, noise.vector) / base, rel=1e-4)
    if noise.method == "none":
        assert noise.ratio == 1.0


def test_what_find_noise_keeps_holds_on_rows_that_it_never_saw():
    x, weight, grid = layer("gelu", 6, 3)
    noise = find_noise(x[:ROWS], weight, grid, "best")
    assert noise.ratio <= 1.0
    fresh = x[ROWS:]
    zero = np.zeros_like(noise.vector)
    assert output_error(fresh, weight, grid, noise.vector) < output_error(fresh, weight, grid, zero)
