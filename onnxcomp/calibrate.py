"""Streams calibration data through a probe of the model and shows the wanted values to observers.

Feeds run on several threads at once. Each observer sees its values in the order of the feeds all the same, one array at
a time, so that what it keeps does not depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CalibrationError, OnnxcompError
from onnxcomp.stats import Observer
from onnxcomp.target import Array, Feed

_MOST_WORKERS = 4  # each holds the observed values of one feed
_ROOM = 32 << 20  # bytes of values that feeds which run at once may take, unless one alone takes more
_CLOSE = 1e-3  # of the largest output: rows that run alone give the same outputs up to rounding


class Runner(Protocol):
    """Prepares a model for runs that return values from inside it.

    The core does not depend on any runtime; a target supplies this.
    """

    def __call__(self, model: ir.Model, outputs: Sequence[str], /) -> Callable[[Feed], dict[str, Array]]:
        """Returns a function from a feed to the named values of the main graph; leaves `model` unchanged.

        The function is called from several threads at once, unless the model has state, which feeds do not give.
        """


class Rows:
    """Feeds of several samples, cut into feeds of one sample each.

    Args:
        data: Feeds, iterated again for every iteration; the first axis of every array counts samples.
    """

    def __init__(self, data: Iterable[Feed]) -> None:
        self._data = data
        self._length: int | None = None

    def __iter__(self) -> Iterator[Feed]:
        for feed in self._data:
            for row in range(min(len(array) for array in feed.values())):
                yield {name: array[row : row + 1] for name, array in feed.items()}

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(min(len(array) for array in feed.values()) for feed in self._data)
        return self._length


def by_row(model: ir.Model, data: Iterable[Feed], runner: Runner) -> Iterable[Feed]:
    """Cuts batches into single samples, so that nothing depends on the batches in which the data comes.

    Kernels round differently for another batch size, and passes count feeds. The data stays as it is where the model
    fixes the first axis of an input or output, or where the samples of the first feed, run one by one, do not give what
    they give together: then that axis is no batch.

    Args:
        model: The model, unchanged.
        data: Feeds; what can be iterated only once stays as it is.
        runner: Runs the first feed.
    """
    if iter(data) is data:
        return data
    feed = next(iter(data), None)
    if feed is None or not _has_open_batch(model, feed):
        return data
    rows = list(Rows([feed]))
    if len(rows) < 2:
        return data
    run = runner(model, [v.name or "" for v in model.graph.outputs])
    try:
        together, alone = run(feed), [run(row) for row in rows]
    except OnnxcompError:  # the axis may not have length 1
        return data
    same = all(_same_rows(value, [row[name] for row in alone]) for name, value in together.items())
    return Rows(data) if same else data


def _has_open_batch(model: ir.Model, feed: Feed) -> bool:
    """Whether all inputs and outputs begin with an axis of open size, which is the same in all arrays of the feed."""
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    if {v.name for v in inputs} != set(feed) or not all(isinstance(a, np.ndarray) for a in feed.values()):
        return False  # a sequence
    if len({a.shape[:1] for a in feed.values()}) != 1:
        return False
    shapes = [v.shape for v in (*inputs, *(v for v in model.graph.outputs if v.shape is not None))]
    return all(s is not None and s.rank() > 0 and not isinstance(s[0], int) for s in shapes)


def _same_rows(together: Array, alone: Sequence[Array]) -> bool:
    if together.dtype.kind not in "fiu" or any(a.ndim == 0 for a in alone):
        return False
    joined = np.concatenate(alone)
    largest = float(np.abs(together).max(initial=0.0))
    return joined.shape == together.shape and bool(np.allclose(joined, together, rtol=0.0, atol=_CLOSE * largest))


def collect(
    model: ir.Model,
    observers: Mapping[str, Observer],
    data: Iterable[Feed],
    runner: Runner,
    progress: Callable[[int, int | None], None] | None = None,
    workers: int | None = None,
) -> int:
    """Shows every observed value of every feed to its observer.

    No more feeds' values than `workers` are in memory at a time, so the peak does not grow with the amount of data;
    and one alone if its values are large. Outcomes do not depend on `workers`.

    Args:
        model: The model, unchanged.
        observers: Value name to observer; updated in place.
        data: Feeds, consumed once, by the calling thread.
        runner: Runs the probe.
        progress: Told the number of feeds done and the total, if `data` has a length.
        workers: Feeds to work on at once; None for as many as there are cores, and at most 4.

    Returns:
        Number of feeds seen.

    Raises:
        CalibrationError: If there is no feed, or a value is not finite.
    """
    inputs = {v.name for v in model.graph.inputs}
    inner = [name for name in observers if name not in inputs]
    run = runner(model, inner) if inner else None
    total = len(data) if isinstance(data, Sized) else None
    workers = _workers() if workers is None else workers
    count = 0
    at_once = 1

    def values_of(feed: Feed) -> dict[str, Array]:
        values: dict[str, Array] = {k: v for k, v in feed.items() if k in observers}
        if run is not None:
            values.update(run(feed))
        return values

    def most(feed: Feed) -> int:
        return 1 if _has_state(model, feed) else at_once

    with ThreadPoolExecutor(workers) as pool:
        for values in _in_order(pool, values_of, data, most):
            at_once = max(1, min(workers, _ROOM // max(_bytes(values), 1)))
            _show_all(pool, observers, values, count, at_once)
            del values  # or one more than promised would be held while the next feed starts
            count += 1
            if progress:
                progress(count, total)
    if not count:
        raise CalibrationError("the calibration data is empty")
    return count


def _bytes(values: Mapping[str, Array]) -> int:
    return sum(getattr(array, "nbytes", 0) for array in values.values())  # a sequence has none


def _workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_WORKERS)


def _has_state(model: ir.Model, feed: Feed) -> bool:
    """Whether the model has inputs that no feed gives, and so carries them from one run to the next."""
    return any(v.name not in feed and v.name not in model.graph.initializers for v in model.graph.inputs)


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Feed], dict[str, Array]],
    data: Iterable[Feed],
    most: Callable[[Feed], int],
) -> Iterator[dict[str, Array]]:
    """What `work` gives for each feed, in order; at most `most` results exist at a time, the yielded one included."""
    running: deque[Future[dict[str, Array]]] = deque()
    try:
        for feed in data:
            while len(running) >= most(feed):
                yield running.popleft().result()
            running.append(pool.submit(work, feed))
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _show_all(
    pool: ThreadPoolExecutor, observers: Mapping[str, Observer], values: Mapping[str, Array], feed: int, workers: int
) -> None:
    """Updates every observer; shares of them at once, each by one thread."""
    names = list(observers)

    def show(start: int) -> tuple[int, CalibrationError] | None:
        index = start
        try:
            for index in range(start, len(names), workers):
                observers[names[index]].update(values[names[index]])
        except CalibrationError as error:
            return index, error
        return None

    # The calling thread takes a share, too: with one worker none is handed over.
    others = [pool.submit(show, start) for start in range(1, min(workers, len(names)))]
    found = [show(0), *(future.result() for future in others)]
    wrong = [failure for failure in found if failure is not None]
    if wrong:
        index, error = min(wrong, key=lambda failure: failure[0])
        raise CalibrationError(f"value {names[index]!r}, feed {feed}: {error}") from error
