"""The timing protocol: whatever is compared runs in turns, and the figures are order statistics.

On a machine that others use too, two runs minutes apart differ by more than the thing measured. So the candidates run
in rounds, A B A B, in alternating order, the garbage collector is off, and a ratio is taken within each round, where
both sides met the same conditions. CPU time of the process is recorded beside wall time; it does not count the time in
which another process had the core.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from onnxcomp.errors import RecipeError

MIN_ROUNDS = 5
"""Rounds that are measured even if the time budget is spent."""

_SMALLEST = 0.02
"""Change of the run time below which no claim is made: the layout of a binary in memory alone can cost as much."""
_CONFIDENCE = 0.9
"""Coverage of the ratio's interval below which no claim is made."""


class Clock(Protocol):
    """A source of time in nanoseconds."""

    def wall(self) -> int:
        """Elapsed time."""
        ...

    def cpu(self) -> int:
        """CPU time of all threads of this process."""
        ...


class SystemClock:
    """The clocks of the operating system."""

    def wall(self) -> int:
        """Monotonic elapsed time."""
        return time.perf_counter_ns()

    def cpu(self) -> int:
        """User and system time of all threads of this process."""
        return time.process_time_ns()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one run in milliseconds.

    Attributes:
        p25: 25th percentile of wall time.
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile; the slowest run when there are fewer than 100.
        mean: Mean.
        min: Fastest run.
        spread: Interquartile range, a measure of the noise.
        cpu_p25: 25th percentile of CPU time, all threads added up.
        cpu_p50: Median of CPU time.
        samples: Number of runs.
        wall_ms: Wall time of every run, in order.
        cpu_ms: CPU time of every run, in order.
    """

    p25: float
    p50: float
    p90: float
    p99: float
    mean: float
    min: float
    spread: float
    cpu_p25: float
    cpu_p50: float
    samples: int
    wall_ms: tuple[float, ...] = field(repr=False)
    cpu_ms: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, wall_ns: Sequence[int], cpu_ns: Sequence[int]) -> Latency:
        """Summary of runs given in nanoseconds, one entry a run."""
        wall, cpu = np.asarray(wall_ns) / 1e6, np.asarray(cpu_ns) / 1e6
        p25, p50, p75 = (float(q) for q in np.percentile(wall, [25, 50, 75]))
        cpu_p25, cpu_p50 = (float(q) for q in np.percentile(cpu, [25, 50]))
        return cls(
            p25=p25,
            p50=p50,
            p90=float(np.percentile(wall, 90, method="higher")),
            p99=float(np.percentile(wall, 99, method="higher")),
            mean=float(wall.mean()),
            min=float(wall.min()),
            spread=p75 - p25,
            cpu_p25=cpu_p25,
            cpu_p50=cpu_p50,
            samples=len(wall),
            wall_ms=tuple(wall.tolist()),
            cpu_ms=tuple(cpu.tolist()),
        )


def measure(
    runs: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 5,
    repeat: int = 50,
    seconds: float | None = None,
    clock: Clock | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Latency]:
    """Times several things against each other, in rounds of one run each.

    Args:
        runs: Name to what is timed.
        warmup: Rounds that do not count.
        repeat: Rounds that count.
        seconds: Stop after this much wall time even if fewer than `repeat` rounds are done, but not before 5 are.
        clock: Source of time; that of the operating system by default.
        progress: Told the number of rounds done and their greatest number.

    Returns:
        Name to latency. All have the same number of samples, and equal index means equal round.

    Raises:
        RecipeError: If there is nothing to time, or a count is out of range.
    """
    if not runs:
        raise RecipeError("there is nothing to time; give at least one model")
    if repeat < 1 or warmup < 0:
        raise RecipeError(f"repeat must be at least 1 and warmup at least 0, not {repeat} and {warmup}")
    clock = clock or SystemClock()
    wall: dict[str, list[int]] = {name: [] for name in runs}
    cpu: dict[str, list[int]] = {name: [] for name in runs}
    names = list(runs)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(warmup):
            for name in names:
                runs[name]()
        started = clock.wall()
        for done in range(repeat):
            late = seconds is not None and clock.wall() - started > seconds * 1e9
            if late and done >= MIN_ROUNDS:
                break
            for name in names if done % 2 == 0 else reversed(names):
                elapsed_wall, elapsed_cpu = timed(runs[name], clock)
                wall[name].append(elapsed_wall)
                cpu[name].append(elapsed_cpu)
            if progress:
                progress(done + 1, repeat)
    finally:
        if collecting:
            gc.enable()
    return {name: Latency.of(wall[name], cpu[name]) for name in names}


def timed(run: Callable[[], object], clock: Clock) -> tuple[int, int]:
    """Nanoseconds of wall and of CPU time that `run` takes."""
    cpu, wall = clock.cpu(), clock.wall()
    run()
    return clock.wall() - wall, clock.cpu() - cpu


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How the times of two things relate.

    Attributes:
        median: Median over rounds of `a / b`.
        low: Lower end of the confidence interval of the median.
        high: Upper end.
        confidence: Coverage of the interval, at least what was asked for if there are enough rounds.
        rounds: Number of rounds.
    """

    median: float
    low: float
    high: float
    confidence: float
    rounds: int


def ratio(a: Latency, b: Latency, *, by: Literal["wall", "cpu"] = "wall", confidence: float = 0.95) -> Ratio:
    """Median of the ratio `a / b` within a round, with a confidence interval.

    The interval lies between two order statistics of the ratios, chosen by the binomial distribution of the number of
    ratios below the true median. It assumes independent rounds but no distribution. With fewer than 6 rounds it is
    the whole range and covers less than 95 %.

    Args:
        a: Numerator.
        b: Denominator, measured in the same call of `measure`.
        by: Wall or CPU time.
        confidence: Wanted coverage.

    Raises:
        RecipeError: If the two were not measured together, or the clock saw no time pass.
    """
    if a.samples != b.samples:
        raise RecipeError(f"{a.samples} and {b.samples} samples cannot be paired; measure both in one call")
    upper, lower = (np.asarray(x.wall_ms if by == "wall" else x.cpu_ms) for x in (a, b))
    if not lower.all():
        raise RecipeError(f"some runs took no measurable {by} time; time more work per run")
    ratios = np.sort(upper / lower)
    rank, coverage = _median_rank(len(ratios), confidence)
    return Ratio(
        median=float(np.median(ratios)),
        low=float(ratios[rank]),
        high=float(ratios[-1 - rank]),
        confidence=coverage,
        rounds=len(ratios),
    )


def claim(found: Ratio) -> Literal["faster", "slower", "same", "unknown"]:
    """What a ratio allows to say of its numerator; `unknown` if there were too few rounds."""
    if found.confidence < _CONFIDENCE:
        return "unknown"
    if found.low > 1.0 and found.median > 1.0 + _SMALLEST:
        return "slower"
    return "faster" if found.high < 1.0 and found.median < 1.0 - _SMALLEST else "same"


def _median_rank(count: int, confidence: float) -> tuple[int, float]:
    """Largest `r` such that the median lies between the order statistics `r` and `-1 - r` with the given confidence."""
    rank, outside, coverage = 0, 0.0, 1.0 - 2.0 * 0.5**count
    for below in range((count - 1) // 2 + 1):
        outside += math.exp(
            math.lgamma(count + 1) - math.lgamma(below + 1) - math.lgamma(count - below + 1) - count * math.log(2)
        )
        if 1.0 - 2.0 * outside < confidence:
            break
        rank, coverage = below, 1.0 - 2.0 * outside
    return rank, max(coverage, 0.0)
