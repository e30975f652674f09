"""Measures from which sparsity on the native kernels beat onnxruntime's dense ops of the same accuracy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import native
from onnxcomp.break_even import BreakEven, Weights
from onnxcomp.target import Array
from onnxcomp.targets.ort import trials
from onnxcomp.targets.ort.runtime import make_session, session_options

SHAPES = ((576, 1536), (1536, 576), (2048, 2048), (2048, 5632), (5632, 2048))
ROWS = (1, 2, 4, 8, 128)

_LEVELS = (0.0, 0.25, 0.5, 0.75, 0.95)
_REPEAT, _REPEAT_LONG = 7, 3  # what takes long varies less
_MANY = 8
_WARM = 1
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
    cases = [
        (op, kind, shape)
        for shape in dict.fromkeys(shapes)
        for op in ("matmul", *(("gated_mlp",) if shape[0] < shape[1] and shape[::-1] in shapes else ()))
        for kind in trials.KINDS.values()
    ]
    for index, (op, kind, (inputs, outputs)) in enumerate(cases):
        sessions: dict[bool, _Sessions] = {}
        for count in ROWS if rows is None else rows:
            if (many := count > _MANY) not in sessions:
                sessions[many] = _sessions(op, kind, inputs, outputs, threads, 0.0 if many else beyond_cache())
            sparse, dense = _times(sessions[many], count, threads)
            for weights, time_taken in dense.items():
                yield BreakEven(
                    op="gated_mlp" if op == "gated_mlp" else "matmul",
                    weights=kind.name,
                    dense=weights,
                    inputs=inputs,
                    outputs=outputs,
                    rows=count,
                    threads=threads,
                    sparsity=round(crossing(_LEVELS, sparse, time_taken), 3),
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
    sparse: Any
    dense: Mapping[Weights, Any]
    copies: int
    bytes: float  # of the weights of one


def _sessions(op: str, kind: trials.Kind, inputs: int, outputs: int, threads: int, least: float) -> _Sessions:
    """Sessions of two products or more, whose weights have `least` bytes."""
    size = (2 if op == "gated_mlp" else 1) * inputs * outputs * kind.size
    copies = max(2, round(least / size))
    mlp = op == "gated_mlp"
    make_dense = trials.dense_mlp if mlp else trials.dense_matmul
    make_sparse = trials.gated_mlp if mlp else trials.threshold_matmul

    def load(model: bytes) -> Any:
        return make_session(model, session_options(threads=threads, domains=[native.DOMAIN]))

    dense = {w: load(make_dense(kind, inputs, outputs, copies, equal=w, any_rows=True)) for w in kind.equal}
    return _Sessions(load(make_sparse(kind, inputs, outputs, copies, any_rows=True)), dense, copies, copies * size)


def _times(sessions: _Sessions, rows: int, threads: int) -> tuple[list[float], dict[Weights, float]]:
    """Seconds of our session at each level of sparsity, and of the dense ones, interleaved; lower quartiles."""
    rng = np.random.default_rng(0)
    shapes = {i.name: (sessions.copies * rows, i.shape[1]) for i in sessions.sparse.get_inputs() if i.shape}
    feed = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    compared: Array = np.abs(feed.get("gates", feed["x"]))
    limits = [np.quantile(compared, level) if level else -1.0 for level in _LEVELS]
    runs = [(sessions.sparse, limit) for limit in limits] + [(session, 0.0) for session in sessions.dense.values()]
    times: list[list[float]] = [[] for _ in runs]
    long = rows > _MANY or sessions.bytes > 2 * _LEAST
    for turn in range(_WARM + (_REPEAT_LONG if long else _REPEAT)):
        for (session, limit), taken in zip(runs, times, strict=True):
            given = {**feed, "threshold": np.asarray(limit, np.float32)}
            start = clock(threads)
            session.run(None, given)
            if turn >= _WARM:
                taken.append(clock(threads) - start)
    found = [float(np.percentile(taken, 25)) for taken in times]
    return found[: len(_LEVELS)], dict(zip(sessions.dense, found[len(_LEVELS) :], strict=True))
