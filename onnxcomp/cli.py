"""The command line: one thin function a verb over `onnxcomp.api`.

Exit codes: 0 done; 2 wrong usage, or an `OnnxcompError`; 3 a gate (`--max-drop`, `--min-sqnr`) failed; 130 interrupted.
Results go to stdout; messages, warnings and progress to stderr. `ONNXCOMP_DEBUG=1` adds the traceback to an error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from onnxcomp import __version__, cli_devices, cli_figures, cli_render
from onnxcomp.cli_gates import Gate, fail
from onnxcomp.cli_options import (
    Calibrate,
    DataSource,
    DryRun,
    EvalData,
    EvalSamples,
    Exact,
    Inputs,
    Json,
    Measure,
    MeasureToo,
    MetricName,
    Model,
    Output,
    OutputFile,
    OutputFolder,
    Rewriting,
    SameSqnr,
    Seed,
    Selectors,
    SomeSamples,
    TargetName,
    Timing,
    Tolerance,
    Tune,
    grouped,
    selector,
    shapes,
)
from onnxcomp.cli_render import working
from onnxcomp.errors import OnnxcompError, RecipeError

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

    with working(as_json):
        result = api.export(
            factory, output, opset=opset, dynamic_batch=dynamic_batch, check=check, rtol=rtol, atol=atol
        )
    cli_render.show(result, as_json)


@app.command()
def inspect(model: Model, select: Selectors = None, inputs: Inputs = None, as_json: Json = False) -> None:
    """Show what a model is made of, and which nodes a selector takes."""
    from onnxcomp import api

    chosen = selector(select) if select else None
    cli_render.inspection(api.inspect(model, select=chosen, shapes=shapes(inputs)), as_json)


@app.command()
@grouped
def rewrite(
    model: Model,
    *,
    output: OutputFile = None,
    rewriting: Rewriting,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite a model with a recipe."""
    from onnxcomp import api

    _need_output(output, dry_run)
    cli_render.warn_of_random(rewriting.data)
    with working(as_json) as progress:
        result = api.rewrite(
            model, None if dry_run else output, **rewriting.keywords(), progress=progress, notice=_tell
        )
    cli_render.rewrite_result(result, as_json)


@app.command()
@grouped
def legalize(
    model: Model,
    *,
    output: OutputFile = None,
    target: TargetName = "ort-cpu",
    exact: Exact = False,
    calibrate: Calibrate = False,
    data: DataSource = None,
    samples: SomeSamples = 64,
    seed: Seed = 0,
    inputs: Inputs = None,
    min_sqnr: SameSqnr = 30.0,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Float model that it was made from, to be judged by."),
    ] = None,
    measure: MeasureToo = False,
    timing: Timing,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Make an int8 model of another tool run in the target's integer kernels, with the outputs that it had."""
    from onnxcomp import api

    _need_output(output, dry_run)
    if data is None:
        typer.echo("warning: no data: the outputs are compared on random inputs; give some with --data", err=True)
    cli_render.warn_of_random(data)
    with working(as_json) as progress:
        result = api.legalize(
            model, None if dry_run else output, target=target, exact=exact, calibrate=calibrate, data=data,
            samples=samples, seed=seed, shapes=shapes(inputs), min_sqnr=min_sqnr, reference=reference, measure=measure,
            **timing.keywords(), progress=progress,
        )  # fmt: skip
    cli_render.legalization(result, as_json)
    if not result.accepted:
        fail(cli_render.not_legalized(result))


app.command()(cli_figures.sensitivity)
app.command()(cli_figures.sparsity)
app.command()(cli_figures.perplexity)
app.command("calibrate-target")(cli_figures.calibrate_target)


@app.command("compile")
def compile_(
    model: Model,
    output: Output,
    target: TargetName = "ort-cpu",
    inputs: Inputs = None,
    tune: Tune = None,
    as_json: Json = False,
) -> None:
    """Compile a model for a target, and show what really runs there."""
    from onnxcomp import api

    with working(as_json) as progress:
        result = api.compile(model, output, target=target, shapes=shapes(inputs), tune=tune, progress=progress)
    cli_render.artifact(result, as_json)


app.command()(cli_figures.profile)
app.command()(cli_figures.compare)


@app.command()
@grouped
def compress(
    model: Model,
    output: OutputFolder,
    *,
    rewriting: Rewriting,
    eval_data: EvalData = None,
    eval_samples: EvalSamples = 256,
    metric: MetricName = None,
    measure: Measure = True,
    timing: Timing,
    gate: Gate,
    tune: Tune = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Rewrite, compile, profile and compare; write the model, the artifact and the report."""
    from onnxcomp import api
    from onnxcomp.report import to_json

    if gate.given() and rewriting.data is None and eval_data is None:
        raise RecipeError("--max-drop and --min-sqnr need evaluation data; give some with --data or --eval-data")
    if dry_run:
        cli_render.warn_of_random(rewriting.data)
        with working(as_json) as progress:
            result = api.rewrite(
                model, None, **rewriting.keywords(), half=eval_data is None, progress=progress, notice=_tell
            )
        cli_render.rewrite_result(result, as_json)
        return
    with working(as_json) as progress:
        report = api.compress(
            model, output, **rewriting.keywords(), eval_data=eval_data, eval_samples=eval_samples, metric=metric,
            measure=measure, **timing.keywords(), require_drop=gate.max_drop is not None, max_drop=gate.max_drop,
            tune=tune, progress=progress, notice=_tell,
        )  # fmt: skip
    typer.echo(to_json(report) if as_json else f"{report.summary()}\n\nreport: {output / 'report.html'}")
    if report.fidelity is not None:
        gate.hold(report.fidelity)


app.add_typer(cli_devices.app)


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


def _need_output(output: Path | None, dry_run: bool) -> None:
    if output is None and not dry_run:
        raise RecipeError("give the file to write with -o, or --dry-run")


def _tell(text: str) -> None:
    typer.echo(cli_render.notice(text), err=True)


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
