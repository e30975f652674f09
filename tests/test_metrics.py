"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from onnxcomp.metrics import EXACT_DB, cosine, kl_divergence, power_sums, sqnr, sqnr_of_sums, top1_agreement


def test_sqnr_of_a_known_error() -> None:
    reference = np.array([3.0, 4.0], np.float32)  # power 25
    assert sqnr(reference, np.array([3.0, 4.5], np.float32)) == pytest.approx(20.0, rel=1e-9)  # noise 0.25
    assert sqnr(reference, -reference) == pytest.approx(10 * math.log10(25 / 100), rel=1e-9)


def test_sqnr_at_the_ends_of_the_scale() -> None:
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    assert sqnr(ones, ones) == EXACT_DB
    assert sqnr(zeros, zeros) == EXACT_DB
    assert sqnr(zeros, ones) == -EXACT_DB
    assert sqnr(ones, ones * np.nan) == -EXACT_DB
    assert sqnr_of_sums(1.0, 1e-30) == EXACT_DB


def test_power_sums_add_up_over_batches() -> None:
    rng = np.random.default_rng(0)
    r, o = rng.standard_normal((2, 10, 3)).astype(np.float32)
    parts = np.array([power_sums(r[i : i + 4], o[i : i + 4]) for i in (0, 4, 8)])
    np.testing.assert_allclose(parts.sum(axis=0), power_sums(r, o), rtol=1e-12)


def test_power_sums_of_integers_do_not_wrap() -> None:
    assert power_sums(np.array([200], np.uint8), np.array([201], np.uint8)) == (40000.0, 1.0)


def test_cosine() -> None:
    x = np.array([1.0, 0.0])
    assert cosine(x, np.array([1.0, 1.0])) == pytest.approx(1 / math.sqrt(2), rel=1e-12)
    assert cosine(x, -x) == -1.0
    assert cosine(x * 0, x * 0) == 1.0
    assert cosine(x, x * 0) == 0.0


def test_top1_counts_positions() -> None:
    reference = np.array([[[1, 2, 3], [3, 2, 1]], [[0, 1, 0], [1, 0, 0]]])
    other = np.array([[[0, 0, 9], [0, 0, 9]], [[0, 1, 0], [0, 1, 0]]])
    assert top1_agreement(reference, other) == 0.5


def test_kl_of_known_distributions() -> None:
    p, q = np.array([[0.5, 0.5]]), np.array([[0.25, 0.75]])
    known = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(p, q) == pytest.approx(known, rel=1e-9)
    # The same as logits, with a shift that softmax removes.
    assert kl_divergence(np.log(p) + 3.0, np.log(q) - 5.0) == pytest.approx(known, rel=1e-9)
    assert kl_divergence(np.array([[2.0, 1.0]]), np.array([[2.0, 1.0]])) == pytest.approx(0.0, abs=1e-15)


def test_kl_of_huge_logits_is_finite() -> None:
    assert kl_divergence(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]])) == pytest.approx(1e4, rel=1e-9)
