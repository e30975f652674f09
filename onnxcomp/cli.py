"""The command line: one thin function a verb over `onnxcomp.api`.

Exit codes: 0 done; 2 wrong usage, or an `OnnxcompError`; 3 a gate (`--max-drop`, `--min-sqnr`) failed; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from onnxcomp import __version__, cli_render
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.rewrite import Progress

app = typer.Typer(
    name="onnxcomp",
    help="Hardware-portable compression of ONNX models, measured where they run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="An .onnx file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Built-in recipe or .toml file.")]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Target; see 'onnxcomp list targets'.")]
DataSource = Annotated[
    str | None,
    typer.Option("--data", "-d", help=".npz, folder of .npz/.npy, test_data_set_*, module:function, or 'random'."),
]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Most calibration samples.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads a run; 0 lets the runtime choose.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, and nothing else there.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Fixes a dynamic shape: name=1x3x224x224. May be repeated.")
]
CheckLevel = Annotated[str, typer.Option("--check", help="After every pass: none, graph or numeric.")]
MetricName = Annotated[str | None, typer.Option("--metric", help="Task metric, module:function.")]
MaxDrop = Annotated[
    float | None, typer.Option("--max-drop", help="Exit with 3 if the metric, else top-1 agreement, falls by more.")
]
MinSqnr = Annotated[float | None, typer.Option("--min-sqnr", help="Exit with 3 if an output's SQNR is below this.")]
Rounds = Annotated[int, typer.Option("--repeat", min=5, help="Rounds of timing.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="Most seconds of timing.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what is refused, and why.")]


@app.command()
def export(
    factory: Annotated[str, typer.Argument(help="module:function that returns a torch module and example inputs.")],
    output: Output,
    opset: Annotated[int, typer.Option("--opset")] = 20,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Leave the first dimension open.")] = False,
    as_json: Json = False,
) -> None:
    """Export a torch module with the dynamo exporter and check it against torch."""
    from onnxcomp import api

    cli_render.show(api.export(factory, output, opset=opset, dynamic_batch=dynamic_batch), as_json)


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

    chosen = _selector(select) if select else None
    cli_render.inspection(api.inspect(model, select=chosen, shapes=_shapes(inputs)), as_json)


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
    with progress_bar() as progress:
        result = api.rewrite(
            model, None if dry_run else output, recipe=recipe, target=target, data=data, samples=samples, seed=seed,
            shapes=_shapes(inputs), check=_check(check), progress=progress,
        )  # fmt: skip
    cli_render.rewrite_result(result, as_json)


@app.command("compile")
def compile_(
    model: Model, output: Output, target: TargetName = "ort-cpu", inputs: Inputs = None, as_json: Json = False
) -> None:
    """Compile a model for a target, and show what really runs there."""
    from onnxcomp import api

    cli_render.artifact(api.compile(model, output, target=target, shapes=_shapes(inputs)), as_json)


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

    with progress_bar() as progress:
        result = api.profile(
            model, baseline, target=target, data=data, threads=threads, repeat=repeat, seconds=seconds, seed=seed,
            shapes=_shapes(inputs), progress=progress,
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

    with progress_bar() as progress:
        fidelity = api.compare(
            reference, other, data=data, metric=metric, target=target, samples=samples, threads=threads, seed=seed,
            shapes=_shapes(inputs), progress=progress,
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

    if dry_run:
        with progress_bar() as progress:
            result = api.rewrite(
                model, None, recipe=recipe, target=target, data=data, samples=samples, seed=seed,
                shapes=_shapes(inputs), check=_check(check), progress=progress,
            )  # fmt: skip
        cli_render.rewrite_result(result, as_json)
        return
    with progress_bar() as progress:
        report = api.compress(
            model, output, recipe=recipe, target=target, data=data, eval_data=eval_data, metric=metric,
            samples=samples, eval_samples=eval_samples, seed=seed, threads=threads, shapes=_shapes(inputs),
            check=_check(check), repeat=repeat, seconds=seconds, progress=progress,
        )  # fmt: skip
    typer.echo(to_json(report) if as_json else f"{report.summary()}\n\nreport: {output / 'report.html'}")
    if max_drop is not None or min_sqnr is not None:
        if report.fidelity is None:
            raise RecipeError("--max-drop and --min-sqnr need evaluation data; give some with --data or --eval-data")
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
def progress_bar() -> Iterator[Progress | None]:
    """A progress bar on stderr as long as the block runs; None where stderr is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    from rich import progress as bars

    with bars.Progress(
        bars.SpinnerColumn(), bars.TextColumn("{task.description}"), bars.BarColumn(), bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(), console=console, transient=True,
    ) as shown:  # fmt: skip
        task = shown.add_task("", total=None)

        def told(text: str, done: int, total: int | None) -> None:
            shown.update(task, description=text, completed=done, total=total)

        yield told


def _shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    if not texts:
        return None
    shapes = {}
    for text in texts:
        name, _, dims = text.rpartition("=")
        try:
            shape = tuple(int(d) for d in dims.split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            raise RecipeError(f"--input {text!r} is not of the form name=1x3x224x224")
        shapes[name] = shape
    return shapes


def _selector(texts: list[str]) -> Any:
    from onnxcomp.select import Select

    lists: dict[str, list[str]] = {"op": [], "name": [], "module": [], "skip": []}
    for text in texts:
        key, _, pattern = text.partition("=")
        if key not in lists or not pattern:
            raise RecipeError(f"--select {text!r} is not of the form op=, name=, module= or skip= and a pattern")
        lists[key].append(pattern)
    return Select(**{k: tuple(v) for k, v in lists.items()})


def _check(text: str) -> Any:
    if text not in ("none", "graph", "numeric"):
        raise RecipeError(f"--check {text!r} is none of none, graph, numeric")
    return text


def _gate(fidelity: Any, max_drop: float | None, min_sqnr: float | None) -> None:
    if max_drop is not None:
        drop = fidelity.drop()
        if drop is None:
            raise RecipeError("--max-drop needs --metric, or an output with class scores; use --min-sqnr instead")
        if drop > max_drop:
            typer.echo(f"gate failed: fidelity fell by {drop:.4f}, more than --max-drop {max_drop}", err=True)
            raise typer.Exit(3)
    if min_sqnr is not None and fidelity.worst_sqnr < min_sqnr:
        typer.echo(f"gate failed: SQNR is {fidelity.worst_sqnr:.1f} dB, below --min-sqnr {min_sqnr}", err=True)
        raise typer.Exit(3)


def main() -> None:
    """Runs the command line and turns errors into messages and exit codes."""
    try:
        app()
    except OnnxcompError as error:
        if os.environ.get("ONNXCOMP_DEBUG"):
            raise
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        sys.exit(130)
