"""The timing protocol for streams: a sequence is run in order after a reset, several times, and judged step by step.

One feed over and over tells nothing of a model that computes what changed. So whatever is compared runs the same
sequence in one process, step by step in turns (step k of A, step k of B, the order alternating), with the garbage
collector off. Figures of a step are medians over the passes through the sequence; a ratio is taken within each pass,
where both sides met the same conditions.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from onnxcomp.errors import DataError, RecipeError, UnsupportedError
from onnxcomp.profile import MIN_ROUNDS, Clock, Latency, SystemClock, ratio, timed
from onnxcomp.stream_profile import StreamPart, StreamProfile, StreamStep, StreamTimes
from onnxcomp.target import Array, Feed, Session


def profile_sessions(
    sessions: Mapping[str, Session],
    feeds: Sequence[Feed],
    *,
    target: str,
    threads: int,
    data: str,
    repeat: int = 50,
    seconds: float | None = None,
    clock: Clock | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> StreamProfile:
    """Runs a sequence as one stream by `model` and, if it is there, by `baseline`.

    One pass that does not count comes first.

    Args:
        sessions: `model`, and `baseline` or nothing else; all are reset before each pass.
        feeds: The sequence, two steps or more.
        target: Name of the target, for the result.
        threads: Threads that the sessions run with, for the result.
        data: What the sequence is called, for the result.
        repeat: Passes that count.
        seconds: Stop after this much wall time even if fewer than `repeat` passes are done, but not before 5 are.
        clock: Source of time; that of the operating system by default.
        progress: Told the number of passes done and their greatest number.

    Raises:
        DataError: If the sequence is too short, or does not fit.
        RecipeError: If `repeat` is below 1.
    """
    if len(feeds) < 2:
        raise DataError(f"{data} has {len(feeds)} step{'s' * (len(feeds) != 1)}; a stream has two or more")
    if repeat < 1:
        raise RecipeError(f"repeat must be at least 1, not {repeat}")
    state_densities, errors = _warm_up(sessions, feeds)
    wall, cpu = _time_passes(sessions, feeds, repeat, seconds, clock or SystemClock(), progress)
    medians = {name: np.median(times, axis=0) / 1e6 for name, times in wall.items()}
    paired = "baseline" in wall
    ratios = np.median(wall["model"] / np.maximum(wall["baseline"], 1), axis=0) if paired else None
    densities = [None, *(_changed(a, b) for a, b in pairwise(feeds))]
    times = {
        name: StreamTimes(
            p50=float(np.median(medians[name])),
            p90=float(np.percentile(medians[name], 90, method="higher")),
            passes=Latency.of(wall[name].sum(axis=1), cpu[name].sum(axis=1)),
        )
        for name in wall
    }
    known = [d for d in densities if d is not None]
    low, high = _quarters(densities, wall, cpu, medians)
    return StreamProfile(
        target=target,
        threads=threads,
        data=data,
        steps=tuple(
            StreamStep(
                step=i,
                density=density,
                state_density=state_densities[i],
                model_ms=float(medians["model"][i]),
                baseline_ms=float(medians["baseline"][i]) if paired else None,
                ratio=float(ratios[i]) if ratios is not None else None,
                error=errors[i],
            )
            for i, density in enumerate(densities)
        ),
        model=times["model"],
        baseline=times.get("baseline"),
        ratio=ratio(times["model"].passes, times["baseline"].passes) if paired else None,
        density=sum(known) / len(known),
        low=low,
        high=high,
    )


def _warm_up(sessions: Mapping[str, Session], feeds: Sequence[Feed]) -> tuple[list[float | None], list[float | None]]:
    """One pass that is not timed; gives the share of the model's state that every step changes, and its error."""
    shares: list[float | None] = []
    errors: list[float | None] = []
    for session in sessions.values():
        session.reset()
    before = _state(sessions["model"])
    for feed in feeds:
        outputs = {name: session.run(feed) for name, session in sessions.items()}
        errors.append(_error(outputs["model"], outputs["baseline"]) if "baseline" in outputs else None)
        after = _state(sessions["model"])
        shares.append(_changed(before, after) if after else None)
        before = after
    return shares, errors


def _error(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float | None:
    """Relative error of the worst output that both have."""
    errors = []
    for name, want in wanted.items():
        other = found.get(name)
        if other is None or want.dtype.kind != "f" or other.shape != want.shape or not want.size:
            continue
        with np.errstate(all="ignore"):  # of NaN and infinity there is no error to tell
            off = float(np.square(np.subtract(other, want, dtype=np.float64)).sum())
            size = float(np.square(want, dtype=np.float64).sum())
        errors.append(np.sqrt(off / size) if size else float(off > 0))
    return float(np.max(errors)) if errors else None


def _state(session: Session) -> dict[str, Array]:
    try:
        return session.state()
    except UnsupportedError:
        return {}


def _time_passes(
    sessions: Mapping[str, Session],
    feeds: Sequence[Feed],
    repeat: int,
    seconds: float | None,
    clock: Clock,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Nanoseconds of wall and of CPU time by name, int64 `(passes, steps)`."""
    wall: dict[str, list[list[int]]] = {name: [] for name in sessions}
    cpu: dict[str, list[list[int]]] = {name: [] for name in sessions}
    names = list(sessions)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        started = clock.wall()
        for done in range(repeat):
            if seconds is not None and done >= MIN_ROUNDS and clock.wall() - started > seconds * 1e9:
                break
            for name, session in sessions.items():
                session.reset()
                wall[name].append([])
                cpu[name].append([])
            for step, feed in enumerate(feeds):
                for name in names if (done + step) % 2 == 0 else reversed(names):
                    elapsed_wall, elapsed_cpu = timed(partial(sessions[name].run, feed), clock)
                    wall[name][-1].append(elapsed_wall)
                    cpu[name][-1].append(elapsed_cpu)
            if progress:
                progress(done + 1, repeat)
    finally:
        if collecting:
            gc.enable()
    return {n: np.array(t) for n, t in wall.items()}, {n: np.array(t) for n, t in cpu.items()}


def _changed(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """Share of the elements that differ; all of an array whose shape differs."""
    total = changed = 0
    for name, array in after.items():
        old = before[name]
        total += array.size
        changed += array.size if old.shape != array.shape else int(np.count_nonzero(old != array))
    return changed / total if total else 0.0


def _quarters(
    densities: Sequence[float | None], wall: Mapping[str, Array], cpu: Mapping[str, Array], medians: Mapping[str, Array]
) -> tuple[StreamPart | None, StreamPart | None]:
    known = sorted((density, step) for step, density in enumerate(densities) if density is not None)
    if known[0][0] == known[-1][0]:
        return None, None
    count = max(1, len(known) // 4)

    def part(chosen: Sequence[tuple[float, int]]) -> StreamPart:
        steps = sorted(step for _, step in chosen)
        sums = {n: Latency.of(wall[n][:, steps].sum(axis=1), cpu[n][:, steps].sum(axis=1)) for n in wall}
        paired = "baseline" in wall
        return StreamPart(
            steps=tuple(steps),
            density=sum(density for density, _ in chosen) / len(chosen),
            model_ms=float(np.median(medians["model"][steps])),
            baseline_ms=float(np.median(medians["baseline"][steps])) if paired else None,
            ratio=ratio(sums["model"], sums["baseline"]) if paired else None,
        )

    return part(known[:count]), part(known[-count:])
