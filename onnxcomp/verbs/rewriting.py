"""Verbs that write one thing: a model from torch, a rewritten model, an artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxcomp.data import Source, load_data
from onnxcomp.model import has_external, load, model_size, save
from onnxcomp.recipe import AUTO
from onnxcomp.rewrite import Check, Progress
from onnxcomp.specs import input_specs
from onnxcomp.target import Artifact
from onnxcomp.verbs.choosing import Notice, choose
from onnxcomp.verbs.resolve import (
    EVAL_SAMPLES,
    ModelLike,
    RecipeLike,
    Shapes,
    compiled,
    load_model,
    make_target,
    pipeline_of,
    reference_runner,
    tuned,
)
from onnxcomp.verbs.results import RewriteResult
from onnxcomp.workdir import check_writable

if TYPE_CHECKING:
    from onnxcomp.export import ExportResult


def export(factory: Any, out: str | os.PathLike[str], **options: Any) -> ExportResult:
    """Exports a torch module with the dynamo exporter; see `onnxcomp.export.export_module` for the options.

    Args:
        factory: `module:function` that returns a module and its example inputs, or a module.
        out: The `.onnx` file to write.
        **options: Of `export_module`.
    """
    from onnxcomp.export import export_module

    check_writable(Path(out))
    return export_module(factory, Path(out), runner=reference_runner(), **options)


def rewrite(
    model: ModelLike,
    out: str | os.PathLike[str] | None,
    *,
    recipe: RecipeLike = AUTO,
    target: str = "ort-cpu",
    data: Source | None = None,
    samples: int | None = 128,
    seed: int = 0,
    shapes: Shapes | None = None,
    check: Check = "graph",
    half: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> RewriteResult:
    """Rewrites a model with a recipe.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: The `.onnx` file to write, or None to write nothing (a dry run).
        recipe: Built-in name, path, `Recipe`, passes, or `auto` for the built-in one that suits the kind of model.
        target: Whose capabilities the passes go by.
        data: Calibration data, all of which may be used.
        samples: Most calibration feeds to use, None for all.
        seed: Of everything random.
        shapes: Fixes dynamic input shapes.
        check: Validation after every pass.
        half: Calibrates with the first half of the data only, as `compress` does.
        progress: Told about every step.
        notice: Told which recipe was chosen and why, and what it is known to cost, before the work begins.

    Raises:
        OnnxcompError: If anything is wrong with what was given; nothing is written then.
    """
    chosen = make_target(target)
    if out is not None:
        check_writable(Path(out))
    original = load_model(model, shapes)
    choice = choose(recipe, original, data=data is not None)
    before = model_size(original)
    calibration = None if data is None else load_data(data, input_specs(original), seed=seed)
    if calibration is not None:
        calibration = calibration.split(samples, EVAL_SAMPLES)[0] if half else calibration.take(samples)
    rewritten = original.clone() if isinstance(model, ir.Model) else original
    choice.tell(notice, warn=True)
    reports = pipeline_of(choice.recipe.passes, chosen, check, seed).run(rewritten, calibration, progress)
    if out is not None:
        save(rewritten, out)
        if has_external(rewritten):
            rewritten = load(out)  # weights that were never in memory may have lain in a file that is replaced now
    return RewriteResult(
        path=None if out is None else Path(out),
        model=rewritten,
        before=before,
        passes=reports,
        recipe=choice.recipe.name,
        kind=choice.kind,
        reason=choice.reason,
        warnings=choice.warnings,
    )


def compile(
    model: ModelLike,
    out: str | os.PathLike[str],
    *,
    target: str = "ort-cpu",
    shapes: Shapes | None = None,
    tune: float | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compiles a model for a target into the folder `out`, with the audit of what really runs.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: The folder; an artifact that is there is replaced.
        target: Name of the target.
        shapes: Fixes dynamic input shapes.
        tune: Most seconds to measure for how parts of the model run best on this machine. At 0, what earlier runs
            measured is used and nothing is measured; without it, neither.
        progress: Told what is measured.

    Raises:
        OnnxcompError: If anything is wrong with what was given, or the target cannot tune; `out` stays as it was.
    """
    chosen = tuned(make_target(target), tune, progress)
    return compiled(load_model(model, shapes), chosen, Path(out))
