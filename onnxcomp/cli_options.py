"""What the command line takes: single options, groups of options that several verbs share, and what their texts mean.

A group is a dataclass whose fields are options. A verb under `grouped` takes it as one parameter, and typer sees the
fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from onnxcomp.errors import RecipeError

if TYPE_CHECKING:
    from onnxcomp.rewrite import Check
    from onnxcomp.select import Select

Model = Annotated[Path, typer.Argument(help="An .onnx file.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="What to write.")]
OutputFile = Annotated[Path | None, typer.Option("--output", "-o", help="The .onnx file to write.")]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="Folder for model.onnx, artifact/ and the report.")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="Built-in recipe, .toml file, or auto, which goes by the kind of model.")
]
TargetName = Annotated[str, typer.Option("--target", "-t", help="Target; see 'onnxcomp list targets'.")]
OwnTarget = Annotated[
    str | None, typer.Option("--target", "-t", help="Target; else that of the artifact, or ort-cpu for a model.")
]
DeviceName = Annotated[str | None, typer.Option("--device", help="Run there; see 'onnxcomp devices'.")]
DataSource = Annotated[
    str | None,
    typer.Option("--data", "-d", help=".npz, folder of .npz/.npy, test_data_set_*, module:function, or 'random'."),
]
CalibrationData = Annotated[str, typer.Option("--data", "-d", help="Calibration data.")]
Compared = Annotated[int, typer.Option("--compare", min=1, help="Samples that outputs are compared on.")]
EvalData = Annotated[str | None, typer.Option("--eval-data", help="Else --data is split in two.")]
Feeds = Annotated[str, typer.Option("--data", "-d", help="Evaluation data.")]
OneFeed = Annotated[str, typer.Option("--data", "-d", help="The first sample is run; with --stream all, in order.")]
Stream = Annotated[bool, typer.Option("--stream", help="Run --data as a stream, and show what every step takes.")]
StreamPage = Annotated[Path | None, typer.Option("--plot", help="HTML page of the stream to write besides.")]
Samples = Annotated[int, typer.Option("--samples", min=1, help="Most calibration samples.")]
EvalSamples = Annotated[int, typer.Option("--eval-samples", min=1, help="Most evaluation samples.")]
SomeSamples = Annotated[int | None, typer.Option("--samples", min=1, help="Most samples to use.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="Threads a run; 0 lets the runtime choose.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, and nothing else there.")]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", help="Fixes a dynamic shape: name=1x3x224x224. May be repeated.")
]
Selectors = Annotated[
    list[str] | None, typer.Option("--select", help="op=, name=, module= or skip= and a pattern. May be repeated.")
]
CheckLevel = Annotated[str, typer.Option("--check", help="After every pass: none, graph or numeric.")]
MetricName = Annotated[str | None, typer.Option("--metric", help="Task metric, module:function.")]
MaxDrop = Annotated[
    float | None, typer.Option("--max-drop", help="Exit with 3 if the metric, else top-1 agreement, falls by more.")
]
Exact = Annotated[bool, typer.Option("--exact", help="Keep every integer of the model what it is.")]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Quantize what is float between integers as well, by half of --data.")
]
MinSqnr = Annotated[float | None, typer.Option("--min-sqnr", help="Exit with 3 if an output's SQNR is below this.")]
SameSqnr = Annotated[
    float, typer.Option("--min-sqnr", help="Write nothing and exit with 3 if an output's SQNR is below this.")
]
Measure = Annotated[bool, typer.Option("--measure/--no-measure", help="Measure latency and memory.")]
MeasureToo = Annotated[bool, typer.Option("--profile", help="Measure both models, interleaved.")]
Rounds = Annotated[int, typer.Option("--repeat", min=5, help="Rounds of timing.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0.1, help="Most seconds of timing.")]
Tokens = Annotated[
    str, typer.Option("--tokens", help="Token numbers: .npy, .npz of one array, a text of numbers, or module:function.")
]
SomeTokens = Annotated[
    str | None, typer.Option("--tokens", help="Instead of --data, for a decoder; see 'onnxcomp perplexity'.")
]
Window = Annotated[int, typer.Option("--window", min=1, help="Tokens that the model sees at once at most.")]
Stride = Annotated[
    int | None, typer.Option("--stride", min=1, help="Tokens from one window to the next; else the window.")
]
TailError = Annotated[
    float, typer.Option("--cett", min=0.0, max=1.0, help="Relative error of a layer at which neurons count as dropped.")
]
MeasurePerplexity = Annotated[
    bool, typer.Option("--measure/--no-measure", help="Measure perplexities, if the model predicts tokens.")
]
SparsityPage = Annotated[
    Path | None, typer.Option("--report", help="HTML page to write besides, with tables and plots.")
]
MaxRise = Annotated[
    float | None,
    typer.Option("--max-rise", help="Exit with 3 if perplexity rises by more; 0.01 is 1 %."),
]
Tune = Annotated[
    float | None,
    typer.Option(
        "--tune",
        metavar="SECONDS",
        min=0.0,
        help="Measure that long, for each model, how parts run best on this machine; 0 uses what is known from before.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be done and what is refused, and why.")]
Tolerance = Annotated[float, typer.Option(min=0.0, help="Allowed error; --rtol is relative to the largest value.")]


@dataclass(frozen=True, kw_only=True)
class Rewriting:
    """How a model is rewritten: by what, for what, and what calibrates."""

    recipe: RecipeName = "auto"
    target: TargetName = "ort-cpu"
    data: DataSource = None
    samples: Samples = 128
    seed: Seed = 0
    inputs: Inputs = None
    check: CheckLevel = "graph"

    def keywords(self) -> dict[str, Any]:
        """Arguments of `api.rewrite` and `api.compress`.

        Raises:
            RecipeError: If `--input` or `--check` is malformed.
        """
        given = {name: getattr(self, name) for name in ("recipe", "target", "data", "samples", "seed")}
        return {**given, "shapes": shapes(self.inputs), "check": _check(self.check)}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long, and with how many threads, a model is run."""

    threads: Threads = 1
    repeat: Rounds = 50
    seconds: Seconds = 60.0

    def keywords(self) -> dict[str, Any]:
        """Arguments of the functions of `api` that measure."""
        return vars(self)


def grouped(verb: Callable[..., None]) -> Callable[..., None]:
    """Spreads the groups of options among the parameters of `verb` into the options that they hold."""
    hints = get_type_hints(verb, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(verb).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        inner = get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=inner[f.name])
            for f in fields(groups[name])
        ]

    @functools.wraps(verb)
    def spread(**options: Any) -> None:
        made = {name: group(**{f.name: options.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        verb(**options, **made)

    spread.__annotations__ = {p.name: p.annotation for p in parameters}
    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return spread


def shapes(texts: list[str] | None) -> dict[str, tuple[int, ...]] | None:
    """The values of `--input` by name; None if there are none.

    Raises:
        RecipeError: If one is malformed, or a name is given twice.
    """
    if not texts:
        return None
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, dims = text.rpartition("=")
        try:
            shape = tuple(int(d) for d in dims.split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            raise RecipeError(f"--input {text!r} is not of the form name=1x3x224x224")
        if name in found:
            raise RecipeError(f"--input {name!r} is given twice")
        found[name] = shape
    return found


def selector(texts: list[str]) -> Select:
    """The values of `--select` as one selector.

    Raises:
        RecipeError: If one is malformed.
    """
    from onnxcomp.select import Select

    lists: dict[str, list[str]] = {"op": [], "name": [], "module": [], "skip": []}
    for text in texts:
        key, _, pattern = text.partition("=")
        if key not in lists or not pattern:
            raise RecipeError(f"--select {text!r} is not of the form op=, name=, module= or skip= and a pattern")
        lists[key].append(pattern)
    return Select(**{k: tuple(v) for k, v in lists.items()})


def _check(text: str) -> Check:
    if text in ("none", "graph", "numeric"):
        return cast("Check", text)
    raise RecipeError(f"--check {text!r}: it has to be none, graph or numeric")
