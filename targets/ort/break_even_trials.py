"""Measures from which sparsity on the native kernels beat onnxruntime's dense ops of the same accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import native
from onnxcomp.break_even import BreakEven, Op, Weights
from onnxcomp.target import Array
from onnxcomp.targets.ort import trials
from onnxcomp.targets.ort.runtime import make_session, session_options

SHAPES = ((576, 1536), (1536, 576), (2048, 2048), (2048, 5632), (5632, 2048))
ROWS = (1, 2, 4, 8, 128)

LEVELS = (0.0, 0.25, 0.5, 0.75, 0.95)
_PATTERNS = (2, 1)  # of four weights stored
REPEAT, REPEAT_LONG = 7, 3  # what takes long varies less
MANY = 8
WARM = 1
_LEAST, _MOST = 80e6, 400e6
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")


def beyond_cache() -> float:
    """Bytes of weights that do not stay in a processor's cache from one run to the next, but come from memory."""
    try:
        kilobytes = int(_CACHE.read_text(encoding="ascii").strip().removesuffix("K"))
    except (OSError, ValueError):  # no such cache, or no such system
        kilobytes = 0
    return min(max(_LEAST, 1.5 * 1024 * kilobytes), _MOST)


def clock(threads: int) -> float:
    """Seconds: of this thread on a processor if it does all the work, which a busy machine disturbs less."""
    return time.thread_time() if threads == 1 else time.perf_counter()


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] | None = None,
    *,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[BreakEven]:
    """Measures products, and gated MLPs where there are the shapes of both an up projection and its down projection.

    Args:
        shapes: Rows and columns of weights, multiples of 32.
        rows: Rows of activations, `ROWS` by default.
        threads: Threads of a run.
        progress: Told how many of how many cases are measured.
    """
    cases: list[tuple[Op, trials.Kind, tuple[int, int]]] = []
    for shape in dict.fromkeys(shapes):
        mlp = shape[0] < shape[1] and shape[::-1] in shapes
        for kind in trials.KINDS.values():
            cases += [("matmul", kind, shape)]
            cases += [("gated_mlp", kind, shape)] if mlp else []
            cases += [("nm_matmul", kind, shape)] if kind.name != "int4" else []
    for index, (op, kind, (inputs, outputs)) in enumerate(cases):
        sessions: dict[bool, _Sessions] = {}
        for count in ROWS if rows is None else rows:
            if (many := count > MANY) not in sessions:
                sessions[many] = _sessions(op, kind, inputs, outputs, threads, 0.0 if many else beyond_cache())
            for weights, sparsity in _break_even(op, sessions[many], count, threads).items():
                yield BreakEven(
                    op=op,
                    weights=kind.name,
                    dense=weights,
                    inputs=inputs,
                    outputs=outputs,
                    rows=count,
                    threads=threads,
                    sparsity=sparsity,
                )
        if progress:
            progress(index + 1, len(cases))


def crossing(levels: Sequence[float], sparse: Sequence[float], dense: float) -> float:
    """Lowest level from which on sparse is faster, on the line between two levels; 1 if it is not even at the last."""
    if sparse[-1] >= dense:
        return 1.0
    for index in range(len(levels) - 1, 0, -1):
        above, below = sparse[index - 1], sparse[index]
        if above >= dense:
            share = (above - dense) / (above - below)
            return levels[index - 1] + share * (levels[index] - levels[index - 1])
    return levels[0]


@dataclass(frozen=True)
class _Sessions:
    sparse: Sequence[Any]  # one for all levels of sparsity, or one for each pattern
    dense: Mapping[Weights, Any]
    copies: int
    bytes: float  # of the dense weights of one


def _sessions(op: Op, kind: trials.Kind, inputs: int, outputs: int, threads: int, least: float) -> _Sessions:
    """Sessions of two products or more, whose weights have `least` bytes."""
    size = (2 if op == "gated_mlp" else 1) * inputs * outputs * kind.size
    copies = max(2, round(least / size))
    make_dense = trials.dense_mlp if op == "gated_mlp" else trials.dense_matmul

    def load(model: bytes) -> Any:
        return make_session(model, session_options(threads=threads, domains=[native.DOMAIN]))

    dense = {w: load(make_dense(kind, inputs, outputs, copies, equal=w, any_rows=True)) for w in kind.equal}
    if op == "nm_matmul" and kind.name != "int4":
        models = [trials.nm_matmul(kind.name, kept, inputs, outputs, copies, any_rows=True) for kept in _PATTERNS]
    else:
        make_sparse = trials.gated_mlp if op == "gated_mlp" else trials.threshold_matmul
        models = [make_sparse(kind, inputs, outputs, copies, any_rows=True)]
    return _Sessions([load(model) for model in models], dense, copies, copies * size)


def _break_even(op: Op, sessions: _Sessions, rows: int, threads: int) -> dict[Weights, float]:
    """The level of sparsity from which on ours is faster, for each type of dense weights."""
    rng = np.random.default_rng(0)
    shapes = {i.name: (sessions.copies * rows, i.shape[1]) for i in sessions.sparse[0].get_inputs() if i.shape}
    feed = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if op == "nm_matmul":
        times, dense = _times(sessions, feed, [(session, 0.0) for session in sessions.sparse], rows, threads)
        patterns = [1 - kept / 4 for kept in _PATTERNS]
        # Nothing lies between two patterns.
        return {
            weights: next((p for p, ours in zip(patterns, times, strict=True) if ours < taken), 1.0)
            for weights, taken in dense.items()
        }
    compared: Array = np.abs(feed.get("gates", feed["x"]))
    limits = [float(np.quantile(compared, level)) if level else -1.0 for level in LEVELS]
    times, dense = _times(sessions, feed, [(sessions.sparse[0], limit) for limit in limits], rows, threads)
    return {weights: round(crossing(LEVELS, times, taken), 3) for weights, taken in dense.items()}


def _times(
    sessions: _Sessions, feed: Mapping[str, Array], sparse: Sequence[tuple[Any, float]], rows: int, threads: int
) -> tuple[list[float], dict[Weights, float]]:
    """Seconds of ours with each threshold, and of the dense sessions, interleaved; lower quartiles."""
    runs = [*sparse, *((session, 0.0) for session in sessions.dense.values())]
    times: list[list[float]] = [[] for _ in runs]
    long = rows > MANY or sessions.bytes > 2 * _LEAST
    for turn in range(WARM + (REPEAT_LONG if long else REPEAT)):
        for (session, limit), taken in zip(runs, times, strict=True):
            given = {**feed, "threshold": np.asarray(limit, np.float32)}
            start = clock(threads)
            session.run(None, given)
            if turn >= WARM:
                taken.append(clock(threads) - start)
    found = [float(np.percentile(taken, 25)) for taken in times]
    return found[: len(sparse)], dict(zip(sessions.dense, found[len(sparse) :], strict=True))
