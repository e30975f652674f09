"""GPTQ's mathematics against the paper's algorithm, exhaustive search, and rounding to nearest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._gptq import gptq_round


def problem(rows: int, columns: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weight, step of each row, and the second moments of inputs that depend on each other."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(4 * columns, columns)) @ rng.normal(size=(columns, columns)) * rng.uniform(0.2, 2, columns)
    weight = rng.normal(size=(rows, columns))
    return weight, np.abs(weight).max(axis=1) / 7, x.T @ x / len(x)


def to_grid(scale: np.ndarray, top: int = 7):
    def quantize(number, column):
        codes = np.clip(np.rint(column / scale), -top, top)
        return codes, codes * scale

    return quantize


def as_published(weight: np.ndarray, scale: np.ndarray, gram: np.ndarray, damp: float, act_order: bool) -> np.ndarray:
    """Algorithm 1 of arXiv 2210.17323, one column at a time: every error is passed on to all columns that are left."""
    columns = len(gram)
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else np.arange(columns)
    damped = gram + damp * np.diagonal(gram).mean() * np.eye(columns)
    inverse = np.linalg.inv(damped[np.ix_(order, order)])
    upper = np.linalg.cholesky(inverse).T
    left, codes = weight[:, order].copy(), np.zeros(weight.shape)
    for j in range(columns):
        codes[:, order[j]] = np.clip(np.rint(left[:, j] / scale), -7, 7)
        error = (left[:, j] - codes[:, order[j]] * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    return codes


def output_error(change: np.ndarray, gram: np.ndarray) -> np.ndarray:
    return np.einsum("nk,kl,nl->n", change, gram, change)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_same_integers_as_the_published_algorithm(act_order, block):
    weight, scale, gram = problem(9, 23)
    codes, values = gptq_round(weight, gram, to_grid(scale), damp=0.03, act_order=act_order, block=block)
    np.testing.assert_array_equal(codes, as_published(weight, scale, gram, 0.03, act_order))
    np.testing.assert_array_equal(values, codes * scale[:, None])


def test_error_is_below_that_of_rounding_to_nearest():
    for seed in range(5):
        weight, scale, gram = problem(16, 40, seed)
        _, values = gptq_round(weight, gram, to_grid(scale))
        nearest = np.clip(np.rint(weight / scale[:, None]), -7, 7) * scale[:, None]
        assert output_error(weight - values, gram).sum() < 0.5 * output_error(weight - nearest, gram).sum()


def test_between_the_best_integers_and_the_nearest():
    weight, _, gram = problem(12, 4)
    step = np.abs(weight).max() / 3
    grid = np.array(list(itertools.product(range(-4, 5), repeat=4))) * step
    best = np.array([min(output_error(w - grid, gram)) for w in weight])
    _, values = gptq_round(weight, gram, to_grid(np.full(12, step), 4), damp=1e-9)
    found = output_error(weight - values, gram)
    nearest = output_error(weight - np.rint(weight / step) * step, gram)
    assert (found >= best - 1e-12).all()
    assert found.sum() - best.sum() < 0.5 * (nearest.sum() - best.sum())


def test_independent_inputs_are_rounded_to_nearest():
    weight, scale, _ = problem(5, 12)
    codes, _ = gptq_round(weight, np.diag(np.arange(12.0)), to_grid(scale))
    np.testing.assert_array_equal(codes, np.rint(weight / scale[:, None]))


def test_leading_axes_are_problems_of_their_own():
    parts = [problem(3, 9, seed) for seed in range(4)]
    weight, scale, gram = (np.stack([p[i] for p in parts]) for i in range(3))
    codes, _ = gptq_round(weight, gram, to_grid(scale))
    alone = [gptq_round(w, g, to_grid(s))[0] for w, s, g in parts]
    np.testing.assert_array_equal(codes, np.stack(alone))


@pytest.mark.parametrize("act_order", [True, False])
def test_scales_and_zero_points_in_blocks_of_columns(act_order):
    weight, _, gram = problem(6, 32)
    blocks = weight.reshape(6, 4, 8)
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    scale, zero = (high - low) / 15, np.rint(-low / ((high - low) / 15))

    def quantize(number, column):
        s, z = scale[:, number // 8], zero[:, number // 8]
        codes = np.clip(np.rint(column / s) + z, 0, 15)
        return codes, (codes - z) * s

    codes, values = gptq_round(weight, gram, quantize, act_order=act_order)
    spread = np.repeat(scale, 8, axis=1), np.repeat(zero, 8, axis=1)
    np.testing.assert_allclose(values, (codes - spread[1]) * spread[0], rtol=0, atol=1e-12)
    nearest = (np.clip(np.rint(weight / spread[0]) + spread[1], 0, 15) - spread[1]) * spread[0]
    assert output_error(weight - values, gram).sum() < 0.7 * output_error(weight - nearest, gram).sum()


def test_works_in_the_precision_of_the_weight():
    weight, scale, gram = problem(6, 20)
    codes, values = gptq_round(weight.astype(np.float32), gram, to_grid(scale.astype(np.float32)))
    assert codes.dtype == values.dtype == np.float32
    assert (codes == gptq_round(weight, gram, to_grid(scale))[0]).mean() > 0.95


def test_inputs_that_are_always_zero():
    weight, scale, gram = problem(4, 10)
    gram[3] = gram[:, 3] = 0.0
    codes, _ = gptq_round(weight, gram, to_grid(scale))
    np.testing.assert_array_equal(codes[:, 3], np.rint(weight[:, 3] / scale))
    silent, _ = gptq_round(weight, np.zeros_like(gram), to_grid(scale))
    np.testing.assert_array_equal(silent, np.rint(weight / scale[:, None]))


def test_rounding_errors_in_the_moments_are_damped_away():
    weight, scale, gram = problem(4, 6)
    gram -= 1.001 * np.linalg.eigvalsh(gram)[0] * np.eye(6) + 0.02 * np.diagonal(gram).mean() * np.eye(6)
    assert np.linalg.eigvalsh(gram)[0] < 0
    codes, _ = gptq_round(weight, gram, to_grid(scale), damp=1e-4)
    assert np.isfinite(codes).all()
    with pytest.raises(CalibrationError, match="positive definite"):
        gptq_round(weight, 1e9 * (1 - np.eye(6)) + np.eye(6), to_grid(scale))


def test_zeros_of_a_mask_stay():
    weight, scale, gram = problem(16, 40)
    mask = np.tile([True, False, False, True], (16, 10))
    codes, _ = gptq_round(np.where(mask, weight, 0.0), gram, to_grid(scale))
    assert not codes[~mask].any()
    nearest = np.rint(weight / scale[:, None]) * scale[:, None]
    errors = [output_error(np.where(mask, q - weight, 0.0), gram) for q in (codes * scale[:, None], nearest)]
    assert errors[0].sum() < errors[1].sum()
