"""Tuning: schedules for the loops that TVM makes itself, searched by measurement on this machine's CPU.

Only functions for which there is no kernel of ours are searched for, and of them those with arithmetic worth it. The
search (TVM's MetaSchedule) runs in a process of its own, which is ended when the time is over. Results are kept in the
user's cache by workload, so that the next model that calls the same function needs no measurement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What is asked for.

    Attributes:
        seconds: Most seconds of wall-clock time to measure for; at 0, only what was kept is used.
        progress: Told what is measured, and how many of the seconds are over.
        trials: Most schedules to measure for one function.
    """

    seconds: float
    progress: Callable[[str, int, int | None], None] | None = None
    trials: int = 512
