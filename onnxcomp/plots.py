"""Plots of a report as inline SVG. The only module that imports matplotlib, and only when a plot is drawn.

Text and axes are drawn in the colour of the surrounding text and the background is left out, so that one picture suits
a light and a dark page. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from onnxcomp.compare import LayerFidelity
from onnxcomp.target import NodeTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEFORE = "#8f99a6"
AFTER = "#3f8fd2"
WORST = "#e08a2b"
_INK = "#010203"  # stands for the colour of the text around the picture
_NAMED = 28  # layers up to which every one is named
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
