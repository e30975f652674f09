"""Streams calibration data once through a probe of the model and shows the wanted values to observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Protocol

import onnx_ir as ir

from onnxcomp.errors import CalibrationError
from onnxcomp.stats import Observer
from onnxcomp.target import Array, Feed


class Runner(Protocol):
    """Prepares a model for runs that return values from inside it.

    The core does not depend on any runtime; a target supplies this.
    """

    def __call__(self, model: ir.Model, outputs: Sequence[str], /) -> Callable[[Feed], dict[str, Array]]:
        """Returns a function from a feed to the named values of the main graph; leaves `model` unchanged."""


def collect(
    model: ir.Model,
    observers: Mapping[str, Observer],
    data: Iterable[Feed],
    runner: Runner,
    progress: Callable[[int, int | None], None] | None = None,
) -> int:
    """Shows every observed value of every feed to its observer.

    Only one feed's values are in memory at a time, so the peak does not grow with the amount of data.

    Args:
        model: The model, unchanged.
        observers: Value name to observer; updated in place.
        data: Feeds, consumed once.
        runner: Runs the probe.
        progress: Told the number of feeds done and the total, if `data` has a length.

    Returns:
        Number of feeds seen.

    Raises:
        CalibrationError: If there is no feed, or a value is not finite.
    """
    inputs = {v.name for v in model.graph.inputs}
    inner = [name for name in observers if name not in inputs]
    run = runner(model, inner) if inner else None
    total = len(data) if isinstance(data, Sized) else None
    count = 0
    for feed in data:
        values: dict[str, Array] = {k: v for k, v in feed.items() if k in observers}
        if run is not None:
            values.update(run(feed))
        for name, observer in observers.items():
            _show(observer, values[name], f"value {name!r}, feed {count}")
        count += 1
        if progress:
            progress(count, total)
    if not count:
        raise CalibrationError("the calibration data is empty")
    return count


def _show(observer: Observer, value: Array, where: str) -> None:
    try:
        observer.update(value)
    except CalibrationError as error:
        raise CalibrationError(f"{where}: {error}") from error
