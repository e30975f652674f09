"""What the command line takes: options that several verbs share, and what their texts mean."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from onnxcomp.errors import RecipeError

if TYPE_CHECKING:
    from onnxcomp.rewrite import Check
    from onnxcomp.select import Select

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
Tolerance = Annotated[float, typer.Option(min=0.0, help="Allowed error; --rtol is relative to the largest value.")]


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


def check(text: str) -> Check:
    """The value of `--check`.

    Raises:
        RecipeError: If there is no such level.
    """
    if text in ("none", "graph", "numeric"):
        return cast("Check", text)
    raise RecipeError(f"--check {text!r}: it has to be none, graph or numeric")
