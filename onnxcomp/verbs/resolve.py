"""Turns what a caller may give (paths, names, functions) into models, recipes, metrics, targets and data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from onnxcomp.compare import Metric, Run
from onnxcomp.data import Data, Source, load_data, load_function
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.manifest import artifact_target
from onnxcomp.model import fix_shapes, initializers, load, model_size
from onnxcomp.recipe import Recipe, load_recipe
from onnxcomp.registry import load_target
from onnxcomp.rewrite import Check, Pass, PassReport, Pipeline, Progress
from onnxcomp.specs import input_specs
from onnxcomp.target import Artifact, Feed, Target

if TYPE_CHECKING:
    from onnxcomp.calibrate import Runner

ModelLike: TypeAlias = "str | os.PathLike[str] | ir.Model"
RecipeLike: TypeAlias = "str | Recipe | Sequence[Pass]"
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"

EVAL_SAMPLES = 256
_FEW_SAMPLES = 8


def reference_runner() -> Runner:
    """What runs models inside the verbs, whatever the target."""
    from onnxcomp.targets.ort.session import reference_runner as runner

    return runner


def load_model(model: ModelLike, shapes: Shapes | None) -> ir.Model:
    """The model, with shapes fixed; one in memory is copied before anything is changed."""
    if isinstance(model, ir.Model):
        if shapes:
            model = model.clone()
            fix_shapes(model, shapes)
        return model
    loaded = load(model)
    if shapes:
        fix_shapes(loaded, shapes)
    return loaded


def as_recipe(recipe: RecipeLike) -> Recipe:
    """The recipe behind a name, a path, or a sequence of passes.

    Raises:
        RecipeError: If it does not exist or is not valid.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        return load_recipe(str(recipe))
    for step in recipe:
        if not isinstance(step, Pass):
            raise RecipeError(f"a recipe made in Python is a sequence of passes; {step!r} is none")
    return Recipe(name="custom", passes=tuple(recipe))


def as_metric(metric: str | Metric | None) -> Metric | None:
    """The metric, with what goes wrong in it turned into an error that names it."""
    if metric is None:
        return None
    function = load_function(metric) if isinstance(metric, str) else metric
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")

    def scored(run: Run) -> dict[str, float]:
        try:
            value = function(run)
            table = value if isinstance(value, Mapping) else {"metric": value}
            return {str(k): float(v) for k, v in table.items()}
        except OnnxcompError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise DataError(
                f"the metric {name} has to return a number, or names with numbers; it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    return scored


def make_target(name: str) -> Target:
    """The target registered as `name`, or as what is before a colon in it, for the board that is named behind it.

    Raises:
        RecipeError: If there is none.
    """
    registered, _, board = name.partition(":")
    target = load_target(registered)()
    return target.on(board) if board else target


def tuned(target: Target, seconds: float | None, progress: Progress | None) -> Target:
    """The target, tuned for that long if that is asked for.

    Raises:
        OnnxcompError: If it cannot be tuned, or that is no time.
    """
    if seconds is None:
        return target
    if not 0 <= seconds < inf:
        raise RecipeError(f"{seconds} is not a number of seconds to tune for")
    return target.tuned(seconds, progress)


def pipeline_of(passes: Sequence[Pass], target: Target, check: Check, seed: int, threads: int = 1) -> Pipeline:
    """A pipeline that calibrates with the reference runner and measures on the target."""
    return Pipeline(
        passes=passes,
        capabilities=target.capabilities(),
        runner=reference_runner(),
        check=check,
        seed=seed,
        timer=lambda model, feed: node_microseconds(model, target, feed, threads),
    )


def node_microseconds(model: ir.Model, target: Target, feed: Feed, threads: int = 1) -> dict[str, float]:
    """Microseconds of every compute node of `model` as executed on the target, and of all nodes under ""."""
    with tempfile.TemporaryDirectory(prefix="onnxcomp-time-") as folder:
        artifact = compiled(model, target, Path(folder, "artifact"))
        times = {t.node: t.microseconds for t in target.node_times(artifact, feed, threads=threads, repeat=20)}
    by_node = {r.node: times[r.executed_name] for r in artifact.audit.rows if r.executed_name in times}
    return {**by_node, "": sum(times.values())}


def compiled(model: ir.Model, target: Target, folder: Path) -> Artifact:
    """Lowers a model, which stays as it is, and compiles it into `folder`."""
    return target.compile(lowered(model, target)[0], folder)


def lowered(model: ir.Model, target: Target) -> tuple[ir.Model, tuple[PassReport, ...]]:
    """A copy of a model in the form that a target executes best, and what passes did to bring it there."""
    steps = target.lowering()
    if not steps:
        return model, ()
    changed = model.clone()
    return changed, Pipeline(passes=steps, capabilities=target.capabilities()).run(changed)


def target_for(model: ModelLike, name: str | None) -> Target:
    """The target of that name; without one that of an artifact's folder, else `ort-cpu`.

    Raises:
        TargetError: If the folder is no artifact.
        RecipeError: If there is no such target.
    """
    if name is None and not isinstance(model, ir.Model) and Path(model).is_dir():
        name = artifact_target(Path(model))
    return make_target(name or "ort-cpu")


def artifact_of(model: ModelLike, target: Target, folder: Path, shapes: Shapes | None) -> Artifact:
    """The artifact at the path `model`, or that of the model compiled into `folder`."""
    if not isinstance(model, ir.Model) and Path(model).is_dir():
        return target.open(Path(model))
    return compiled(load_model(model, shapes), target, folder)


def split_data(
    model: ir.Model,
    data: Source | None,
    eval_data: Source | None,
    samples: int | None,
    eval_samples: int | None,
    seed: int,
) -> tuple[Data | None, Data | None, list[str]]:
    """Calibration data, evaluation data, and what the reader has to know about them."""
    specs = input_specs(model)
    warnings: list[str] = []
    calibration = None if data is None else load_data(data, specs, seed=seed)
    if any(isinstance(d, str) and d == "random" for d in (data, eval_data)):
        warnings.append("random data was used: ranges and fidelity say nothing about real inputs")
    if eval_data is not None:
        evaluation: Data | None = load_data(eval_data, specs, seed=seed).take(eval_samples)
        calibration = None if calibration is None else calibration.take(samples)
    elif calibration is not None:
        calibration, evaluation = calibration.split(samples, eval_samples)
    else:
        evaluation = None
        warnings.append("no data was given: only passes that need none could run, and fidelity was not measured")
    if evaluation is None:
        return calibration, None, warnings
    digests = evaluation.digests()
    known = set() if calibration is None else set(calibration.digests())
    shared = sum(d in known for d in digests)
    if shared:
        evaluation = replace(evaluation, seen_by_calibration=True)
    if 0 < shared < len(digests):
        warnings.append(f"{shared} of {len(digests)} evaluation samples are calibration samples as well")
    if len(digests) < _FEW_SAMPLES:
        warnings.append(f"fidelity rests on {len(digests)} sample{'s' * (len(digests) != 1)} only")
    return calibration, evaluation, warnings


def file_bytes(path: ModelLike, model: ir.Model) -> int:
    """Size of the file at `path`, which `model` was loaded from, with its external data."""
    if isinstance(path, ir.Model):
        return model_size(model).weight_bytes
    tensors = (v.const_value for v in initializers(model))
    files = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
    return Path(path).stat().st_size + sum(f.stat().st_size for f in files)
