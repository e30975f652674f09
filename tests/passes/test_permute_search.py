"""The search by itself: known best orders, adversarial scores, and the sums that it works with."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.passes._permutation_indices import common_indices
from onnxcomp.passes._permutation_labels import Labels, join, occurrences, sources
from onnxcomp.passes._permutation_search import Searcher, deal

SEARCHES = ["deal", "swaps", "assignment"]


def searcher(search: str, pattern: str = "2:4", rounds: int = 20) -> Searcher:
    if search == "assignment":
        pytest.importorskip("scipy", reason="needs scipy")
    return Searcher(pattern=Pattern.parse(pattern), search=search, rounds=rounds, seed=0)


def kept(scores: np.ndarray, order: np.ndarray, pattern: str) -> float:
    """As `nm_mask` would keep them."""
    chosen = Pattern.parse(pattern)
    rows = scores[order].T.astype(np.float64)
    return float(rows[chosen.choose(rows, rows)].sum())


SCORES = {
    "normal": lambda rng: np.abs(rng.normal(size=(32, 50))),
    "heavy tails": lambda rng: np.abs(rng.standard_t(1, size=(32, 50))),
    "channels of different size": lambda rng: np.abs(rng.normal(size=(32, 50))) * np.exp(rng.normal(size=(32, 1)) * 2),
    "best as it is": lambda rng: np.tile([5.0, 4.0, 1.0, 0.5], 8)[:, None] * np.ones((1, 50)),
    "all alike": lambda rng: np.ones((32, 50)),
    "zeros": lambda rng: np.zeros((32, 50)),
    "one channel": lambda rng: np.eye(32)[:, :1] * np.ones((1, 50)),
    "one row": lambda rng: np.abs(rng.normal(size=(32, 1))),
}


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "1:2", "4:8", "1:8"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("case", SCORES)
def test_never_keeps_less(case, search, pattern):
    scores = SCORES[case](np.random.default_rng(0)).astype(np.float32)
    order = searcher(search, pattern).order(scores)
    assert sorted(order) == list(range(len(scores)))
    before = kept(scores, np.arange(len(scores)), pattern)
    assert kept(scores, order, pattern) >= before * (1 - 1e-6)
    if case in ("best as it is", "all alike", "zeros") and pattern == "2:4":
        np.testing.assert_array_equal(order, np.arange(len(scores)))


@pytest.mark.parametrize("search", SEARCHES)
def test_known_best_order_is_found(search):
    """Half of the channels matter, all in the same groups; the best order has two of them in each group."""
    rng = np.random.default_rng(1)
    large = np.repeat(np.arange(16) % 2 == 0, 4)
    scores = np.where(large[:, None], rng.uniform(5, 6, (64, 30)), rng.uniform(0, 1, (64, 30))).astype(np.float32)
    order = searcher(search).order(scores)
    assert (large[order].reshape(-1, 4).sum(axis=1) == 2).all()
    assert kept(scores, order, "2:4") == pytest.approx(scores[large].sum(), rel=1e-6)


@pytest.mark.parametrize("search", ["swaps", "assignment"])
def test_order_that_totals_do_not_tell(search):
    """Four kinds of channel, each large in rows of its own, so that all totals are the same: one of each fits best."""
    kind = np.repeat(np.arange(4), 8)
    scores = np.where(np.arange(40) % 4 == kind[:, None], 1.0, 0.001).astype(np.float32)
    order = searcher(search, "1:4").order(scores)
    assert (np.sort(kind[order].reshape(-1, 4), axis=1) == np.arange(4)).all()


def test_two_groups_come_near_to_trying_all():
    """Exchanges of pairs end in a local optimum now and then."""
    rng = np.random.default_rng(2)
    gaps = []
    for _ in range(10):
        scores = np.abs(rng.standard_t(2, size=(8, 6))).astype(np.float32)
        splits = [[*c, *(set(range(8)) - set(c))] for c in combinations(range(8), 4)]
        best = max(kept(scores, np.array(s), "2:4") for s in splits)
        start = kept(scores, np.arange(8), "2:4")
        gaps.append((kept(scores, searcher("swaps").order(scores), "2:4") - start) / max(best - start, 1e-9))
    assert np.mean(gaps) > 0.7


def test_more_search_keeps_more():
    scores = (np.abs(np.random.default_rng(3).normal(size=(128, 64)))).astype(np.float32)
    found = [kept(scores, searcher(s).order(scores), "2:4") for s in SEARCHES]
    assert kept(scores, np.arange(128), "2:4") < found[1]
    assert found[0] < min(found[1:])
    assert found[1] > found[2] * 0.995


def test_deal_gives_every_group_one_of_each_rank():
    scores = np.random.default_rng(0).permutation(16)[:, None].astype(np.float32)
    groups = deal(scores, 4)
    ranks = np.sort(15 - scores[groups][..., 0], axis=1)
    np.testing.assert_array_equal(ranks // 4, np.tile(np.arange(4), (4, 1)))


def test_labels_unify_and_fix():
    labels = Labels(6)
    labels.unify(np.array([5, 1, -1, 3]), np.array([3, 2, 0, 4]))
    np.testing.assert_array_equal(labels.find(np.arange(6)), [0, 1, 1, 3, 3, 3])
    labels.fix(np.array([4, -1]), "why")
    assert labels.fixed().tolist() == [False, False, False, True, True, True]
    assert labels.reasons == ["why"]


def test_labels_of_a_value_join():
    labels, strands = Labels(4), []
    assert join(labels, strands, np.array([[0, 1, -1, -1]]))
    assert not join(labels, strands, np.array([[0, 1, -1, -1]]))
    assert join(labels, strands, np.array([[2], [3]]))
    assert len(strands) == 2
    assert join(labels, strands, np.array([[-1, -1, 2, 3]]))
    assert [s.tolist() for s in strands if s.shape == (1, 4)] == [[[0, 1, 2, 3]]]
    assert not join(labels, strands, np.full((1, 4), -1))


def test_copies_move_within_their_own():
    codes = np.array([0, 1, 2, -1, 0, 1, 2])
    order = np.array([1, 2, 0])
    np.testing.assert_array_equal(sources(codes, order), [1, 2, 0, 3, 5, 6, 4])
    assert occurrences(codes, np.array([0, 0, 0, 9, 1, 1, 2]), 4).tolist() == [1, 1, 2, 0]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((2, 3, 8), (2, 24)),
        ((2, "t", 48), ("n", 2, "t", 2, 24)),
        ((1, 3, None, 64), (1, 9, None, 64)),
        ((4, 6), (8, 3)),
        ((1, 16, 1, 1), (1, 16)),
        ((2, 5), (2, 5)),
        ((24,), (2, 3, 4)),
    ],
)
def test_indices_in_common(old, new):
    before, after, sizes, apart = common_indices(old, new)
    assert len(before) == len(old)
    assert len(after) == len(new)
    flat = [[s for axis in side for s in axis if s not in apart] for side in (before, after)]
    assert flat[0] == flat[1]
    for shape, axes in ((old, before), (new, after)):
        for size, axis in zip(shape, axes, strict=True):
            if isinstance(size, int) and not apart & set(axis) and all(s in sizes for s in axis):
                assert np.prod([sizes[s] for s in axis]) == size


def test_shapes_that_have_no_index_in_common_are_told_apart():
    _, _, _, apart = common_indices((4, 6), (3, 8))
    assert apart
