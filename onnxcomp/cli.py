"""The command line: one thin function a verb over `onnxcomp.api`.

Exit codes: 0 done; 2 wrong usage, or an `OnnxcompError`; 3 a gate (`--max-drop`, `--min-sqnr`) failed; 130 interrupted.
Results go to stdout; messages, warnings and progress to stderr. `ONNXCOMP_DEBUG=1` adds the traceback to an error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxcomp import __version__, cli_render
from onnxcomp.cli_options import (
    CheckLevel,
    DataSource,
    DryRun,
    Inputs,
    Json,
    MaxDrop,
    MetricName,
    MinSqnr,
    Model,
    Output,
    RecipeName,
    Rounds,
    Samples,
    Seconds,
    Seed,
    TargetName,
    Threads,
    Tolerance,
    selector,
    shapes,
)
from onnxcomp.cli_options import check as check_level
from onnxcomp.errors import OnnxcompError, RecipeError

if TYPE_CHECKING:
    from onnxcomp.rewrite import Progress

app = typer.Typer(
    name="onnxcomp",
    help="Hardware-portable compression of ONNX models, measured where they run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def export(
    factory: Annotated[str, typer.Argument(help="module:function that returns a torch module and example inputs.")],
    output: Output,
    opset: Annotated[int, typer.Option("--opset")] = 20,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first dimension open.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare the outputs with those of torch.")] = True,
    rtol: Tolerance = 1e-4,
    atol: Tolerance = 1e-4,
    as_json: Json = False,
) -> None:
    """Export a torch module with the dynamo exporter and check it against torch."""
    from onnxcomp import api

    with _working(as_json):
        result = api.export(
            factory, output, opset=opset, dynamic_batch=dynamic_batch, check=check, rtol=rtol, atol=atol
        )
    cli_render.show(result, as_json)


@app.command()
def inspect(
    model: Model,
    select: Annotated[
        list[str] | None, typer.Option("--select", help="op=, name=, module= or skip= and a pattern. May be repeated.")
    ] = None,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Show what a model is made of, and which nodes a selector takes."""
    from onnxcomp import api

    chosen = selector(select) if select else None
    cli_render.inspection(api.inspect(model, select=chosen, shapes=shapes(inputs)), as_json)


@app.command()
def rewrite(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The .onnx file to write.")] = None,
    recipe: RecipeName = "int8",
    target: TargetName = "ort-cpu",
    data: DataSource = None,
    samples: Samples = 128,
    seed: Seed = 0,
    inputs: Inputs = None,
    check: CheckLevel = "graph",
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model with a recipe."""
    from onnxcomp import api

    if output is None and not dry_run:
        raise RecipeError("give the file to write with -o, or --dry-run")
    _warn_of_random(data)
    with _working(as_json) as progress:
        result = api.rewrite(
            model, None if dry_run else output, recipe=recipe, target=target, data=data, samples=samples, seed=seed,
            shapes=shapes(inputs), check=check_level(check), progress=progress,
        )  # fmt: skip
    cli_render.rewrite_result(result, as_json)


@app.command("compile")
def compile_(
    model: Model, output: Output, target: TargetName = "ort-cpu", inputs: Inputs = None, as_json: Json = False
) -> None:
    """Compile a model for a target, and show what really runs there."""
    from onnxcomp import api

    with _working(as_json):
        result = api.compile(model, output, target=target, shapes=shapes(inputs))
    cli_render.artifact(result, as_json)


@app.command()
def profile(
    model: Annotated[Path, typer.Argument(help="An .onnx file or the folder of an artifact.")],
    baseline: Annotated[Path | None, typer.Option("--baseline", help="Measured interleaved with the model.")] = None,
    target: TargetName = "ort-cpu",
    data: Annotated[str, typer.Option("--data", "-d", help="The first sample is run.")] = "random",
    threads: Threads = 1,
    repeat: Rounds = 50,
    seconds: Seconds = 60.0,
    seed: Seed = 0,
    inputs: Inputs = None,
    as_json: Json = False,
) -> None:
    """Measure latency, memory and time by node on the target."""
    from onnxcomp import api

    with _working(as_json) as progress:
        result = api.profile(
            model, baseline, target=target, data=data, threads=threads, repeat=repeat, seconds=seconds, seed=seed,
            shapes=shapes(inputs), progress=progress,
        )  # fmt: skip
    cli_render.profile(result, as_json)


@app.command()
def compare(
    reference: Annotated[Path, typer.Argument(help="The original.")],
    other: Annotated[Path, typer.Argument(help="The model in question.")],
    data: Annotated[str, typer.Option("--data", "-d", help="Evaluation data.")],
    metric: MetricName = None,
    target: TargetName = "ort-cpu",
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="Most samples to use.")] = None,
    threads: Threads = 1,
    seed: Seed = 0,
    inputs: Inputs = None,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    as_json: Json = False,
) -> None:
    """Compare the outputs and layers of two models on data."""
    from onnxcomp import api

    _warn_of_random(data)
    with _working(as_json) as progress:
        fidelity = api.compare(
            reference, other, data=data, metric=metric, target=target, samples=samples, threads=threads, seed=seed,
            shapes=shapes(inputs), progress=progress,
        )  # fmt: skip
    cli_render.fidelity(fidelity, as_json)
    _gate(fidelity, max_drop, min_sqnr)


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for model.onnx, artifact/ and the report.")],
    recipe: RecipeName = "int8",
    target: TargetName = "ort-cpu",
    data: DataSource = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", help="Else --data is split in two.")] = None,
    metric: MetricName = None,
    samples: Samples = 128,
    eval_samples: Annotated[int, typer.Option("--eval-samples", min=1, help="Most evaluation samples.")] = 256,
    seed: Seed = 0,
    threads: Threads = 1,
    inputs: Inputs = None,
    check: CheckLevel = "graph",
    measure: Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency and memory.")] = True,
    repeat: Rounds = 50,
    seconds: Seconds = 60.0,
    max_drop: MaxDrop = None,
    min_sqnr: MinSqnr = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite, compile, profile and compare; write the model, the artifact and the report."""
    from onnxcomp import api
    from onnxcomp.report import to_json

    gated = max_drop is not None or min_sqnr is not None
    if gated and data is None and eval_data is None:
        raise RecipeError("--max-drop and --min-sqnr need evaluation data; give some with --data or --eval-data")
    if dry_run:
        _warn_of_random(data)
        with _working(as_json) as progress:
            result = api.rewrite(
                model, None, recipe=recipe, target=target, data=data, samples=samples, seed=seed,
                shapes=shapes(inputs), check=check_level(check), half=eval_data is None, progress=progress,
            )  # fmt: skip
        cli_render.rewrite_result(result, as_json)
        return
    with _working(as_json) as progress:
        report = api.compress(
            model, output, recipe=recipe, target=target, data=data, eval_data=eval_data, metric=metric,
            samples=samples, eval_samples=eval_samples, seed=seed, threads=threads, shapes=shapes(inputs),
            check=check_level(check), measure=measure, repeat=repeat, seconds=seconds, progress=progress,
        )  # fmt: skip
    typer.echo(to_json(report) if as_json else f"{report.summary()}\n\nreport: {output / 'report.html'}")
    if gated:
        _gate(report.fidelity, max_drop, min_sqnr)


@app.command("list")
def list_(what: Annotated[str, typer.Argument(help="passes, targets, recipes or ops")], as_json: Json = False) -> None:
    """List passes, targets, recipes or portable ops."""
    from onnxcomp import api

    lists = {
        "passes": api.list_passes, "targets": api.list_targets, "recipes": api.list_recipes, "ops": api.list_ops
    }  # fmt: skip
    if what not in lists:
        raise RecipeError(f"there is no list of {what!r}; there is {', '.join(lists)}")
    cli_render.names(lists[what](), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is installed, what this machine offers, and how to get what is missing."""
    from onnxcomp import api

    checks = api.doctor()
    cli_render.checks(checks, as_json)
    if any(c.state == "broken" for c in checks):
        raise typer.Exit(2)


def _version(given: bool) -> None:
    if given:
        typer.echo(f"onnxcomp {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None: ...


@contextmanager
def _working(as_json: bool) -> Iterator[Progress | None]:
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
        from rich.console import Console

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


def _warn_of_random(data: str | None) -> None:
    if data == "random":
        typer.echo("warning: random data: ranges and fidelity say nothing about real inputs", err=True)


def _gate(fidelity: Any, max_drop: float | None, min_sqnr: float | None) -> None:
    if max_drop is not None:
        drop = fidelity.drop()
        if drop is None:
            raise RecipeError("--max-drop needs --metric, or an output with class scores; use --min-sqnr instead")
        if fidelity.non_finite:
            names = ", ".join(fidelity.non_finite)
            typer.echo(f"gate failed: NaN or infinity in outputs where the original has none: {names}", err=True)
            raise typer.Exit(3)
        if drop > max_drop:
            what = "the metric" if fidelity.metric else "top-1 agreement"
            typer.echo(f"gate failed: {what} fell by {drop:.4f}, more than --max-drop {max_drop}", err=True)
            raise typer.Exit(3)
    if min_sqnr is not None and fidelity.worst_sqnr < min_sqnr:
        typer.echo(f"gate failed: SQNR is {fidelity.worst_sqnr:.1f} dB, below --min-sqnr {min_sqnr}", err=True)
        raise typer.Exit(3)


class _InterruptedError(BaseException):
    """Ctrl-C or a request to end; typer would turn KeyboardInterrupt into an exit of its own."""


def _interrupt(number: int, frame: object) -> None:
    raise _InterruptedError(number)


def main() -> None:
    """Runs the command line and turns errors into messages and exit codes."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        app()
    except _InterruptedError as interrupted:
        typer.echo("interrupted: nothing was written", err=True)
        sys.exit(128 + interrupted.args[0])
    except (OnnxcompError, OSError, MemoryError) as error:
        if os.environ.get("ONNXCOMP_DEBUG"):
            traceback.print_exc()
        typer.echo(f"error: {cli_render.message(error)}", err=True)
        sys.exit(2)
