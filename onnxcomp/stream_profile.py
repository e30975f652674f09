"""What the steps of a stream take: the figures of one model, or of two that ran the same sequence in turns."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcomp.profile import Latency, Ratio, claim


@dataclass(frozen=True, kw_only=True)
class StreamStep:
    """One step of a stream, medians over the passes.

    Attributes:
        step: Its number, from 0.
        density: Share of the input elements that differ from the step before; None for the first step.
        state_density: Share of the elements of the model's state that the step changed; None if it has none.
        model_ms: Wall time of the model in milliseconds.
        baseline_ms: Likewise of the baseline, if there is one.
        ratio: Time of the model over that of the baseline within a pass.
        error: Difference of the model's outputs from the baseline's, as root mean square over that of the baseline's,
            worst output; None without a baseline, or where they share no floating output.
    """

    step: int
    density: float | None
    state_density: float | None
    model_ms: float
    baseline_ms: float | None = None
    ratio: float | None = None
    error: float | None = None


@dataclass(frozen=True, kw_only=True)
class StreamTimes:
    """Wall time of one model over the steps of a stream.

    Attributes:
        p50: Median over the steps, in milliseconds.
        p90: 90th percentile over the steps: what the slow steps of the sequence take, not the noise of the machine.
        passes: Time of whole passes through the sequence.
    """

    p50: float
    p90: float
    passes: Latency


@dataclass(frozen=True, kw_only=True)
class StreamPart:
    """Some steps of a stream.

    Attributes:
        steps: Their numbers.
        density: Mean of their densities.
        model_ms: Median over the steps of the model's time in milliseconds.
        baseline_ms: Likewise of the baseline, if there is one.
        ratio: Time that the model takes for all of these steps over that of the baseline.
    """

    steps: tuple[int, ...]
    density: float
    model_ms: float
    baseline_ms: float | None
    ratio: Ratio | None


@dataclass(frozen=True, kw_only=True)
class StreamProfile:
    """What a stream takes.

    Attributes:
        target: Name of the target.
        threads: Threads a run.
        data: What the sequence is called.
        steps: Every step.
        model: Times of the model.
        baseline: Times of the baseline, measured interleaved; None without one.
        ratio: Time of the model over that of the baseline, for the whole sequence; None without a baseline.
        density: Mean of the densities.
        low: The quarter of the steps with the lowest density, without the first step; None if all have the same.
        high: The quarter with the highest, likewise.
    """

    target: str
    threads: int
    data: str
    steps: tuple[StreamStep, ...]
    model: StreamTimes
    baseline: StreamTimes | None
    ratio: Ratio | None
    density: float
    low: StreamPart | None
    high: StreamPart | None

    @property
    def verdict(self) -> str:
        """Whether the model is faster than the baseline, in words as in a report; empty without one."""
        if self.ratio is None:
            return ""
        where = f"{self.target}, {self.threads} thread{'s' * (self.threads != 1)}"
        kind = claim(self.ratio)
        if kind == "unknown":
            return f"{self.ratio.rounds} passes on {where} are too few: no claim about speed"
        times = f"{self.ratio.median:.2f}x"
        interval = f"{self.ratio.confidence:.0%} interval {self.ratio.low:.2f}-{self.ratio.high:.2f}; {where}"
        said = {
            "slower": f"SLOWER: the stream takes {times} the time of the baseline",
            "faster": f"the stream runs in {times} of the time of the baseline",
            "same": f"no difference beyond noise: {times} the time of the baseline",
        }
        return f"{said[kind]} ({interval})"
