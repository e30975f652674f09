"""Sweeps give the same whatever the number of threads and the batches of the data."""

from __future__ import annotations

import threading
import time

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.calibrate import Rows, by_row, collect
from onnxcomp.errors import CalibrationError
from onnxcomp.histogram import Histogram
from onnxcomp.passes.gptq import Gptq
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Pipeline
from onnxcomp.stats import ChannelMean, Group, Observer, RowSample
from onnxcomp.targets.ort import OrtCpu, reference_runner

SAMPLES = np.random.default_rng(3).normal(size=(24, 3, 20, 20)).astype(np.float32)


def cnn(batch: object = "N") -> ir.Model:
    b = Builder()
    y = b.op("Conv", b.input("x", [batch, 3, 20, 20]), b.floats(8, 3, 3, 3), b.floats(8), name="stem")
    y = b.op("Relu", y)
    y = b.op("Flatten", b.op("GlobalAveragePool", b.op("Conv", y, b.floats(6, 8, 1, 1), b.floats(6), name="last")))
    return b.output(b.op("Gemm", y, b.floats(5, 6), b.floats(5), name="head", transB=1)).model()


def batches(size: int) -> list[dict[str, np.ndarray]]:
    return [{"x": SAMPLES[i : i + size]} for i in range(0, len(SAMPLES), size)]


def rewritten(size: int, runner=reference_runner) -> bytes:
    model = cnn()
    pipeline = Pipeline(passes=[Quantize(), Gptq()], capabilities=OrtCpu().capabilities(), runner=runner)
    pipeline.run(model, batches(size))
    return ir.to_proto(model).SerializeToString(deterministic=True)


def test_same_file_whatever_the_batches(monkeypatch):
    expected = rewritten(1)
    assert rewritten(4) == expected
    assert rewritten(7) == expected  # the last one is smaller
    monkeypatch.setattr("onnxcomp.calibrate._workers", lambda: 1)
    assert rewritten(8) == expected
    monkeypatch.setattr("onnxcomp.calibrate._workers", lambda: 3)
    assert rewritten(1) == expected


def test_same_file_whatever_the_threads_of_a_run():
    one, two = (rewritten(8, lambda m, o, n=n: reference_runner(m, o, threads=n)) for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_observers_see_feeds_in_order(workers):
    def observers() -> dict[str, Group]:
        parts = lambda: (Histogram(), ChannelMean(1), RowSample(16, axis=1))  # noqa: E731
        return {"x": Group(*parts()), "stem_out": Group(*parts()), "head_out": Group(*parts())}

    expected, found = observers(), observers()
    run = reference_runner(cnn(), ["stem_out", "head_out"])
    for feed in batches(1):
        for name, value in {**feed, **run(feed)}.items():
            expected[name].update(value)
    assert collect(cnn(), found, batches(1), reference_runner, workers=workers) == 24
    for name, group in expected.items():
        (a, mean_a, rows_a), (b, mean_b, rows_b) = group.parts, found[name].parts
        np.testing.assert_array_equal(a.counts, b.counts)
        np.testing.assert_array_equal(mean_a.mean, mean_b.mean)
        np.testing.assert_array_equal(rows_a.sample, rows_b.sample)


class Watched(Observer):
    """Counts feeds whose values exist."""

    def __init__(self) -> None:
        self.alive = self.most = 0
        self.lock = threading.Lock()

    def begin(self) -> None:
        with self.lock:
            self.alive += 1
            self.most = max(self.most, self.alive)

    def update(self, x):
        with self.lock:
            self.alive -= 1

    def merge(self, other):
        raise NotImplementedError


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_feeds_at_once_than_workers(workers):
    watched = Watched()

    def runner(model, outputs):
        def run(feed):
            watched.begin()
            return dict.fromkeys(outputs, feed["x"])

        return run

    collect(cnn(), {"stem_out": watched}, batches(1), runner, workers=workers)
    assert 1 <= watched.most <= workers


def test_state_is_carried_in_order():
    """Feeds do not give the state, so runs must not overlap."""
    running = threading.Lock()

    def runner(model, outputs):
        def run(feed):
            assert running.acquire(blocking=False), "two runs at once"
            time.sleep(0.001)
            running.release()
            return dict.fromkeys(outputs, feed["x"])

        return run

    b = Builder()
    total = b.op("Add", b.input("x", [1, 3, 20, 20]), b.input("state", [1, 3, 20, 20]), name="total")
    model = b.output(total).model()
    assert collect(model, {"total_out": ChannelMean(1)}, batches(1), runner, workers=4) == 24


def test_the_first_bad_feed_is_named_and_the_sweep_ends():
    feeds = batches(1)
    feeds[5] = {"x": np.full((1, 3, 20, 20), np.nan, np.float32)}
    with pytest.raises(CalibrationError, match="value 'stem_out', feed 5"):
        collect(cnn(), {"stem_out": Histogram()}, feeds, reference_runner, workers=3)


def test_batches_stay_where_rows_are_no_samples():
    assert isinstance(by_row(cnn(), batches(4), reference_runner), Rows)
    assert len(by_row(cnn(), batches(7), reference_runner)) == 24
    fixed = batches(4)
    assert by_row(cnn(4), fixed, reference_runner) is fixed
    b = Builder()
    mixing = b.output(b.op("CumSum", b.input("x", ["T", 3]), b.const(np.int64(0)))).model()
    feeds = [{"x": np.ones((4, 3), np.float32)}]
    assert by_row(mixing, feeds, reference_runner) is feeds
    once = iter(batches(4))
    assert by_row(cnn(), once, reference_runner) is once
