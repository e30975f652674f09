"""Scores, SparseGPT and least squares against plain numpy, loop by loop."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxcomp.errors import RecipeError
from onnxcomp.passes._gram import Gram, window
from onnxcomp.passes._nm_inputs import Squares
from onnxcomp.passes._nm_scores import Pattern, scores_of
from onnxcomp.passes._nm_solve import least_squares, output_errors, sparsegpt
from onnxcomp.passes.nm_mask import NmMask

PATTERNS = ["2:4", "1:4", "4:8", "1:8", "1:16", "3:5"]


def moments(columns: int, rows: int = 400, seed: int = 0) -> np.ndarray:
    """Of inputs that depend on each other and differ in size."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns // 2)) @ random.normal(size=(columns // 2, columns))
    x = (x + 0.3 * random.normal(size=x.shape)) * random.uniform(0.1, 3.0, columns)
    return x.T @ x / rows


@pytest.mark.parametrize("text", PATTERNS)
@pytest.mark.parametrize("columns", [1, 4, 16, 37, 80])
def test_largest_scores_of_every_group_stay(text, columns):
    pattern = Pattern.parse(text)
    scores = np.random.default_rng(0).random((3, 7, columns))
    mask = pattern.choose(scores, np.ones_like(scores))
    for index in np.ndindex(3, 7):
        for start in range(0, columns, pattern.size):
            group = scores[index][start : start + pattern.size]
            kept = mask[index][start : start + pattern.size]
            assert kept.sum() == min(pattern.kept, len(group))
            assert kept.all() or group[kept].min() > group[~kept].max()
    assert pattern.holds(mask)
    assert not pattern.holds(np.ones((2, pattern.size), bool))


def test_equal_scores_go_by_magnitude_then_by_place():
    pattern = Pattern.parse("2:4")
    mask = pattern.choose(np.zeros((2, 4)), np.array([[1.0, 2.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(mask, [[False, True, True, False], [True, True, False, False]])


@pytest.mark.parametrize("text", ["", "2", "4:4", "4:2", "0:4", "2:4:8", "a:b", "-1:4", "2: 4"])
def test_patterns_that_are_none(text):
    with pytest.raises(RecipeError, match="is not N:M with N < M"):
        NmMask(pattern=text)


def test_scores():
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(6, 8)), random.normal(size=(50, 8)) * random.uniform(0.1, 5.0, 8)
    norms = np.sqrt((x**2).sum(axis=0))
    wanda, ria = np.zeros((6, 8)), np.zeros((6, 8))
    for i, j in itertools.product(range(6), range(8)):
        size = abs(weight[i, j])
        wanda[i, j] = size * norms[j]
        ria[i, j] = (size / sum(abs(weight[i, :])) + size / sum(abs(weight[:, j]))) * norms[j] ** 0.5
    squares = (x**2).mean(axis=0)[None]
    found = scores_of("wanda", weight[None], squares)[0]
    np.testing.assert_allclose(found * np.sqrt(50), wanda, rtol=1e-12)
    np.testing.assert_allclose(scores_of("ria", weight[None], squares)[0] * 50**0.25, ria, rtol=1e-12)
    np.testing.assert_array_equal(scores_of("magnitude", weight[None], None)[0], abs(weight))


def test_relative_importance_of_a_dead_channel_is_zero():
    weight = np.ones((1, 3, 4))
    weight[0, 1], weight[0, :, 2] = 0.0, 0.0
    found = scores_of("ria", weight, np.ones((1, 4)))
    assert np.isfinite(found).all()
    assert not found[0, 1].any()
    assert not found[0, :, 2].any()


def surgeon(weight: np.ndarray, hessian: np.ndarray, kept: int, size: int) -> np.ndarray:
    """SparseGPT by its definition: the inverse of what is left is computed anew for every column."""
    weight = weight.copy()
    count = weight.shape[1]
    mask = np.zeros(weight.shape, bool)
    for j in range(count):
        if j % size == 0:
            end = min(j + size, count)
            # As in the paper, the weight of a group is compared by inverses over the columns from each on.
            inverses = [np.linalg.inv(hessian[c:, c:])[0, 0] for c in range(j, end)]
            for i in range(len(weight)):
                order = np.argsort(-(weight[i, j:end] ** 2) / inverses)
                mask[i, j + order[:kept]] = True
        inverse = np.linalg.inv(hessian[j:, j:])
        for i in range(len(weight)):
            value = weight[i, j] if mask[i, j] else 0.0
            error = weight[i, j] - value
            weight[i, j:] -= error / inverse[0, 0] * inverse[0]
            weight[i, j] = value
    return weight


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:8", "2:5"])
@pytest.mark.parametrize("block", [1, 6, 8, 128])
def test_sparsegpt_is_the_optimal_brain_surgeon(text, block):
    pattern, gram = Pattern.parse(text), moments(22)
    weight = np.random.default_rng(1).normal(size=(5, 22))
    damped = gram + 0.01 * np.diag(gram).mean() * np.eye(22)
    found, mask = sparsegpt(weight, gram, pattern, damp=0.01, block=block, snap=None)
    expected = surgeon(weight, damped, pattern.kept, pattern.size)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)
    np.testing.assert_array_equal(found != 0, mask)


def test_sparsegpt_with_inputs_that_do_not_depend_on_each_other_is_wanda():
    sizes = np.random.default_rng(0).uniform(0.1, 3.0, 32)
    weight = np.random.default_rng(1).normal(size=(9, 32))
    pattern = Pattern.parse("2:4")
    found, mask = sparsegpt(weight, np.diag(sizes**2), pattern, damp=1e-9, block=8, snap=None)
    np.testing.assert_array_equal(mask, pattern.choose(abs(weight) * sizes, abs(weight)))
    np.testing.assert_allclose(found, np.where(mask, weight, 0.0), rtol=0, atol=1e-12)


def test_sparsegpt_on_a_grid_makes_up_for_rounding_too():
    weight, gram = np.random.default_rng(1).normal(size=(16, 64)), moments(64, 4000)
    grid = lambda _, part: np.rint(part * 2) / 2  # noqa: E731
    pattern = Pattern.parse("2:4")
    found, mask = sparsegpt(weight, gram, pattern, damp=0.01, block=32, snap=grid)
    np.testing.assert_array_equal(found, np.rint(found * 2) / 2)
    assert not found[~mask].any()
    later = grid(None, sparsegpt(weight, gram, pattern, damp=0.01, block=32, snap=None)[0])
    assert output_errors(weight - found, gram).sum() < 0.9 * output_errors(weight - later, gram).sum()


@pytest.mark.parametrize("damp", [1e-8, 0.01, 1.0])
def test_least_squares_is_the_minimum(damp, monkeypatch):
    """Of output error plus damping, against numpy's solver for each row, in parts of a few rows."""
    monkeypatch.setattr("onnxcomp.passes._nm_solve._ROOM", 16 * 12**2 * 3)
    random = np.random.default_rng(0)
    x, weight = random.normal(size=(300, 24)) @ random.normal(size=(24, 24)), random.normal(size=(10, 24))
    gram = x.T @ x / len(x)
    mask = Pattern.parse("2:4").choose(abs(weight), abs(weight))
    found = least_squares(weight, mask, gram, damp=damp)
    ridge = np.sqrt(damp * np.diag(gram).mean() * len(x)) * np.eye(24)
    inputs = np.concatenate([x, ridge])
    for row, kept, w in zip(found, mask, weight, strict=True):
        best = np.linalg.lstsq(inputs[:, kept], inputs @ w, rcond=None)[0]
        np.testing.assert_allclose(row[kept], best, rtol=0, atol=1e-6)
        assert not row[~kept].any()


def test_strong_damping_leaves_the_weights_alone():
    weight, gram = np.random.default_rng(1).normal(size=(4, 16)), moments(16)
    mask = Pattern.parse("2:4").choose(abs(weight), abs(weight))
    np.testing.assert_allclose(least_squares(weight, mask, gram, damp=1e9), weight * mask, rtol=0, atol=1e-6)


def test_inputs_that_are_all_zero():
    weight, pattern = np.random.default_rng(1).normal(size=(4, 8)), Pattern.parse("2:4")
    found, mask = sparsegpt(weight, np.zeros((8, 8)), pattern, damp=0.01, block=4, snap=None)
    np.testing.assert_array_equal(mask, pattern.choose(abs(weight), abs(weight)))
    np.testing.assert_array_equal(found, weight * mask)
    np.testing.assert_array_equal(least_squares(weight, mask, np.zeros((8, 8)), damp=0.01), weight * mask)


CONVS = {
    "3x3": ((2, 4, 9, 8), (4, 4, 3, 3), {"pads": [1, 1, 1, 1]}),
    "uneven": ((2, 3, 9, 8), (4, 3, 3, 2), {"pads": [0, 2, 1, 1], "strides": [2, 3], "dilations": [2, 1]}),
    "grouped": ((2, 6, 6, 6), (4, 3, 3, 3), {"group": 2, "strides": [2, 2]}),
}


@pytest.mark.parametrize("name", CONVS)
def test_squares_are_the_diagonal_of_second_moments(name, b, monkeypatch):
    """Patches are cut in parts; one sample in four is held out of the moments, so those are merged."""
    shape, weight_shape, attributes = CONVS[name]
    b.output(b.op("Conv", b.input("x", list(shape)), b.floats(*weight_shape), name="conv", **attributes))
    cut = window(next(iter(b.model().graph)), weight_shape[2:])
    x = b.rng.normal(size=shape).astype(np.float32)
    monkeypatch.setattr("onnxcomp.passes._nm_inputs._SLAB", 100)
    squares, gram = Squares(cut), Gram(cut, None, errors=False, positions=1000)
    squares.update(x)
    gram.update(x)
    gram.fit.merge(gram.held_out)
    diagonal = np.diagonal(gram.fit.about(np.zeros_like(gram.fit.mean)), axis1=1, axis2=2)
    assert squares.count == gram.fit.count
    np.testing.assert_allclose(squares.mean_square, diagonal, rtol=1e-5)


def test_squares_merge_and_do_not_depend_on_batches():
    x = np.random.default_rng(0).normal(size=(6, 5, 8)).astype(np.float32)
    whole, first, second = Squares(None), Squares(None), Squares(None)
    whole.update(x)
    for sample in x:
        first.update(sample[None])
    np.testing.assert_array_equal(whole.mean_square, first.mean_square)
    second.update(x)
    whole.merge(second)
    rows = x.reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(whole.mean_square, (rows**2).mean(axis=0)[None], rtol=1e-12)
    np.testing.assert_allclose(whole.mean, rows.mean(axis=0)[None], rtol=1e-12)
    assert whole.count == 60
