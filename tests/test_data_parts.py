"""Parts of sample data, and that it streams."""

import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from samples import X, feeds, firsts, spec

from onnxcomp.data import load_data


@pytest.mark.parametrize(
    ("samples", "eval_samples", "calibration", "evaluation"),
    [
        (None, None, range(10), range(10, 20)),
        (4, None, range(4), range(10, 20)),
        (None, 3, range(10), range(10, 13)),
        (4, 3, range(4), range(4, 7)),
        (100, 100, range(10), range(10, 20)),
    ],
)
def test_split(samples, eval_samples, calibration, evaluation):
    halves = load_data(feeds(20), X).split(samples, eval_samples)
    assert [firsts(h) for h in halves] == [list(calibration), list(evaluation)]
    assert not any(h.seen_by_calibration for h in halves)
    assert not set(halves[0].digests()) & set(halves[1].digests())


def test_split_reads_no_more_than_it_needs():
    def endless():
        while True:
            yield from feeds()

    calibration, evaluation = load_data(endless, X).split(3, 2)
    assert (len(calibration), len(evaluation)) == (3, 2)


def test_split_of_one_sample_says_so():
    calibration, evaluation = load_data(feeds(1), X).split(None)
    assert evaluation.seen_by_calibration
    assert firsts(calibration) == firsts(evaluation) == [0]


def test_take_of_a_part():
    _, evaluation = load_data(feeds(20), X).split(None)
    assert firsts(evaluation.take(3)) == [10, 11, 12]
    assert firsts(evaluation.take(3).take(5)) == [10, 11, 12]
    assert len(evaluation.take(None)) == 10


def test_digests_tell_shapes_types_and_names_apart():
    arrays = [np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int32), np.ones((2, 3))]
    every = [{name: a} for a in arrays for name in ("x", "y")]
    found = set()
    for feed in every:
        ((name, array),) = feed.items()
        found.update(load_data([feed], (spec(name, array.shape, array.dtype),)).digests())
    assert len(found) == len(every)


@st.composite
def archives(draw):
    """Arrays with a common number of samples, and how each is to be cut."""
    samples = draw(st.integers(1, 5))
    arrays, specs = {}, []
    for name in draw(st.lists(st.sampled_from("abc"), min_size=1, unique=True)):
        dtype = draw(st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_]))
        rest = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
        kind = draw(st.sampled_from(["open", "batch", "before"]))
        batch = draw(st.integers(1, 3)) if kind == "batch" else 1
        shape = (samples * batch, *rest)
        finite = {"allow_nan": False, "allow_infinity": False} if issubclass(dtype, np.floating) else None
        array = draw(hnp.arrays(dtype, shape, elements=finite))
        arrays[name] = np.asfortranarray(array) if draw(st.booleans()) else array
        specs.append(spec(name, {"open": ("n", *rest), "batch": (batch, *rest), "before": rest}[kind], dtype))
    return samples, arrays, tuple(specs), draw(st.booleans())


@settings(max_examples=150, deadline=None)
@given(archives())
def test_streaming_equals_loading(case):
    samples, arrays, specs, compressed = case
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "d.npz")
        (np.savez_compressed if compressed else np.savez)(path, **arrays)
        found = list(load_data(path, specs))
    assert len(found) == samples
    for s in specs:
        parts = [f[s.name] for f in found]
        assert all(p.dtype == s.dtype for p in parts)
        joined = np.stack(parts) if len(s.shape) < arrays[s.name].ndim else np.concatenate(parts)
        np.testing.assert_array_equal(joined, arrays[s.name])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_one_feed_is_in_memory_at_a_time(tmp_path, save):
    save(tmp_path / "d.npz", x=np.zeros((200, 100_000), np.float32))  # 80 MB
    data = load_data(tmp_path / "d.npz", (spec(shape=("n", 100_000)),))
    tracemalloc.start()
    try:
        assert sum(1 for _ in data) == 200
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6
