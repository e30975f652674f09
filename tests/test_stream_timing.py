"""The timing protocol for streams, with a clock and sessions that are made up."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from onnxcomp.errors import DataError, RecipeError
from onnxcomp.state import StateSpec
from onnxcomp.stream_profile import StreamProfile
from onnxcomp.stream_timing import profile_sessions
from onnxcomp.target import Array, Feed, Session, TensorSpec

FEEDS = [
    {"x": np.array(x, np.float32), "flag": np.array(False)}
    for x in ([0, 0, 0], [0, 0, 1], [0, 0, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 3])
]
DENSITIES = [None, 0.25, 0.0, 0.75, 0.0, 0.25, 0.75, 0.0, 0.25]


class Clock:
    """Time that passes only as sessions run."""

    now = 0

    def wall(self) -> int:
        return self.now

    def cpu(self) -> int:
        return 2 * self.now


class Timed(Session):
    """Takes so many milliseconds and so many more for every element of `x` that changed; keeps `x` as state."""

    def __init__(self, name: str, clock: Clock, log: list[tuple[str, int]], fixed: float, each: float) -> None:
        self.name, self.clock, self.log, self.fixed, self.each = name, clock, log, fixed, each
        self.resets = 0
        self.reset()

    @property
    @override
    def inputs(self) -> Sequence[TensorSpec]:
        return ()

    @property
    @override
    def outputs(self) -> Sequence[TensorSpec]:
        return ()

    @property
    @override
    def states(self) -> Sequence[StateSpec]:
        return (StateSpec(input="last", output="next", shape=[3], dtype="float32"),)

    @override
    def run(self, feed: Feed) -> dict[str, Array]:
        assert not gc.isenabled() or self.resets < 3  # a made one and the warm-up
        changed = np.count_nonzero(feed["x"] != self.last)
        self.log.append((self.name, self.steps))
        self.clock.now += int(1e6 * (self.fixed + self.each * changed) * self.noise())
        self.last, self.steps = feed["x"], self.steps + 1
        return {}

    def noise(self) -> float:
        return 1.0

    @override
    def reset(self) -> None:
        self.last, self.steps = np.zeros(3, np.float32), 0
        self.resets += 1

    @override
    def state(self) -> dict[str, Array]:
        return {"last": self.last.copy()}


def measured(
    *times: tuple[float, float], repeat: int = 6, feeds: Sequence[Feed] = FEEDS, **options: Any
) -> tuple[StreamProfile, list[tuple[str, int]], Mapping[str, Timed]]:
    clock, log = Clock(), []
    sessions = {n: Timed(n, clock, log, *t) for n, t in zip(("model", "baseline"), times, strict=False)}
    found = profile_sessions(
        sessions, feeds, target="t", threads=1, data="d", repeat=repeat, clock=clock, **options
    )  # fmt: skip
    return found, log, sessions


def test_steps_and_summary():
    found, _, _ = measured((1.0, 2.0), (4.0, 0.0))
    assert [s.density for s in found.steps] == DENSITIES
    times = [1.0, 3.0, 1.0, 7.0, 1.0, 3.0, 7.0, 1.0, 3.0]
    assert [s.model_ms for s in found.steps] == times
    assert [s.baseline_ms for s in found.steps] == [4.0] * 9
    assert [s.ratio for s in found.steps] == [t / 4.0 for t in times]
    assert [s.state_density for s in found.steps] == [0.0, 1 / 3, 0.0, 1.0, 0.0, 1 / 3, 1.0, 0.0, 1 / 3]
    assert (found.model.p50, found.model.p90, found.model.passes.p50) == (3.0, 7.0, 27.0)
    assert found.model.passes.cpu_p50 == 54.0
    assert (found.baseline.p50, found.baseline.p90, found.baseline.passes.samples) == (4.0, 4.0, 6)
    assert found.ratio.median == 27.0 / 36.0
    assert found.density == pytest.approx(2.25 / 8)
    assert (found.low.steps, found.low.density, found.low.ratio.median) == ((2, 4), 0.0, 0.25)
    assert (found.high.steps, found.high.density, found.high.ratio.median) == ((3, 6), 0.75, 1.75)
    assert (found.high.model_ms, found.high.baseline_ms) == (7.0, 4.0)


def test_both_run_every_step_in_turns_and_every_pass_starts_anew():
    _, log, sessions = measured((1.0, 0.0), (1.0, 0.0), repeat=5)
    assert {s.resets for s in sessions.values()} == {1 + 1 + 5}  # made, warm-up, passes
    pairs = [log[i : i + 2] for i in range(0, len(log), 2)]
    assert [{n for n, _ in p} for p in pairs] == [{"model", "baseline"}] * (6 * len(FEEDS))
    assert [[k for _, k in p] for p in pairs] == [[k, k] for _ in range(6) for k in range(len(FEEDS))]
    for step in range(len(FEEDS)):
        assert {pairs[len(FEEDS) * (1 + done) + step][0][0] for done in range(5)} == {"model", "baseline"}


def test_medians_over_the_passes(monkeypatch):
    noises = iter([1.0] * 9 + [100.0] + [1.0] * 100)  # one outlier in the first pass that counts
    monkeypatch.setattr(Timed, "noise", lambda self: next(noises))
    found, _, _ = measured((2.0, 0.0))
    assert [s.model_ms for s in found.steps] == [2.0] * 9
    assert (found.baseline, found.ratio, found.verdict) == (None, None, "")
    assert (found.low.baseline_ms, found.low.ratio) == (None, None)


@pytest.mark.parametrize(
    ("times", "repeat", "verdict"),
    [
        (
            ((3.0, 0.0), (2.0, 0.0)),
            6,
            "SLOWER: the stream takes 1.50x the time of the baseline (97% interval 1.50-1.50",
        ),
        (((1.0, 0.0), (2.0, 0.0)), 6, "the stream runs in 0.50x of the time of the baseline (97% interval 0.50-0.50"),
        (((2.01, 0.0), (2.0, 0.0)), 6, "no difference beyond noise: 1.00x"),
        (((1.0, 0.0), (2.0, 0.0)), 2, "2 passes on t, 1 thread are too few: no claim about speed"),
    ],
)
def test_slower_is_called_slower(times, repeat, verdict):
    found, _, _ = measured(*times, repeat=repeat)
    assert found.verdict.startswith(verdict)
    assert "t, 1 thread" in found.verdict


def test_one_slow_pass_decides_nothing(monkeypatch):
    noises = iter([1.0] * 18 + [0.1] * 18 + [3.0, 0.5] * 10_000)
    monkeypatch.setattr(Timed, "noise", lambda self: next(noises))
    found, _, _ = measured((2.0, 0.0), (2.0, 0.0), repeat=8)
    assert found.verdict.startswith("no difference beyond noise")


def test_time_limit_leaves_five_passes():
    found, _, _ = measured((1.0, 0.0), repeat=50, seconds=0.001)
    assert found.model.passes.samples == 5


def test_progress_and_the_garbage_collector():
    told: list[tuple[int, int]] = []
    measured((1.0, 0.0), repeat=3, progress=lambda *given: told.append(given))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert gc.isenabled()


def test_a_still_picture_has_no_quarters():
    found, _, _ = measured((1.0, 1.0), feeds=FEEDS[:1] * 5)
    assert (found.low, found.high, found.density) == (None, None, 0.0)


def test_inputs_that_change_their_shape_are_all_new():
    feeds = [{"x": np.zeros(3, np.float32), "n": np.zeros(k)} for k in (1, 1, 3)]
    found, _, _ = measured((1.0, 1.0), feeds=feeds)
    assert [s.density for s in found.steps] == [None, 0.0, 0.5]


def test_refused():
    with pytest.raises(DataError, match="d has 1 step; a stream has two or more"):
        measured((1.0, 1.0), feeds=FEEDS[:1])
    with pytest.raises(RecipeError, match="repeat must be at least 1"):
        measured((1.0, 1.0), repeat=0)
