"""What the verbs print: tables for people, JSON for machines, and progress meanwhile."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from onnxcomp.api import (
        Inspection,
        Legalization,
        Profile,
        RewriteResult,
    )
    from onnxcomp.break_even import BreakEven
    from onnxcomp.compare import Fidelity
    from onnxcomp.doctor import Diagnosis
    from onnxcomp.profile import Ratio
    from onnxcomp.rewrite import PassReport, Progress
    from onnxcomp.target import Artifact
    from onnxcomp.verbs.results import GroupImpact, Impact, LayerImpact, PatternUse


@contextmanager
def working(as_json: bool) -> Iterator[Progress | None]:
    """Yields what tells progress: a bar on stderr as long as the block runs, None where stderr is no terminal.

    With `as_json`, whatever is printed inside (by a user's data function, by torch) goes to stderr.
    """
    with ExitStack() as stack:
        if as_json:
            stack.enter_context(redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():  # what rich asks can be overruled by the environment
            yield None
            return
        from rich import progress as bars

        shown = stack.enter_context(
            bars.Progress(
                bars.SpinnerColumn(), bars.TextColumn("{task.description}", markup=False), bars.BarColumn(),
                bars.MofNCompleteColumn(), bars.TimeElapsedColumn(), console=Console(stderr=True),
                transient=True,
            )
        )  # fmt: skip
        task = shown.add_task("", total=None)

        def told(text: str, done: int, total: int | None) -> None:
            shown.update(task, description=text, completed=done, total=total)

        yield told


def message(error: BaseException) -> str:
    """The text of an error, without control characters that a name in a model may hold."""
    return "\n".join(map(_printable, str(error).splitlines())) or type(error).__name__


def notice(text: str) -> str:
    """What is told before long work, without control characters that a name in a model may hold."""
    return _printable(text)


def warn_of_random(data: str | None) -> None:
    """Says so on stderr where figures will be those of random inputs."""
    if data == "random":
        typer.echo("warning: random data: ranges and fidelity say nothing about real inputs", err=True)


def show(value: Any, as_json: bool) -> None:
    """Prints a dataclass."""
    if as_json:
        print_json(value)
        return
    for name, item in vars(value).items():
        say(f"{name}: {item}")


def names(found: Mapping[str, str], as_json: bool) -> None:
    """Prints names with their summaries."""
    if as_json:
        print_json(found)
    else:
        table(("name", "what it is"), list(found.items()))


def checks(found: Sequence[Diagnosis], as_json: bool) -> None:
    """Prints what the doctor found."""
    if as_json:
        print_json(found)
    else:
        table(("", "state", "found", "to fix"), [(c.name, c.state, c.value, c.fix) for c in found])


def inspection(found: Inspection, as_json: bool) -> None:
    """Prints what a model is made of."""
    if as_json:
        print_json(found)
        return
    size = found.size
    rows = [
        ("file", f"{found.path} ({_size(found.file_bytes)})"),
        ("opset", str(found.opset)),
        ("producer", found.producer),
        *((f"input {k}", v) for k, v in found.inputs.items()),
        *((f"output {k}", v) for k, v in found.outputs.items()),
        ("dynamic", ", ".join(f"{k} axis {a}" for k, axes in found.dynamic.items() for a in axes) or "nothing"),
        ("kind", str(found.kind)),
        ("nodes", str(size.nodes)),
        ("parameters", f"{size.parameters:,}"),
        ("weights", _size(size.weight_bytes)),
        ("multiply-accumulates", f"{size.macs:,}" if size.macs else "unknown; fix shapes with --input"),
        ("ops", ", ".join(f"{k} {v}" for k, v in size.ops.items())),
    ]
    table(("", ""), rows)
    if found.patterns:
        _patterns(found.patterns)
    if found.selected is not None:
        table(("node", "op", "module"), list(found.selected))
        say(f"{len(found.selected)} of {size.nodes} nodes selected")


def _patterns(found: Sequence[PatternUse]) -> None:
    plural = {"matrix": "matrices", "convolution": "convolutions"}
    rows = [
        (
            use.pattern,
            f"{use.weights} {use.kind if use.weights == 1 else plural[use.kind]}",
            _size(use.stored_bytes),
            _size(use.packed_bytes),
            _size(use.int8_bytes),
        )
        for use in found
    ]
    table(("zeros", "weights", "stored", "packed", "packed as int8"), rows)
    if any(use.kind == "convolution" for use in found):
        say("the pass nm_pack packs matrices; nothing packs convolutions")


def rewrite_result(result: RewriteResult, as_json: bool) -> None:
    """Prints what a rewrite did and refused."""
    if as_json:
        print_json({name: value for name, value in vars(result).items() if name != "model"})
        return
    _passes(result.passes)
    say(f"wrote {result.path}" if result.path else "dry run: nothing was written")


def legalization(found: Legalization, as_json: bool) -> None:
    """Prints what was done to a quantized model, and what runs on integers before and after."""
    audits = {"before": found.before, "after": found.after}
    if as_json:
        shares = {name: {"integer_mac_share": audit.integer_mac_share} for name, audit in audits.items()}
        shown = {name: value for name, value in vars(found).items() if name != "model"}
        print_json({**shown, **{k: {**vars(audits[k]), **v} for k, v in shares.items()}, "accepted": found.accepted})
        return
    _passes(found.passes)
    for name, audit in audits.items():
        if audit.note:
            say(f"{name}: {audit.note}")
            continue
        share = f"{audit.integer_mac_share:.1%}" if any(row.macs for row in audit.rows) else "an unknown share"
        say(
            f"{name}: {sum(row.integer for row in audit.rows)} of {len(audit.rows)} linear nodes run on integers on "
            f"{found.target}, {share} of MACs; {len(audit.fallbacks)} are quantized and run in float"
        )
        if audit.fallbacks:
            table(("node", "op", "why in float"), [(r.node, r.op_type, r.reason) for r in audit.fallbacks])
    _ratio("after / before", found.ratio)
    if found.refused_sqnr is not None:
        text = f"SQNR was {found.refused_sqnr:.1f} dB to the original otherwise, which a lower --min-sqnr takes"
        say(f"every integer was kept, as with --exact: {text}")
    if found.runtime.worst_sqnr < found.min_sqnr:
        say(
            f"before: the runtime's optimizer changes this model's outputs: SQNR {found.runtime.worst_sqnr:.1f} dB on "
            f"{found.target} to what the file says"
        )
    same = found.fidelity
    say(f"outputs: SQNR {same.worst_sqnr:.1f} dB to the original ({same.samples} samples of {same.data})")
    if found.to_reference:
        before, after = (found.to_reference[name].worst_sqnr for name in ("before", "after"))
        say(f"outputs: SQNR {before:.1f} dB before and {after:.1f} dB after, to {found.reference}")
    if found.accepted:
        say(f"wrote {found.path}" if found.path else "dry run: nothing was written")


def not_legalized(found: Legalization) -> str:
    """Why a legalized model was not written."""
    text = f"SQNR is {found.fidelity.worst_sqnr:.1f} dB, below --min-sqnr {found.min_sqnr}"
    if found.to_reference:
        before, after = (found.to_reference[name].worst_sqnr for name in ("before", "after"))
        text += f", and {after:.1f} dB to {found.reference}, where the original has {before:.1f} dB"
    return f"{text}; nothing was written"


def _passes(reports: Sequence[PassReport]) -> None:
    for step in reports:
        refused = [e for e in step.edits if e.action == "refused"]
        say(f"{step.name}: {step.applied} applied, {len(refused)} refused, {step.seconds:.1f} s")
        if step.edits:
            table(("", "node", "op", "what"), [(e.action, e.node, e.op_type, e.detail) for e in step.edits])


def _ratio(what: str, found: Ratio | None) -> None:
    if found:
        interval = f"{found.confidence:.0%} interval {found.low:.3f}-{found.high:.3f}"
        say(f"{what}: {found.median:.3f} ({interval}, {found.rounds} rounds)")


def break_even(found: Sequence[BreakEven], as_json: bool) -> None:
    """Prints from which sparsity on sparse kernels pay: a line a kernel and shape, a column a number of rows."""
    if as_json:
        print_json(found)
        return
    rows = sorted({e.rows for e in found})
    lines: dict[tuple[str, ...], dict[int, str]] = {}
    for entry in found:
        key = (entry.op, entry.weights, entry.dense, f"{entry.inputs}x{entry.outputs}")
        lines.setdefault(key, {})[entry.rows] = "never" if entry.sparsity >= 1 else f"{entry.sparsity:.0%}"
    header = ("op", "weights", "against", "shape", *(f"{r} row{'s' * (r > 1)}" for r in rows))
    table(header, [(*key, *(cells.get(r, "") for r in rows)) for key, cells in lines.items()])
    say("faster than dense from these shares of dropped inputs (nm_matmul: zero weights) on; kept for this machine")


def artifact(found: Artifact, as_json: bool) -> None:
    """Prints the audit of an artifact."""
    if as_json:
        print_json({"path": str(found.path), "manifest": found.manifest})
        return
    rows = found.audit.rows
    if found.audit.note:
        say(f"{found.audit.note}; artifact in {found.path}")
        return
    table(
        ("node", "op", "executed as", "MACs", "note"),
        [(r.node, r.op_type, r.executed_as or "?", f"{r.macs:,}", r.reason) for r in rows],
    )
    if tuned := found.manifest.get("tuning"):
        table(
            ("tuned", "calls", "schedules", "us before", "us after", "note"),
            [
                (
                    t["function"],
                    str(t["calls"]),
                    str(t["trials"]),
                    decimals(t["before_us"], 1),
                    decimals(t["after_us"], 1),
                    t["note"],
                )
                for t in tuned
            ],
        )
    say(f"{found.audit.integer_mac_share:.1%} of MACs run on integers; artifact in {found.path}")


def profile(found: Profile, as_json: bool) -> None:
    """Prints latencies."""
    if as_json:
        print_json(found)
        return
    table(
        ("", "p50 ms", "p90 ms", "p99 ms", "CPU p50 ms", "runs"),
        [
            (k, f"{v.p50:.3f}", f"{v.p90:.3f}", f"{v.p99:.3f}", f"{v.cpu_p50:.3f}", str(v.samples))
            for k, v in found.latency.items()
        ],
    )
    _ratio("model / baseline", found.ratio)
    say(f"peak memory {_size(found.peak_memory)}; {found.threads} thread(s) on {found.target}")
    if found.carries_state:
        say("the model carries state: one feed over and over is no stream; give a sequence with --stream")
    slowest = sorted(found.node_times, key=lambda n: -n.microseconds)[:10]
    table(("slowest nodes", "op", "us"), [(n.node, n.op_type, f"{n.microseconds:.1f}") for n in slowest])


def fidelity(found: Fidelity, as_json: bool) -> None:
    """Prints a comparison."""
    if as_json:
        print_json(found)
        return
    table(
        ("output", "SQNR dB", "cosine", "max error", "top-1 agreement", "KL"),
        [
            (o.name, f"{o.sqnr:.2f}", f"{o.cosine:.6f}", f"{o.max_error:.3g}", _optional(o.top1), _optional(o.kl))
            for o in found.outputs
        ],
    )
    for name, value in found.metric.items():
        say(f"{name}: {found.reference_metric[name]:.4f} -> {value:.4f}")
    worst = sorted(found.layers, key=lambda layer: layer.sqnr)[:10]
    if worst:
        table(("worst layers", "op", "SQNR dB"), [(w.node, w.op_type, f"{w.sqnr:.1f}") for w in worst])
    say(f"{found.samples} samples of {found.data}")


def sensitivity(found: Impact, as_json: bool) -> None:
    """Prints what each block and each layer costs, the costliest first."""
    if as_json:
        print_json(found)
        return
    titles = ("SQNR dB", "by Jacobian", "top-1 moved", "us float", "us integer")
    if found.groups:
        table(("block alone", "ops", *titles), [(x.name, f"{x.layers}", *_impact(x)) for x in found.groups])
        say("")
    rows = [(x.node, x.op_type, *_impact(x)) for x in found.layers]
    table(("quantized alone", "op", *titles), rows)
    say(
        f"all {len(rows)} together: SQNR {found.sqnr:.1f} dB, top-1 moved in {found.flips:.0%} of "
        f"{found.samples} samples ({found.target})"
    )


def _impact(row: LayerImpact | GroupImpact) -> tuple[str, ...]:
    times = (_microseconds(t) for t in (row.float_microseconds, row.integer_microseconds))
    return f"{row.sqnr:.1f}", f"{row.weighted_sqnr:.1f}", f"{row.flips:.0%}", *times


def _microseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def decimals(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; without titles there is no line for them."""
    shown = Table(*titles, box=None, pad_edge=False, show_header=any(titles))
    for row in rows:
        shown.add_row(*(Text(_printable(str(cell)), overflow="fold") for cell in row))
    _console().print(shown)


def say(text: str) -> None:
    """Prints a line."""
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


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    from onnxcomp.report import plain

    sys.stdout.write(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()  # here, where the command line knows what to do when nobody reads it
