"""The timing protocol and what is made of its samples."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from onnxcomp.errors import RecipeError
from onnxcomp.profile import MIN_ROUNDS, Latency, measure, ratio


class RecordingClock:
    """Time passes only when a run says so."""

    def __init__(self):
        self.now = 0
        self.cpu_now = 0

    def wall(self):
        return self.now

    def cpu(self):
        return self.cpu_now

    def run(self, log, name, wall_ms, cpu_ms=1):
        def go():
            log.append(name)
            self.now += int(wall_ms * 1e6)
            self.cpu_now += int(cpu_ms * 1e6)

        return go


def latency(*milliseconds):
    samples = [int(m * 1e6) for m in milliseconds]
    return Latency.of(samples, samples)


def test_runs_take_turns_in_alternating_order():
    clock, log = RecordingClock(), []
    found = measure({"a": clock.run(log, "a", 2), "b": clock.run(log, "b", 3, 5)}, warmup=1, repeat=3, clock=clock)
    assert "".join(log) == "ab" + "ab" + "ba" + "ab"
    assert found["a"].wall_ms == (2.0, 2.0, 2.0)
    assert found["b"].p50 == 3.0
    assert found["b"].cpu_p50 == 5.0
    assert found["b"].samples == 3


def test_garbage_is_not_collected_meanwhile():
    states = []
    measure({"a": lambda: states.append(gc.isenabled())}, warmup=1, repeat=2)
    assert states == [False] * 3
    assert gc.isenabled()


def test_an_error_restores_the_collector():
    def fail():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure({"a": fail}, warmup=0, repeat=1)
    assert gc.isenabled()


def test_time_budget():
    clock, seen = RecordingClock(), []
    run = clock.run([], "a", 100)
    found = measure({"a": run}, warmup=0, repeat=1000, seconds=1.0, clock=clock, progress=lambda *p: seen.append(p))
    assert 10 <= found["a"].samples <= 12
    assert seen[-1] == (found["a"].samples, 1000)
    assert measure({"a": run}, warmup=0, repeat=1000, seconds=0.0, clock=clock)["a"].samples == MIN_ROUNDS
    assert measure({"a": run}, warmup=0, repeat=2, seconds=0.0, clock=clock)["a"].samples == 2


def test_what_cannot_be_timed():
    with pytest.raises(RecipeError, match="nothing to time"):
        measure({})
    with pytest.raises(RecipeError, match="repeat must be at least 1"):
        measure({"a": int}, repeat=0)


def test_order_statistics():
    found = latency(*range(1, 101))
    assert (found.min, found.p90, found.p99, found.samples) == (1.0, 91.0, 100.0, 100)
    assert found.p50 == pytest.approx(50.5)
    assert found.spread == pytest.approx(49.5)
    assert found.mean == pytest.approx(50.5)


def test_ratio_is_paired():
    drift = np.linspace(1, 10, 21)  # the machine gets slower, the ratio stays
    found = ratio(latency(*(drift * 2)), latency(*drift))
    assert found.median == pytest.approx(2.0, rel=1e-5)
    assert found.low == pytest.approx(2.0, rel=1e-5)
    assert found.high == pytest.approx(2.0, rel=1e-5)
    assert found.rounds == 21


def test_interval_is_the_binomial_one():
    ones = latency(*[1.0] * 20)
    found = ratio(latency(*range(1, 21)), ones)
    assert (found.low, found.high) == (6.0, 15.0)  # ranks 6 and 15 of 20, as in tables
    assert found.confidence == pytest.approx(0.9586, abs=1e-4)


def test_interval_covers_the_median():
    rng = np.random.default_rng(0)
    ones = latency(*[1.0] * 31)
    hits = 0
    for _ in range(400):
        found = ratio(latency(*rng.lognormal(size=31)), ones)
        hits += found.low <= 1.0 <= found.high
    assert 0.93 <= hits / 400 <= 0.995


def test_few_rounds_are_said_to_cover_less():
    found = ratio(latency(1, 2, 3), latency(1, 1, 1))
    assert (found.low, found.high) == (1.0, 3.0)
    assert found.confidence == pytest.approx(0.75)


def test_what_cannot_be_compared():
    with pytest.raises(RecipeError, match="cannot be paired"):
        ratio(latency(1, 2), latency(1))
    with pytest.raises(RecipeError, match="no measurable"):
        ratio(latency(1), latency(0))
