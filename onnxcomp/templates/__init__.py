"""Renders a report, or another page, with the templates in this folder.

Names come from model files and are not trusted: HTML is escaped throughout, and the page forbids itself to load
anything or to run any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from onnxcomp import plots
from onnxcomp.rewrite import Edit
from onnxcomp.target import Audit, AuditRow, NodeTime
from onnxcomp.templates import format as text

if TYPE_CHECKING:
    from onnxcomp.report import Report

_FOLDER = Path(__file__).parent
_TOP = 12  # bars in a plot of times
_WORST = 5


def markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    return _environment(autoescape=False).get_template("report.md.jinja").render(_view(report)).strip() + "\n"


def html(report: Report) -> str:
    """The report as one HTML page."""
    view = _view(report)
    return page("report.html.jinja", {**view, "plots": _plots(view)})


def page(template: str, view: Mapping[str, Any]) -> str:
    """One HTML page that loads nothing, by a template of this folder, which gets to know whether plots can be drawn."""
    script = (_FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    shown = {**view, "can_plot": plots.available(), "script": script, "script_hash": f"sha256-{digest}", "style": style}
    return _environment(autoescape=True).get_template(template).render(shown)


def by_macs(rows: Iterable[AuditRow]) -> list[AuditRow]:
    """Audit rows, largest first."""
    return sorted(rows, key=lambda r: -r.macs)


def _environment(*, autoescape: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (text.size, text.count, text.milliseconds, text.spread, text.percent, text.decibels, text.significant)
    environment.filters |= {f.__name__: f for f in filters} | {"cell": _cell, "code": _code}
    return environment


def _view(report: Report) -> dict[str, Any]:
    """What the templates need besides the report itself."""
    layers = report.fidelity.layers if report.fidelity else ()
    rows = report.after.audit.rows
    return {
        "report": report,
        "rows": report.rows(),
        "verdict": report.verdict,
        "notices": report.notices,
        "shares": {"before": _shares(report.before.audit), "after": _shares(report.after.audit)},
        "audit": by_macs(report.after.audit.fallbacks) + by_macs(r for r in rows if r.integer or not r.quantized),
        "layers": layers,
        "worst": sorted(enumerate(layers, 1), key=lambda item: item[1].sqnr)[:_WORST],
        "op_times": _op_times(report.before.node_times, report.after.node_times),
        "slowest": {"before": _slowest(report.before.node_times), "after": _slowest(report.after.node_times)},
        "steps": [(step, _groups(step.edits, "refused"), _groups(step.edits, "applied")) for step in report.passes],
    }


def _plots(view: Mapping[str, Any]) -> dict[str, str]:
    """Pictures as SVG, empty for what was not measured or cannot be drawn."""
    found = {"layers": "", "ops": "", "nodes": ""}
    if not plots.available():
        return found
    if view["layers"]:
        marked = [layer for _, layer in view["worst"]][: len(view["layers"]) // 4]
        found["layers"] = plots.layers(view["layers"], marked)
    if view["op_times"]:
        found["ops"] = plots.op_times(view["op_times"])
        found["nodes"] = plots.node_times(view["slowest"]["before"], view["slowest"]["after"])
    return found


def _shares(audit: Audit) -> dict[str, float]:
    """Shares of the multiply-accumulates: in integers, quantized but in float, and in float as asked."""
    total = sum(r.macs for r in audit.rows)
    fallback = sum(r.macs for r in audit.fallbacks) / total if total else 0.0
    return {"integer": audit.integer_mac_share, "fallback": fallback, "total": total}


def _op_times(before: Sequence[NodeTime], after: Sequence[NodeTime]) -> dict[str, tuple[float, float]]:
    """Time by op type before and after, largest first; those below 1 % of both together."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for side, times in enumerate((before, after)):
        for t in times:
            sums[t.op_type][side] += t.microseconds
    ordered = sorted(sums.items(), key=lambda item: -max(item[1]))
    totals = [max(sum(t[side] for t in sums.values()), 1e-9) for side in (0, 1)]
    shown = sum(a >= 0.01 * totals[0] or b >= 0.01 * totals[1] for _, (a, b) in ordered[:_TOP])
    found = {op: (a, b) for op, (a, b) in ordered[:shown]}
    if rest := [times for _, times in ordered[shown:]]:
        found[f"{len(rest)} other op types"] = (sum(t[0] for t in rest), sum(t[1] for t in rest))
    return found


def _slowest(times: Sequence[NodeTime]) -> list[NodeTime]:
    return sorted(times, key=lambda t: -t.microseconds)[:_TOP]


def _groups(edits: Sequence[Edit], action: str) -> list[tuple[str, list[Edit]]]:
    """Edits of one kind by what was done or why not, the most frequent first."""
    groups: dict[str, list[Edit]] = defaultdict(list)
    for edit in edits:
        if edit.action == action:
            groups[edit.detail].append(edit)
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _cell(value: object) -> str:
    """Text for a cell of a Markdown table: nothing in it may end the cell, start a tag, a link or emphasis."""
    escaped = text.printable(str(value).replace("\n", " ")).replace("&", "&amp;").replace("<", "&lt;")
    for character in "\\`*_[]|":
        escaped = escaped.replace(character, f"\\{character}")
    return escaped


def _code(value: object) -> str:
    """A name as a Markdown code span that is safe inside a table."""
    plain = text.printable(str(value)).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`" if plain.strip() else ""
