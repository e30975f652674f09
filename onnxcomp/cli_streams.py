"""What is printed of a stream's profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxcomp.cli_render import decimals, print_json, say, table

if TYPE_CHECKING:
    from onnxcomp.api import StreamProfile
    from onnxcomp.stream_profile import StreamStep

_SHOWN_STEPS = 24
"""Lines for the steps of a stream; longer ones are put together."""


def stream_profile(found: StreamProfile, as_json: bool) -> None:
    """Prints what the steps of a stream take: all of them, those of low and of high density, and one by one."""
    if as_json:
        print_json({**vars(found), "verdict": found.verdict})
        return
    sides = {"model": found.model, **({"baseline": found.baseline} if found.baseline else {})}
    table(
        ("", "p50 ms", "p90 ms", "ms a pass", "CPU ms a pass"),
        [
            (k, f"{v.p50:.3f}", f"{v.p90:.3f}", f"{v.passes.p50:.3f}", f"{v.passes.cpu_p50:.3f}")
            for k, v in sides.items()
        ],
    )
    parts = {"lowest": found.low, "highest": found.high}
    rows = [
        (
            f"quarter of {k} density",
            f"{len(v.steps)}",
            f"{v.density:.1%}",
            f"{v.model_ms:.3f}",
            decimals(v.baseline_ms, 3),
            decimals(v.ratio.median if v.ratio else None, 2),
        )
        for k, v in parts.items()
        if v
    ]
    if rows:
        table(("", "steps", "density", "model ms", "baseline ms", "ratio"), rows)
    size = -(-len(found.steps) // _SHOWN_STEPS)
    groups = [found.steps[i : i + size] for i in range(0, len(found.steps), size)]
    titles = ("step", "density", "of the state", "model ms", "baseline ms", "ratio", "error")
    table(titles, [_steps(g) for g in groups])
    if size > 1:
        say("of several steps the median; --json shows every step")
    say(
        f"{len(found.steps)} steps of {found.data}, {found.model.passes.samples} passes, mean density "
        f"{found.density:.1%}; {found.threads} thread(s) on {found.target}"
    )
    if found.verdict:
        say(found.verdict)


def _steps(group: Sequence[StreamStep]) -> tuple[str, ...]:
    """A line for one step, or for several that follow each other."""
    from statistics import median

    def middle(name: str, digits: int, factor: float = 1.0) -> str:
        values = [v for step in group if (v := getattr(step, name)) is not None]
        return decimals(factor * median(values) if values else None, digits)

    first, last = group[0].step, group[-1].step
    shares = (f"{text} %" if (text := middle(name, 1, 100.0)) else "" for name in ("density", "state_density"))
    times = (middle("model_ms", 3), middle("baseline_ms", 3), middle("ratio", 2), middle("error", 4))
    return str(first) if first == last else f"{first} - {last}", *shares, *times
