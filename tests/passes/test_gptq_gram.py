"""Rows and patches against what onnxruntime computes from them, and their second moments against numpy."""

from __future__ import annotations

import numpy as np
import pytest
from builder import Builder

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._gram import Gram, position_count, rows_of, window
from onnxcomp.quant import activation_grid
from onnxcomp.targets.ort import reference_runner

# Input, weight, attributes.
CONVS = {
    "1x1": ((2, 6, 5, 7), (4, 6, 1, 1), {}),
    "1x1, stride 2": ((2, 6, 5, 7), (4, 6, 1, 1), {"strides": [2, 2]}),
    "3x3": ((2, 3, 9, 8), (4, 3, 3, 3), {"pads": [1, 1, 1, 1]}),
    "uneven": ((2, 3, 9, 8), (4, 3, 3, 2), {"pads": [0, 2, 1, 1], "strides": [2, 3], "dilations": [2, 1]}),
    "grouped": ((2, 6, 6, 6), (4, 3, 3, 3), {"group": 2, "strides": [2, 2]}),
    "depthwise": ((2, 5, 8, 8), (5, 1, 3, 3), {"group": 5, "pads": [1, 1, 1, 1]}),
    "depthwise, two each": ((2, 5, 8, 8), (10, 1, 3, 3), {"group": 5}),
    "same upper": ((2, 3, 7, 8), (4, 3, 2, 4), {"auto_pad": "SAME_UPPER", "strides": [2, 3]}),
    "same lower": ((2, 3, 7, 8), (4, 3, 4, 2), {"auto_pad": "SAME_LOWER"}),
    "valid": ((2, 3, 7, 8), (4, 3, 2, 3), {"auto_pad": "VALID"}),
    "sound": ((2, 4, 19), (6, 2, 5), {"group": 2, "strides": [3], "pads": [2, 1]}),
    "volume": ((1, 2, 5, 4, 6), (3, 2, 2, 3, 2), {"strides": [2, 1, 2], "pads": [1, 0, 0, 0, 1, 1]}),
}


@pytest.mark.parametrize("name", CONVS)
def test_patches_times_the_weight_are_the_convolution(name):
    shape, weight_shape, attributes = CONVS[name]
    b = Builder()
    weight = b.rng.normal(size=weight_shape).astype(np.float32)
    y = b.op("Conv", b.input("x", list(shape)), b.const(weight), name="conv", **attributes)
    model = b.output(y).model()
    x = b.rng.normal(size=shape).astype(np.float32)
    expected = reference_runner(model, [y])({"x": x})[y]

    cut = window(next(iter(model.graph)), weight_shape[2:])
    count = position_count(x, cut)
    assert count == expected[0, 0].size
    matrix = weight.reshape(cut.groups, len(weight) // cut.groups, -1)

    def convolved(rows):
        return np.einsum("spgk,gnk->sgnp", rows, matrix).reshape(len(x), len(weight), -1)

    whole = convolved(rows_of(x, cut, [None] * len(x)))
    np.testing.assert_allclose(whole, expected.reshape(whole.shape), rtol=0, atol=2e-6 * np.abs(whole).max())
    chosen = [np.random.default_rng(i).choice(count, 3, replace=False) for i in range(len(x))]
    some = convolved(rows_of(x, cut, chosen))
    for one, all_of_it, numbers in zip(some, whole, chosen, strict=True):
        np.testing.assert_allclose(one, all_of_it[:, numbers], rtol=0, atol=2e-6 * np.abs(whole).max())


def test_rows_of_a_matrix_product():
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(rows_of(x, None, [None, None])[:, :, 0], x.reshape(2, 15, 4))
    some = rows_of(x, None, [np.array([14]), np.array([0])])
    np.testing.assert_array_equal(some[:, 0, 0], [x[0, 2, 4], x[1, 0, 0]])


def samples(count: int = 9) -> np.ndarray:
    return np.random.default_rng(1).normal(2.0, 1.0, (count, 6, 5)).astype(np.float32)


def test_moments_and_what_is_held_out():
    x = samples()
    gram = Gram(None, None, errors=False, positions=100)
    gram.update(x)
    held = x[1::4].reshape(-1, 5).astype(np.float64)
    fitted = np.delete(x, np.s_[1::4], axis=0).reshape(-1, 5).astype(np.float64)
    for moments, rows in ((gram.fit, fitted), (gram.held_out, held)):
        assert moments.count == len(rows)
        np.testing.assert_allclose(moments.mean[0], rows.mean(axis=0), rtol=1e-6)
        center = np.arange(5.0)
        expected = (rows - center).T @ (rows - center) / len(rows)
        np.testing.assert_allclose(moments.about(center[None])[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("positions", [2, 100])
def test_how_the_data_is_cut_does_not_matter(positions):
    x = samples()
    whole, parts = (Gram(None, None, errors=False, positions=positions, seed=3) for _ in range(2))
    whole.update(x)
    for part in np.split(x, [1, 2, 6]):
        parts.update(part)
    assert whole.fit.count == parts.fit.count == 7 * min(positions, 6)
    for a, b in ((whole.fit, parts.fit), (whole.held_out, parts.held_out)):
        np.testing.assert_allclose(a.about(a.mean), b.about(b.mean), rtol=1e-5, atol=1e-5)


def test_large_batches_are_worked_on_in_parts(monkeypatch):
    x = samples()
    whole, parts = (Gram(None, None, errors=False, positions=100) for _ in range(2))
    whole.update(x)
    monkeypatch.setattr("onnxcomp.passes._gram._SLAB", 70)
    parts.update(x)
    np.testing.assert_allclose(whole.fit.about(whole.fit.mean), parts.fit.about(parts.fit.mean), rtol=1e-5, atol=1e-5)


def test_merged_is_what_one_would_have_seen():
    x = samples(8)
    whole, first, second = (Gram(None, None, errors=False, positions=100) for _ in range(3))
    whole.update(x)
    first.update(x[:4])
    second.update(x[4:])
    first.merge(second)
    assert first.seen == 8
    np.testing.assert_allclose(first.fit.about(first.fit.mean), whole.fit.about(whole.fit.mean), rtol=1e-5, atol=1e-5)
    with pytest.raises(CalibrationError, match="different"):
        first.merge(Gram(None, None, errors=True, positions=100))


@pytest.mark.parametrize("shape", [(5,), (12, 5), (4, 3, 5)])
def test_inputs_of_any_rank(shape):
    gram = Gram(None, None, errors=False, positions=100)
    gram.update(np.ones(shape, np.float32))
    assert gram.fit.count + gram.held_out.count == np.prod(shape[:-1], dtype=int)


def test_errors_of_the_quantizer_stand_beside_its_output():
    x = samples()
    grid = activation_grid(-0.5, 3.0, 4)
    gram = Gram(None, grid, errors=True, positions=100)
    gram.update(x)
    fitted = np.delete(x, np.s_[1::4], axis=0).reshape(-1, 5)
    rounded = grid.round_trip(fitted)
    expected = np.concatenate([rounded, fitted - rounded], axis=1).astype(np.float64)
    np.testing.assert_allclose(gram.fit.about(gram.fit.mean)[0], np.cov(expected.T, bias=True), rtol=1e-4, atol=1e-5)


def test_what_a_dropped_activation_cut_off_is_no_error():
    """A grid that begins at zero stands for the ReLU6 before it."""
    gram = Gram(None, activation_grid(0.0, 6.0, 8), errors=True, positions=100)
    gram.update(np.array([[-3.0, 3.0, 9.0]] * 2, np.float32))
    assert np.abs(gram.fit.mean[0, 3:]).max() < 6 / 255


def test_not_finite():
    with pytest.raises(CalibrationError, match="NaN or inf"):
        Gram(None, None, errors=False, positions=1).update(np.full((2, 2), np.nan))
