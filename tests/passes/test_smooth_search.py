"""Scales against numpy references, and what the search chooses."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._smooth_search import Layer, Smoothing, _rounded, _Trial, narrowed, repq, search, smoothquant
from onnxcomp.quant import activation_grid, weight_grid
from onnxcomp.stats import ChannelRange

ROWS, CHANNELS, OUTPUTS = 512, 24, 40


def layer(bits: int = 8, *, groups: np.ndarray | None = None, seed: int = 0) -> Layer:
    random = np.random.default_rng(seed)
    width = np.where(np.arange(CHANNELS) % 9 == 4, 30.0, 1.0) * random.lognormal(0, 0.3, CHANNELS)
    rows = (random.normal(size=(ROWS, CHANNELS)) * width + random.normal(size=CHANNELS) * 3 * width).astype(np.float32)
    weight = random.normal(size=(CHANNELS, OUTPUTS)).astype(np.float32)
    return Layer(
        rows=rows,
        low=rows.min(axis=0),
        high=rows.max(axis=0),
        weight=weight,
        activation_bits=bits,
        weight_bits=bits,
        groups=groups,
    )


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_repq_gives_the_codes_of_quantizers_of_each_channel(bits):
    """RepQ-ViT's formulas: one grid of the tensor, after scale and shift, rounds as the channels' own grids do."""
    case = layer()
    levels = 2**bits - 1
    s = (case.high - case.low) / levels
    z = np.rint(-case.low / s)
    by_channel = np.clip(np.rint(case.rows / s) + z, 0, levels)
    scale, shift = repq(case.low, case.high, bits)
    mean_s, mean_z = s.mean(), np.rint(z.mean())
    np.testing.assert_allclose(scale, s / mean_s, rtol=1e-6)
    np.testing.assert_allclose(shift, -s * (z - mean_z), rtol=1e-5)
    together = np.clip(np.rint((case.rows - shift) / scale / mean_s) + mean_z, 0, levels)
    assert (together == by_channel).mean() > 0.9999  # one code in thousands may lie on a tie


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_formula(alpha):
    case = layer()
    scale = smoothquant(case, alpha, np.zeros(CHANNELS))
    expected = np.abs(case.rows).max(axis=0) ** alpha / np.abs(case.weight).max(axis=1) ** (1 - alpha)
    np.testing.assert_allclose(scale / scale[0], expected / expected[0], rtol=1e-5)
    assert np.log(scale).mean() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("width", [2.0, 8.0])
def test_only_wide_channels_are_narrowed(width):
    case = layer()
    scale = narrowed(case, width, np.zeros(CHANNELS))
    reach = np.abs(case.rows).max(axis=0)
    wide = reach > width * np.median(reach)
    assert wide.any()
    np.testing.assert_array_equal(scale[~wide], 1.0)
    np.testing.assert_allclose((reach / scale)[wide], width * np.median(reach), rtol=1e-6)


def test_dead_channels_get_a_bounded_scale():
    case = layer()
    case.low[:3] = case.high[:3] = 0.0
    case.weight[5] = 0.0
    for scale in (smoothquant(case, 0.5, np.zeros(CHANNELS)), repq(case.low, case.high, 8)[0]):
        assert np.isfinite(scale).all()
        assert scale.min() > 1e-5
        assert scale.max() < 1e5


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("method", ["smoothquant", "repq", "best"])
def test_the_ratio_is_what_a_plain_computation_finds(method, bits):
    """Held-out error of a layer quantized from min to max, rows of large output counting less.

    The search takes the range of least squared error, which is a little better.
    """
    case = layer(bits)
    alphas = [i / 20 for i in range(21)]
    found, ratio = search(case, method, alphas, shifts=True, seed=0)

    def error(scale: np.ndarray, shift: np.ndarray) -> float:
        x = ((case.rows - shift) / scale).astype(np.float32)
        w = case.weight * scale[:, None]
        grid = activation_grid(x[::2].min(), x[::2].max(), bits)
        step = np.abs(w).max(axis=0) / (2 ** (bits - 1) - 1)
        rounded = grid.round_trip(x[1::2]) @ (np.rint(w / step) * step)
        power = ((case.rows[1::2] @ case.weight) ** 2).sum(axis=1)
        rows = ((rounded - x[1::2] @ w) ** 2).sum(axis=1)
        return float((rows / (1 + power / np.median(power))).sum())

    plain = error(found.scale, found.shift) / error(np.ones(CHANNELS), np.zeros(CHANNELS))
    assert ratio == pytest.approx(plain, rel=0.35)
    assert ratio < {"smoothquant": 0.35, "repq": 0.25, "best": 0.25}[method]


def test_best_is_no_worse_than_either():
    case = layer()
    ratios = {
        m: search(case, m, [i / 20 for i in range(21)], shifts=True, seed=0)[1] for m in ("smoothquant", "repq", "best")
    }
    assert ratios["best"] <= 1.05 * min(ratios.values())


def test_no_shift_where_the_place_takes_none():
    found, _ = search(layer(), "best", [0.5, 1.0], shifts=False, seed=0)
    assert not found.shift.any()


def test_groups_share_scale_and_shift():
    groups = np.arange(CHANNELS) // 4
    for method in ("smoothquant", "repq", "best"):
        found, _ = search(layer(groups=groups), method, [0.5, 1.0], shifts=True, seed=0)
        for vector in (found.scale, found.shift):
            np.testing.assert_allclose(np.ptp(vector.reshape(-1, 4), axis=1), 0.0, atol=1e-12)


def test_range_of_each_channel_does_not_depend_on_batches():
    case = layer()
    whole, parts, other = ChannelRange(), ChannelRange(), ChannelRange()
    whole.update(case.rows.reshape(4, -1, CHANNELS))
    parts.update(case.rows[:100])
    other.update(case.rows[100:])
    parts.merge(other)
    for seen in (whole, parts):
        np.testing.assert_array_equal(seen.low, case.low)
        np.testing.assert_array_equal(seen.high, case.high)
    with pytest.raises(CalibrationError, match="axes"):
        parts.merge(ChannelRange(axis=1))
    with pytest.raises(CalibrationError, match="NaN"):
        parts.update(np.full((2, CHANNELS), np.nan))


@pytest.mark.parametrize("seed", range(4))
def test_few_trials_find_what_all_exponents_would(seed):
    """By the rows that the search sees; on held-out rows a neighbour may be ahead by chance."""
    case, nowhere = layer(seed=seed), np.zeros(CHANNELS)
    alphas = [i / 20 for i in range(21)]
    found, _ = search(case, "smoothquant", alphas, shifts=False, seed=0)
    trial = _Trial(case, 0)
    each = [Smoothing(scale=smoothquant(case, a, nowhere), shift=nowhere, label=f"{a}") for a in alphas]
    assert trial.error(found, held_out=False) <= 1.1 * min(trial.error(s, held_out=False) for s in each)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_in_place_is_the_grids(bits):
    x = np.random.default_rng(bits).normal(size=(50, 8)).astype(np.float32)
    grid = activation_grid(-1.5, 2.0, bits)
    np.testing.assert_allclose(_rounded(x.copy(), grid.scale, grid.low, grid.high), grid.round_trip(x), atol=1e-6)
    steps = weight_grid(x, bits, 1, "minmax")
    np.testing.assert_allclose(_rounded(x.copy(), steps.scale), steps.round_trip(x), atol=1e-6)
