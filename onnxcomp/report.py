"""The report of a compression: what changed, what it cost, what it gained, and why. JSON, Markdown and HTML."""

from __future__ import annotations

import dataclasses
import enum
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxcomp import templates
from onnxcomp.compare import Fidelity
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import ModelSize
from onnxcomp.profile import Latency, Ratio, claim
from onnxcomp.rewrite import PassReport
from onnxcomp.target import Audit, NodeTime
from onnxcomp.templates.format import count, decibels, milliseconds, percent, printable, size, spread

REPORT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What is known of one of the two models.

    Attributes:
        path: The `.onnx` file.
        file_bytes: Its size with external data.
        size: Nodes, weights, multiply-accumulates.
        audit: What its compute nodes became on the target.
        latency: Of one run, measured interleaved with the other model; None if not measured.
        peak_memory: Peak resident bytes of a process that only runs it; None if not measured.
        node_times: Time by executed node.
    """

    path: str
    file_bytes: int
    size: ModelSize
    audit: Audit
    latency: Latency | None = None
    peak_memory: int | None = None
    node_times: tuple[NodeTime, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the measured times allow to claim.

    Attributes:
        kind: `same` when the difference is within the noise; `unknown` without a measurement.
        text: One sentence.
    """

    kind: Literal["faster", "slower", "same", "unknown"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the before-and-after table; a cell that does not apply is empty."""

    label: str
    before: str = ""
    after: str = ""
    change: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a compression found out.

    Attributes:
        recipe: Name of the recipe.
        target: Name of the target.
        threads: Threads a run.
        environment: Versions, CPU and its features.
        before: The original model.
        after: The rewritten model.
        passes: What each pass did and refused.
        fidelity: Of the rewritten model as executed, against the original.
        ratio: Time of the rewritten model over that of the original, of paired runs; None if not measured.
        calibration: What the calibration data is called; empty if there was none.
        calibration_samples: Number of calibration feeds.
        warnings: What the reader must know before believing the figures.
        artifact: Folder of the compiled model.
        recipe_source: TOML text of the recipe; empty if it was made in Python.
        metadata: Anything else worth keeping with the figures.
    """

    recipe: str
    target: str
    threads: int
    environment: Mapping[str, str]
    before: ModelReport
    after: ModelReport
    passes: tuple[PassReport, ...]
    fidelity: Fidelity | None
    ratio: Ratio | None = None
    calibration: str = ""
    calibration_samples: int = 0
    warnings: tuple[str, ...] = ()
    artifact: str = ""
    recipe_source: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """Whether the rewritten model is faster. Never calls a slower one faster, nor noise a difference."""
        where = f"{self.target}, {self.threads} thread{'s' * (self.threads != 1)}"
        if self.ratio is None:
            return Verdict(kind="unknown", text=f"latency was not compared on {where}: no claim about speed")
        kind = claim(self.ratio)
        if kind == "unknown":
            text = f"{self.ratio.rounds} paired runs on {where} are too few: no claim about speed"
            return Verdict(kind="unknown", text=text)
        times = f"{self.ratio.median:.2f}x"
        interval = f"{self.ratio.confidence:.0%} interval {self.ratio.low:.2f}-{self.ratio.high:.2f}"
        if kind == "slower":
            return Verdict(
                kind="slower",
                text=f"SLOWER: {self.recipe} takes {times} the time of the original ({interval}; {where})",
            )
        if kind == "faster":
            return Verdict(
                kind="faster",
                text=f"{self.recipe} runs in {times} of the time of the original ({interval}; {where})",
            )
        return Verdict(
            kind="same",
            text=f"no difference beyond noise: {times} the time of the original ({interval}; {where})",
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """`warnings`, and what follows from the figures themselves."""
        found = list(self.warnings)
        if self.after.audit.note:
            found.append(self.after.audit.note)
        if self.fidelity and self.fidelity.non_finite:
            names = ", ".join(self.fidelity.non_finite)
            found.append(f"NaN or infinity in outputs where the original has none: {names}")
        if self.fidelity and self.fidelity.seen_by_calibration:
            found.append("calibration saw the evaluation data: the fidelity is no claim about unseen data")
        if self.after.file_bytes > self.before.file_bytes:
            found.append("the rewritten model is larger than the original")
        return tuple(dict.fromkeys(found))

    def rows(self) -> tuple[Row, ...]:
        """The before-and-after table."""
        a, b = self.before, self.after
        rows = [
            _change("file size", a.file_bytes, b.file_bytes, size),
            _change("nodes", a.size.nodes, b.size.nodes, str),
            _change("multiply-accumulates", a.size.macs, b.size.macs, count),
            Row(
                label="of these in integers, as executed",
                before="unknown" if a.audit.note else percent(a.audit.integer_mac_share),
                after="unknown" if b.audit.note else percent(b.audit.integer_mac_share),
            ),
        ]
        if a.latency and b.latency:
            change = f"{self.ratio.median:.2f}x" if self.ratio else ""
            rows += [
                Row(label="latency p50 (p25-p90)", before=spread(a.latency), after=spread(b.latency), change=change),
                _change("CPU time p50", a.latency.cpu_p50, b.latency.cpu_p50, milliseconds),
            ]
        if a.peak_memory and b.peak_memory:
            rows.append(_change("peak memory", a.peak_memory, b.peak_memory, size))
        if self.fidelity:
            rows += _fidelity_rows(self.fidelity)
        return tuple(rows)

    def summary(self) -> str:
        """Plain text for a terminal, at most 100 columns wide."""
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False, legacy_windows=False)
        table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
        for title in ("before", "after", "change"):
            table.add_column(title, justify="right")
        for row in self.rows():
            table.add_row(*(Text(printable(t)) for t in (row.label, row.before, row.after, row.change)))
        with console.capture() as captured:
            console.print(table)
            for line in _lines(self):
                console.print(Text(printable(line)), overflow="fold")
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def _lines(report: Report) -> Iterator[str]:
    """What the summary says below the table."""
    yield report.verdict.text
    yield from (f"warning: {w}" for w in report.notices)
    if fallbacks := report.after.audit.fallbacks:
        yield f"{len(fallbacks)} quantized nodes of {len(report.after.audit.rows)} fall back to float:"
        for row in templates.by_macs(fallbacks)[:5]:
            yield f"  {row.node} ({row.op_type}): {row.reason or 'no reason known'}"
        if len(fallbacks) > 5:
            yield f"  and {len(fallbacks) - 5} more"
    for step in report.passes:
        refused = len(step.edits) - step.applied
        yield f"{step.name}: {step.applied} applied" + (f", {refused} refused" if refused else "")


def _change(label: str, before: float, after: float, show: Callable[[Any], str]) -> Row:
    return Row(label=label, before=show(before), after=show(after), change=f"{after / before:.2f}x" if before else "")


def _fidelity_rows(fidelity: Fidelity) -> Iterator[Row]:
    yield Row(label="SQNR, worst output", after=decibels(fidelity.worst_sqnr))
    agreements = [o.top1 for o in fidelity.outputs if o.top1 is not None]
    if agreements:
        yield Row(label="top-1 agreement", after=percent(min(agreements)))
    for name, after in fidelity.metric.items():
        before = fidelity.reference_metric[name]
        yield Row(label=name, before=f"{before:.4f}", after=f"{after:.4f}", change=f"{after - before:+.4f}")


def to_json(report: Report) -> str:
    """The report as JSON.

    The keys are the fields of `Report` and of what it holds, and besides: `report_version`, an integer that grows when
    a key changes its meaning or goes; `verdict`; `integer_mac_share` in an audit; `applied` and `refused` in a pass,
    whose `config` holds the keys of a recipe. Latencies are in milliseconds, times of nodes in microseconds, sizes in
    bytes. NaN and infinity, which JSON has not, are null.
    """
    table: dict[str, Any] = {"report_version": REPORT_VERSION, "verdict": plain(report.verdict), **plain(report)}
    for key, model in (("before", report.before), ("after", report.after)):
        table[key]["audit"]["integer_mac_share"] = plain(model.audit.integer_mac_share)
    for step, entry in zip(report.passes, table["passes"], strict=True):
        entry |= {"applied": step.applied, "refused": len(step.edits) - step.applied}
    return json.dumps(table, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def to_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    return templates.markdown(report)


def to_html(report: Report) -> str:
    """The report as one HTML page that loads nothing and needs no network."""
    return templates.html(report)


def write_report(report: Report, folder: str | os.PathLike[str]) -> None:
    """Writes `report.json`, `report.md` and `report.html`; each appears whole or not at all.

    Raises:
        OnnxcompError: If the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, render in (("json", to_json), ("md", to_markdown), ("html", to_html)):
            write_whole(folder / f"report.{suffix}", render(report))
    except OSError as error:
        raise OnnxcompError(f"cannot write the report to {folder}: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    content = text.encode("utf-8", "backslashreplace")
    with tempfile.TemporaryDirectory(prefix=".report.", dir=path.parent) as temporary:
        Path(temporary, "report").write_bytes(content)
        os.replace(Path(temporary, "report"), path)


def plain(value: Any) -> Any:
    """What JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
