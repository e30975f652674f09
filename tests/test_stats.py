"""Observers: the outcome depends on the data, and not on how it was cut into batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxcomp.errors import CalibrationError
from onnxcomp.histogram import Histogram
from onnxcomp.stats import ChannelMean, Group, RowSample, channel_rows

# Zeros, denormals, one lonely outlier and plain values: what makes the bins of a histogram grow, each in its way.
values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 1e-40, 0.1]),
    st.floats(-1e4, 1e4, width=32),
)
batches = st.lists(hnp.arrays(np.float32, st.integers(0, 40), elements=values), min_size=1, max_size=6)


def shown(kind, arrays):
    observer = kind()
    for array in arrays:
        observer.update(array)
    return observer


def state(histogram):
    """Everything that a histogram says."""
    used = np.flatnonzero(histogram.counts)
    return (
        histogram.width,
        histogram.centers[used].tolist(),
        histogram.counts[used].tolist(),
        (histogram.min, histogram.max, histogram.count, histogram.zeros),
    )


# --- histogram


@settings(max_examples=150, deadline=None)
@given(batches, st.randoms(use_true_random=False))
@example([np.float32([1.0]), np.float32([1e30]), np.float32([-1e-40])], None)
def test_histogram_does_not_depend_on_the_order_of_batches(arrays, random):
    whole = shown(lambda: Histogram(64), [np.concatenate(arrays)])
    shuffled = list(arrays)
    if random is not None:
        random.shuffle(shuffled)
    assert state(shown(lambda: Histogram(64), shuffled)) == state(whole)
    assert state(shown(lambda: Histogram(64), reversed(arrays))) == state(whole)


@settings(max_examples=150, deadline=None)
@given(batches, st.integers(0, 6))
def test_merged_histograms_are_what_one_would_have_seen(arrays, cut):
    whole = shown(lambda: Histogram(64), arrays)
    left, right = shown(lambda: Histogram(64), arrays[:cut]), shown(lambda: Histogram(64), arrays[cut:])
    left.merge(right)
    assert state(left) == state(whole)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.integers(1, 200), elements=values))
def test_histogram_counts_every_value_in_its_bin(array):
    histogram = shown(lambda: Histogram(64), [array])
    nonzero = array[array != 0].astype(np.float64)
    assert histogram.count == array.size
    assert histogram.zeros == array.size - nonzero.size
    assert histogram.counts.sum() == nonzero.size
    assert len(histogram.counts) <= 64
    if nonzero.size:
        lower = histogram.centers - histogram.width / 2
        expected = [((nonzero >= low) & (nonzero < low + histogram.width)).sum() for low in lower]
        assert histogram.counts.tolist() == expected


@pytest.mark.parametrize("bins", [64, 8192])
def test_quantile_to_within_a_bin(bins):
    x = np.random.default_rng(0).normal(2.0, 3.0, 20_001).astype(np.float32)
    histogram = Histogram(bins)
    histogram.update(x)
    for q in (0.0, 0.001, 0.25, 0.5, 0.9, 0.9999, 1.0):
        expected = np.quantile(x, q, method="inverted_cdf")
        assert histogram.quantile(q) == pytest.approx(expected, rel=0, abs=1.01 * histogram.width)


def test_quantile_counts_exact_zeros_where_they_stand():
    x = np.concatenate([np.full(30, -1.0), np.zeros(40), np.full(30, 2.0)]).astype(np.float32)
    histogram = Histogram()
    histogram.update(x)
    assert [histogram.quantile(q) for q in (0.31, 0.5, 0.69)] == [0.0, 0.0, 0.0]
    assert histogram.quantile(0.29) == pytest.approx(-1.0, rel=0, abs=histogram.width)
    assert histogram.quantile(0.71) == pytest.approx(2.0, rel=0, abs=histogram.width)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3), -1), ((2, 3, 4, 4), 1), ((3,), 0)])
def test_weights_count_values_of_a_channel_as_often(shape, axis):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights = np.array([0.0, 1.0, 3.0])
    weighted, plain = Histogram(256, weights=weights, axis=axis), Histogram(256)
    weighted.update(x)
    plain.update(x)  # for the same range
    for channel, times in enumerate((-1, 0, 2)):
        rows = channel_rows(x, axis)[:, channel]
        for sign in range(abs(times)):
            del sign
            plain.update(rows)
    # Channel 0 counted twice in `plain` and not at all in `weighted`.
    first = Histogram(256)
    first.update(x)  # the range
    alone = channel_rows(x, axis)[:, 0]
    expected = plain.count - 2 * alone.size
    assert weighted.count == pytest.approx(expected, rel=1e-12)
    assert weighted.counts.sum() == pytest.approx(weighted.count, rel=1e-12)
    lower = weighted.centers - weighted.width / 2
    rows = channel_rows(x, axis)
    manual = [(((rows >= low) & (rows < low + weighted.width)) * weights).sum() for low in lower]
    np.testing.assert_allclose(weighted.counts, manual, rtol=1e-12, atol=0)


def test_weighted_histograms_merge_only_with_their_like():
    one, two = Histogram(weights=np.array([1.0, 2.0])), Histogram(weights=np.array([1.0, 3.0]))
    for other in (two, Histogram(), Histogram(64)):
        with pytest.raises(CalibrationError, match="cannot merge"):
            one.merge(other)


def test_histogram_of_nothing_but_zeros():
    histogram = Histogram()
    histogram.update(np.zeros((4, 4), np.float32))
    assert (histogram.count, histogram.zeros, histogram.min, histogram.max) == (16, 16, 0.0, 0.0)
    assert histogram.quantile(0.5) == 0.0


def test_histogram_needs_data_and_bins():
    with pytest.raises(CalibrationError, match="has seen no data"):
        Histogram().quantile(0.5)
    with pytest.raises(CalibrationError, match="at least 16 bins"):
        Histogram(8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [Histogram, lambda: ChannelMean(1), RowSample])
def test_values_that_are_not_finite_are_refused(kind, bad):
    with pytest.raises(CalibrationError, match="1 of 3 values are NaN or infinite"):
        kind().update(np.array([[0.0, bad, 1.0]], np.float32))


def test_size_does_not_grow_with_the_data():
    histogram, sample = Histogram(64), RowSample(8)
    for seed in range(50):
        x = np.random.default_rng(seed).normal(scale=10.0 ** (seed % 7), size=(100, 4))
        histogram.update(x)
        sample.update(x)
    assert len(histogram.counts) <= 64
    assert sample.sample.shape == (8, 4)
    assert sample.seen == 5000


# --- large tensors


def test_of_a_large_tensor_some_values_are_counted_and_the_ends_are_exact():
    x = np.random.default_rng(0).normal(size=(3, 8, 50, 40)).astype(np.float32)
    x[1, 5, 17, 3], x[2, 7, 49, 39] = -40.0, 50.0
    thin, full = Histogram(limit=1000), Histogram(limit=1 << 30)
    thin.update(x)
    full.update(x)
    assert (thin.min, thin.max) == (-40.0, 50.0)
    assert full.count == x.size
    np.testing.assert_allclose(thin.count, x.size, rtol=1e-9, atol=0)
    assert abs(thin.quantile(0.9) - full.quantile(0.9)) < 0.1  # 2,700 values of a normal distribution: 0.035 a sigma


def test_outliers_are_all_counted():
    """Also if they stand where thinning never looks: in the same place of every sample."""
    x = np.random.default_rng(0).normal(size=(10, 64, 100)).astype(np.float32)
    x[:, 13, 37], x[:, 14, 1], x[:, 14, 2] = 70.0, -60.0, 80.0
    thin = Histogram(limit=500)
    thin.update(x)
    far = np.abs(thin.centers) > 50
    assert thin.counts[far].sum() == 30


def test_values_that_are_often_far_are_no_outliers():
    x = np.random.default_rng(0).uniform(0.0, 6.0, (4, 10, 500)).astype(np.float32)
    thin = Histogram(limit=500)
    thin.update(x)
    assert thin.count == pytest.approx(x.size)
    assert np.count_nonzero(thin.counts) <= 4 * 500
    assert thin.quantile(0.5) == pytest.approx(3.0, abs=0.25)


@pytest.mark.parametrize("shape", [(6, 16, 8, 8), (6, 30, 30), (6, 1000)])
@pytest.mark.parametrize("weighted", [False, True])
def test_which_values_are_counted_does_not_depend_on_the_batch(shape, weighted):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weights = np.arange(1.0, shape[1] + 1) if weighted else None
    whole, parts = (Histogram(weights=weights, axis=1, limit=100) for _ in range(2))
    whole.update(x)
    for sample in x:
        parts.update(sample[None])
    np.testing.assert_allclose(whole.count, parts.count, rtol=1e-12, atol=0)
    np.testing.assert_array_equal(whole.centers, parts.centers)
    np.testing.assert_allclose(whole.counts, parts.counts, rtol=1e-12, atol=0)


@pytest.mark.parametrize("axis", [1, -1])
def test_every_channel_is_counted_with_its_own_weight(axis):
    channels, weights = 8, 5.0 ** np.arange(8)
    x = np.broadcast_to(np.arange(1.0, channels + 1).reshape((1, -1, 1, 1) if axis == 1 else (-1,)), (1, 8, 64, 8))
    thin = Histogram(weights=weights, axis=axis, limit=500)
    thin.update(x.astype(np.float32))
    shares = {round(float(c)): n for c, n in zip(thin.centers - thin.width / 2, thin.counts, strict=True) if n}
    assert sorted(shares) == list(range(1, channels + 1))
    counts = np.array([shares[i + 1] / weights[i] for i in range(channels)])
    assert counts.min() > 0.9 * counts.mean()


def test_a_group_shows_each_part_everything():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    left, right = (Group(Histogram(), ChannelMean(1)) for _ in range(2))
    left.update(x[:1])
    right.update(x[1:])
    left.merge(right)
    histogram, mean = left.parts
    assert isinstance(histogram, Histogram)
    assert isinstance(mean, ChannelMean)
    assert histogram.count == x.size
    np.testing.assert_allclose(mean.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-12, atol=0)
    with pytest.raises(CalibrationError, match="different observers"):
        left.merge(Group(ChannelMean(1)))


# --- mean of channels


@pytest.mark.parametrize(("axis", "others"), [(1, (0, 2, 3)), (-1, (0, 1, 2)), (0, (1, 2, 3))])
def test_mean_of_channels(axis, others):
    x = np.random.default_rng(0).normal(3.0, 2.0, (12, 5, 7, 4)).astype(np.float32)
    whole, left, right = (ChannelMean(axis) for _ in range(3))
    whole.update(x)
    np.testing.assert_allclose(whole.mean, x.mean(axis=others, dtype=np.float64), rtol=1e-6, atol=0)
    assert whole.count == x.size // len(whole.mean)
    cut = [slice(None)] * 4
    cut[1 if axis == 0 else 0] = slice(0, 3)
    left.update(x[tuple(cut)])
    cut[1 if axis == 0 else 0] = slice(3, None)
    right.update(x[tuple(cut)])
    left.merge(right)
    assert left.count == whole.count
    np.testing.assert_allclose(left.mean, whole.mean, rtol=1e-12, atol=0)


def test_mean_of_many_values_is_exact_enough():
    x = np.random.default_rng(0).normal(100.0, 1.0, (2, 3, 400, 400)).astype(np.float32)
    for axis, array in ((1, x), (-1, np.moveaxis(x, 1, -1))):
        mean = ChannelMean(axis)
        mean.update(np.ascontiguousarray(array))
        np.testing.assert_allclose(mean.mean, x.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-7, atol=0)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("shape", [(24, 6), (24, 6, 50), (24, 6, 9, 9)])
@pytest.mark.parametrize("kind", [ChannelMean, lambda axis: Histogram(weights=np.linspace(0.1, 7.3, 6), axis=axis)])
def test_not_one_bit_depends_on_how_samples_come_in_batches(kind, shape, axis):
    x = np.random.default_rng(0).normal(3.0, 2.0, shape).astype(np.float32)
    x = x if axis == 1 else np.ascontiguousarray(np.moveaxis(x, 1, -1))
    found = []
    for size in (1, 3, 24):
        observer = kind(axis)
        for start in range(0, 24, size):
            observer.update(x[start : start + size])
        found.append(observer.counts if isinstance(observer, Histogram) else observer.mean)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_means_over_different_axes_do_not_merge():
    with pytest.raises(CalibrationError, match="different axes"):
        ChannelMean(0).merge(ChannelMean(1))


# --- row sample


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=5).map(sorted))
def test_row_sample_does_not_depend_on_the_batches(cuts):
    x = np.arange(600, dtype=np.float32).reshape(300, 2)
    whole, parts = RowSample(20, seed=3), RowSample(20, seed=3)
    whole.update(x)
    for start, stop in pairwise([0, *cuts, 300]):
        parts.update(x[start:stop])
    np.testing.assert_array_equal(parts.sample, whole.sample)
    assert parts.seen == whole.seen == 300


def test_row_sample_keeps_everything_while_there_is_room():
    x = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    sample = RowSample(100, axis=1)
    sample.update(x)
    rows = np.moveaxis(x, 1, -1).reshape(-1, 3)
    assert sorted(map(tuple, sample.sample.tolist())) == sorted(map(tuple, rows.tolist()))


def test_row_sample_is_uniform():
    chosen = np.zeros(200)
    for seed in range(400):
        sample = RowSample(20, seed=seed)
        for part in np.split(np.arange(200, dtype=np.float32)[:, None], 10):
            sample.update(part)
        index = sample.sample[:, 0].astype(int)
        assert len(set(index.tolist())) == 20
        chosen[index] += 1
    # Each row is chosen 40 times in the mean, with a standard deviation of 6; groups by place in the stream likewise.
    assert chosen.sum() == 400 * 20
    expected = 40.0
    chi2 = ((chosen - expected) ** 2 / (expected * 0.9)).sum()
    assert 140 < chi2 < 270  # 199 degrees of freedom: five standard deviations are 100
    np.testing.assert_allclose(chosen.reshape(10, 20).mean(axis=1), expected, rtol=0.15, atol=0)


def test_row_sample_merges_two_streams_in_proportion():
    share = []
    for seed in range(100):
        left, right = RowSample(30, seed=seed), RowSample(30, seed=1000 + seed)
        left.update(np.zeros((100, 1), np.float32))
        right.update(np.ones((300, 1), np.float32))
        left.merge(right)
        assert left.seen == 400
        assert left.sample.shape == (30, 1)
        share.append(left.sample.mean())
    assert np.mean(share) == pytest.approx(0.75, rel=0, abs=0.03)


def test_row_samples_of_different_settings_do_not_merge():
    with pytest.raises(CalibrationError, match="different settings"):
        RowSample(3).merge(RowSample(4))
    with pytest.raises(CalibrationError, match="has seen no data"):
        _ = RowSample().sample
