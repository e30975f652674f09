"""What the verbs print: tables for people, JSON for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onnxcomp.api import Inspection, Profile, RewriteResult
    from onnxcomp.compare import Fidelity
    from onnxcomp.doctor import Diagnosis
    from onnxcomp.target import Artifact


def message(error: BaseException) -> str:
    """The text of an error, without control characters that a name in a model may hold."""
    return "\n".join(map(_printable, str(error).splitlines())) or type(error).__name__


def show(value: Any, as_json: bool) -> None:
    """Prints a dataclass."""
    if as_json:
        _json(value)
        return
    for name, item in vars(value).items():
        _print(f"{name}: {item}")


def names(found: Mapping[str, str], as_json: bool) -> None:
    """Prints names with their summaries."""
    if as_json:
        _json(found)
    else:
        _table(("name", "what it is"), list(found.items()))


def checks(found: Sequence[Diagnosis], as_json: bool) -> None:
    """Prints what the doctor found."""
    if as_json:
        _json(found)
    else:
        _table(("", "state", "found", "to fix"), [(c.name, c.state, c.value, c.fix) for c in found])


def inspection(found: Inspection, as_json: bool) -> None:
    """Prints what a model is made of."""
    if as_json:
        _json(found)
        return
    size = found.size
    rows = [
        ("file", f"{found.path} ({_size(found.file_bytes)})"),
        ("opset", str(found.opset)),
        ("producer", found.producer),
        *((f"input {k}", v) for k, v in found.inputs.items()),
        *((f"output {k}", v) for k, v in found.outputs.items()),
        ("dynamic", ", ".join(f"{k} axis {a}" for k, axes in found.dynamic.items() for a in axes) or "nothing"),
        ("nodes", str(size.nodes)),
        ("parameters", f"{size.parameters:,}"),
        ("weights", _size(size.weight_bytes)),
        ("multiply-accumulates", f"{size.macs:,}" if size.macs else "unknown; fix shapes with --input"),
        ("ops", ", ".join(f"{k} {v}" for k, v in size.ops.items())),
    ]
    _table(("", ""), rows)
    if found.selected is not None:
        _table(("node", "op", "module"), list(found.selected))
        _print(f"{len(found.selected)} of {size.nodes} nodes selected")


def rewrite_result(result: RewriteResult, as_json: bool) -> None:
    """Prints what a rewrite did and refused."""
    if as_json:
        _json({"path": result.path and str(result.path), "before": result.before, "passes": result.passes})
        return
    for step in result.passes:
        refused = [e for e in step.edits if e.action == "refused"]
        _print(f"{step.name}: {step.applied} applied, {len(refused)} refused, {step.seconds:.1f} s")
        _table(("", "node", "op", "what"), [(e.action, e.node, e.op_type, e.detail) for e in step.edits])
    _print(f"wrote {result.path}" if result.path else "dry run: nothing was written")


def artifact(found: Artifact, as_json: bool) -> None:
    """Prints the audit of an artifact."""
    if as_json:
        _json({"path": str(found.path), "manifest": found.manifest})
        return
    rows = found.audit.rows
    _table(
        ("node", "op", "executed as", "MACs", "note"),
        [(r.node, r.op_type, r.executed_as or "?", f"{r.macs:,}", r.reason) for r in rows],
    )
    _print(f"{found.audit.integer_mac_share:.1%} of MACs run on integers; artifact in {found.path}")


def profile(found: Profile, as_json: bool) -> None:
    """Prints latencies."""
    if as_json:
        _json(found)
        return
    _table(
        ("", "p50 ms", "p90 ms", "p99 ms", "CPU p50 ms", "runs"),
        [
            (k, f"{v.p50:.3f}", f"{v.p90:.3f}", f"{v.p99:.3f}", f"{v.cpu_p50:.3f}", str(v.samples))
            for k, v in found.latency.items()
        ],
    )
    if found.ratio:
        r = found.ratio
        _print(
            f"model / baseline: {r.median:.3f} "
            f"({r.confidence:.0%} interval {r.low:.3f}-{r.high:.3f}, {r.rounds} rounds)"
        )
    _print(f"peak memory {_size(found.peak_memory)}; {found.threads} thread(s) on {found.target}")
    slowest = sorted(found.node_times, key=lambda n: -n.microseconds)[:10]
    _table(("slowest nodes", "op", "us"), [(n.node, n.op_type, f"{n.microseconds:.1f}") for n in slowest])


def fidelity(found: Fidelity, as_json: bool) -> None:
    """Prints a comparison."""
    if as_json:
        _json(found)
        return
    _table(
        ("output", "SQNR dB", "cosine", "max error", "top-1 agreement", "KL"),
        [
            (o.name, f"{o.sqnr:.2f}", f"{o.cosine:.6f}", f"{o.max_error:.3g}", _optional(o.top1), _optional(o.kl))
            for o in found.outputs
        ],
    )
    for name, value in found.metric.items():
        _print(f"{name}: {found.reference_metric[name]:.4f} -> {value:.4f}")
    worst = sorted(found.layers, key=lambda layer: layer.sqnr)[:10]
    if worst:
        _table(("worst layers", "op", "SQNR dB"), [(w.node, w.op_type, f"{w.sqnr:.1f}") for w in worst])
    _print(f"{found.samples} samples of {found.data}")


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(*titles, box=None, pad_edge=False, show_header=any(titles))
    for row in rows:
        table.add_row(*(Text(_printable(str(cell)), overflow="fold") for cell in row))
    _console().print(table)


def _print(text: str) -> None:
    _console().print(Text(_printable(text)), soft_wrap=True)


def _console() -> Console:
    """Lines are broken for a terminal only: what reads a pipe wants one row a line."""
    return Console() if sys.stdout.isatty() else Console(width=10_000, color_system=None)


def _printable(text: str) -> str:
    from onnxcomp.templates.format import printable

    return printable(text)


def _size(value: float) -> str:
    from onnxcomp.templates.format import size

    return size(value)


def _json(value: Any) -> None:
    from onnxcomp.report import plain

    sys.stdout.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()  # here, where the command line knows what to do when nobody reads it
