"""Plots of a report, of a sparsity profile and of a stream as inline SVG.

The only module that imports matplotlib, and only when a plot is drawn. Text and axes are drawn in the colour of
the surrounding text and the background is left out, so that one picture suits a light and a dark page. The same input
gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from onnxcomp.compare import LayerFidelity
from onnxcomp.target import NodeTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

BEFORE = "#8f99a6"
AFTER = "#3f8fd2"
WORST = "#e08a2b"
_INK = "#010203"  # stands for the colour of the text around the picture
_BLEND = "#e08a2b", "#d0567c", "#8f62c0", "#3f8fd2", "#3fb59a"  # from the first to the last, readable on light and dark
_NAMED = 28  # layers up to which every one is named
_LEGEND = 6  # blocks that are named beside curves
_FAR = 1.2  # times the marked perplexity: points beyond would flatten what is around it
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def layers(found: Sequence[LayerFidelity], worst: Sequence[LayerFidelity]) -> str:
    """SQNR of every layer in execution order, those in `worst` in another colour; few layers are named."""
    values = [min(max(layer.sqnr, -20.0), 100.0) for layer in found]
    colors = [WORST if layer in worst else AFTER for layer in found]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if len(found) <= _NAMED:
            _bars(axes, [layer.node or layer.value for layer in found], [(values, colors, "")])
            axes.set_xlabel("SQNR in dB")
        else:
            axes.bar(range(1, len(found) + 1), values, width=0.8, color=colors)
            axes.set_xlim(0, len(found) + 1)
            axes.set_xlabel("layer, in execution order")
            axes.set_ylabel("SQNR in dB")
            axes.grid(axis="y")

    return _svg("layers", draw, 0.8 + 0.22 * len(found) if len(found) <= _NAMED else 3.0)


def op_times(times: Mapping[str, tuple[float, float]]) -> str:
    """Microseconds by op type before and after."""
    before, after = [t[0] for t in times.values()], [t[1] for t in times.values()]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _bars(axes, list(times), [(before, BEFORE, "before"), (after, AFTER, "after")])
        axes.set_xlabel("time in µs a run")
        axes.legend(loc="lower right")

    return _svg("ops", draw, 0.9 + 0.36 * len(times))


def node_times(before: Sequence[NodeTime], after: Sequence[NodeTime]) -> str:
    """Microseconds of the nodes given, before and after, on one scale."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 1, sharex=True, height_ratios=[max(1, len(before)), max(1, len(after))])
        sides = (before, BEFORE, "before"), (after, AFTER, "after")
        for axes, (nodes, color, title) in zip(panels, sides, strict=True):
            labels = [f"{_short(n.node)} ({n.op_type})" for n in nodes]
            _bars(axes, labels, [([n.microseconds for n in nodes], color, "")])
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
        panels[1].set_xlabel("time in µs a run")

    return _svg("nodes", draw, 1.5 + 0.21 * (len(before) + len(after)))


def densities(series: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Shares of firing neurons by block: a mean, and a bar from a low to a high percentile.

    Args:
        series: At most two, by what they are: `(mean, low, high)` of every block in order.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        shifts = [0.0] if len(series) == 1 else [-0.12, 0.12]
        for (label, found), shift, color in zip(series.items(), shifts, (BEFORE, AFTER), strict=False):
            means = [mean for mean, _, _ in found]
            # A mean may lie outside of the percentiles.
            below, above = [max(0.0, m - low) for m, low, _ in found], [max(0.0, high - m) for m, _, high in found]
            places = [i + shift for i in range(1, len(found) + 1)]
            axes.errorbar(places, means, (below, above), fmt="o", ms=4.5, lw=1.4, capsize=2, color=color, label=label)
        _blocks_along(axes, max(map(len, series.values())))
        _shares(axes.yaxis)
        axes.set_ylim(-0.02, 1.04)
        axes.set_ylabel("neurons that fire")
        axes.grid(axis="y")
        figure.legend(loc="outside upper left", ncols=2)

    return _svg("densities", draw, 3.3)


def firing_rates(panels: Mapping[str, Sequence[Sequence[int]]], intervals: Sequence[str]) -> str:
    """Neurons of every block by how often they fire, one stacked bar a block.

    Args:
        panels: By title: for every block in order, the number of neurons in each interval.
        intervals: What the intervals are.
    """
    colors = _blend(len(intervals))

    def draw(figure: Figure) -> None:
        for axes, (title, blocks) in zip(
            figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels.items(), strict=True
        ):
            bottoms = [0.0] * len(blocks)
            for i, color in enumerate(colors):
                heights = [counts[i] / max(1, sum(counts)) for counts in blocks]
                axes.bar(range(1, len(blocks) + 1), heights, 0.86, bottoms, color=color)
                bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
            axes.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
            _shares(axes.yaxis)
            axes.set_ylim(0.0, 1.0)
            axes.set_ylabel("neurons")
        _blocks_along(axes, len(blocks))
        figure.legend(axes.containers, intervals, loc="outside upper left", ncols=6, title="fire for", alignment="left")

    return _svg("firing", draw, 0.9 + 2.2 * len(panels))


def tail_errors(shares: Sequence[float], curves: Sequence[Sequence[float]], level: float) -> str:
    """Tail error against the share of dropped neurons: one curve a block, in order, and a level."""
    colors = _blend(len(curves))
    named = {round(i * (len(curves) - 1) / max(1, _LEGEND - 1)) for i in range(_LEGEND)}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(level, color=_INK, lw=1.0, ls=(0, (4, 3)), label=f"tail error {level:g}")
        for i, (curve, color) in enumerate(zip(curves, colors, strict=True)):
            axes.plot(shares, curve, lw=1.2, color=color, label=f"block {i + 1}" if i in named else None)
        _shares(axes.xaxis)
        axes.set_xlim(0.0, 1.0)
        axes.set_ylim(bottom=0.0)
        axes.set_xlabel("dropped neurons")
        axes.set_ylabel("tail error (CETT)")
        axes.grid()
        axes.legend(loc="upper left")

    return _svg("tails", draw, 3.6)


def perplexities(points: Sequence[tuple[float, float]], limit: float, share: float | None) -> str:
    """Perplexity against the share of dropped neurons, the first point without any; far ones are cut off.

    Args:
        points: `(share, perplexity)` by rising share.
        limit: A perplexity to mark.
        share: Share at which the limit is met, if that is known.
    """
    found = [perplexity for _, perplexity in points if math.isfinite(perplexity)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(limit, color=WORST, lw=1.2, ls=(0, (4, 3)), label="1 % more perplexity")
        if share is not None:
            axes.axvline(share, color=WORST, lw=0.8, label=f"{100 * share:.1f} % dropped")
        axes.plot(*zip(*points, strict=True), "o-", ms=4.5, lw=1.4, color=AFTER)
        low, high = min(found, default=limit), max(found, default=limit)
        high = max(limit, min(high, _FAR * limit))
        room = 0.08 * max(high - low, 1e-6 * limit)
        axes.set_ylim(low - room, high + room)
        _shares(axes.xaxis)
        axes.set_xlabel("dropped neurons, mean over the blocks")
        axes.set_ylabel("perplexity")
        axes.grid()
        axes.legend(loc="upper left")

    return _svg("perplexities", draw, 3.2)


def stream(
    densities: Mapping[str, Sequence[float | None]],
    times: Mapping[str, Sequence[float]],
    errors: Sequence[float | None] = (),
) -> str:
    """Shares of what changed in every step of a stream, below what the steps took, and the error if it is known.

    Args:
        densities: At most two, by what changed; None where it is not known.
        times: Milliseconds by model, the one in question last.
        errors: Relative errors of the outputs.
    """
    known = any(error is not None for error in errors)

    def draw(figure: Figure) -> None:
        above, below, *last = figure.subplots(2 + known, 1, sharex=True, height_ratios=[2, 3, 2][: 2 + known])
        for (label, shares), color in zip(densities.items(), (AFTER, WORST), strict=False):
            above.plot([math.nan if share is None else share for share in shares], lw=1.2, color=color, label=label)
        _shares(above.yaxis)
        above.set_ylim(0.0, 1.02)
        above.set_ylabel("changed elements")
        for (label, found), color in zip(times.items(), (BEFORE, AFTER)[-len(times) :], strict=True):
            below.plot(found, lw=1.2, color=color, label=label)
        below.set_ylim(bottom=0.0)
        below.set_ylabel("ms a step")
        for axes in last:
            axes.plot([math.nan if e is None else e for e in errors], lw=1.2, color=AFTER)
            axes.set_ylim(bottom=0.0)
            axes.set_ylabel("relative error")
            axes.grid()
        (last or [below])[-1].set_xlabel("step")
        for axes in (above, below):
            axes.grid()
            axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0.2)

    return _svg("stream", draw, 5.6 if known else 4.2)


def _blocks_along(axes: Axes, count: int) -> None:
    axes.set_xlim(0.4, max(count, 8) + 0.6)  # few blocks keep to bars of a common width
    axes.set_xticks(range(1, count + 1, -(-count // 15)))
    axes.set_xlabel("block, in order")


def _shares(axis: Axis) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def _blend(count: int) -> list[Any]:
    """Colours from the first to the last of so many."""
    from matplotlib.colors import LinearSegmentedColormap

    return list(LinearSegmentedColormap.from_list("blend", _BLEND)([i / max(1, count - 1) for i in range(count)]))


def _bars(axes: Axes, labels: Sequence[str], series: Sequence[tuple[Sequence[float], Any, str]]) -> None:
    """Horizontal bars, the first label on top."""
    height = 0.76 / len(series)
    for i, (values, color, label) in enumerate(series):
        offset = (i - (len(series) - 1) / 2) * height
        places = [y + offset for y in range(len(values))]
        drawn = axes.barh(places, values, height=height * 0.94, color=color, label=label)
        axes.bar_label(drawn, labels=[_number(v) if v else "" for v in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(labels)), [_short(label, 58) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.09)
    axes.grid(axis="x")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _short(name: str, length: int = 44) -> str:
    """The end of a long name, which tells more than its start; fonts at hand may not have more than ASCII."""
    name = name.encode("ascii", "replace").decode()
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= length else f"...{name[3 - length :]}"


def _svg(name: str, draw: Callable[[Figure], None], height: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layout; a report must not fail on it
        mpl.rcdefaults()  # the user's style would change the report
        style: Any = {**_STYLE, "svg.hashsalt": name}
        mpl.rcParams.update(style)
        figure = Figure(figsize=(9.0, height), layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = svg.replace(_INK, "currentColor")
    # Several pictures stand in one page: their ids must not meet.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return svg.strip()
