"""Times of whole models and of their nodes that say how far they can be trusted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.target import Feed

WHOLE = ""  # key of the whole run in the timer's answer

_FEWEST, _MOST = 3, 7  # rounds
_SECONDS = 30.0  # after which no further round begins


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Microseconds over several rounds: the median, and half the width of an interval of 2 standard errors about it."""

    median: float
    spread: float

    def below(self, other: Timing) -> bool:
        """Whether it is the lesser one beyond doubt."""
        return self.median + self.spread < other.median - other.spread


@dataclass(frozen=True, kw_only=True)
class Timer:
    """Times models side by side, so that a machine that slows down does so for all.

    Attributes:
        measure: Microseconds by node, and of the whole run; None where nothing can be measured.
        sample: What models are run on.
        clock: Seconds, to bound the time spent.
    """

    measure: Callable[[ir.Model, Feed], Mapping[str, float]] | None
    sample: Feed | None
    clock: Callable[[], float] = time.monotonic

    def __call__(self, *models: ir.Model, nodes: bool = False) -> list[dict[str, Timing]]:
        """Times the models in turns, until their intervals do not overlap or there were enough rounds.

        Args:
            *models: The models.
            nodes: Go on until the intervals of no node overlap either.

        Returns:
            For each model, the time of every node measured in all rounds; empty if nothing can be measured.
        """
        if self.measure is None or self.sample is None:
            return [{} for _ in models]
        started = self.clock()
        rounds: list[list[Mapping[str, float]]] = [[] for _ in models]
        found: list[dict[str, Timing]] = []
        for number in range(1, _MOST + 1):
            for model, tables in zip(models, rounds, strict=True):
                tables.append(self.measure(model, self.sample))
            if number >= _FEWEST:
                found = [_summary(tables) for tables in rounds]
                if _clear(found, nodes) or self.clock() - started > _SECONDS:
                    break
        return found


def _summary(tables: Sequence[Mapping[str, float]]) -> dict[str, Timing]:
    names = [name for name in tables[0] if all(name in table for table in tables)]
    return {name: _timing([table[name] for table in tables]) for name in names}


def _timing(values: Sequence[float]) -> Timing:
    """The deviation is taken from the median absolute one, since what disturbs a run only ever makes it longer."""
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(np.asarray(values) - middle)))
    return Timing(median=middle, spread=2.0 * 1.2533 * deviation / len(values) ** 0.5)


def _clear(tables: Sequence[Mapping[str, Timing]], nodes: bool) -> bool:
    if len(tables) < 2:
        return True
    one, other = tables[0], tables[1]
    wanted = [n for n in one if n in other and (nodes or n == WHOLE)]
    return all(one[n].below(other[n]) or other[n].below(one[n]) or one[n] == other[n] for n in wanted)
