"""The verb that does all: rewrite, compile, profile, compare, report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from onnxcomp.compare import Metric
from onnxcomp.data import Data, Source, load_data
from onnxcomp.doctor import environment
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.model import load, save
from onnxcomp.passes.mixed import Mixed
from onnxcomp.profile import ratio
from onnxcomp.recipe import AUTO, Recipe
from onnxcomp.rewrite import Check, Pass, Progress
from onnxcomp.specs import input_specs
from onnxcomp.target import Capabilities, Feed
from onnxcomp.verbs.choosing import Notice, choose
from onnxcomp.verbs.figures import check_drop, fidelity_of, figures, time_sessions
from onnxcomp.verbs.resolve import (
    EVAL_SAMPLES,
    ModelLike,
    RecipeLike,
    Shapes,
    as_metric,
    compiled,
    file_bytes,
    load_model,
    lowered,
    make_target,
    pipeline_of,
    split_data,
    tuned,
)
from onnxcomp.workdir import replacing

if TYPE_CHECKING:
    from onnxcomp.report import Report

_MOST_STEPS, _MOST_BYTES = 200, 256 << 20  # of a sequence that is timed


def compress(
    model: ModelLike,
    out: str | os.PathLike[str],
    *,
    recipe: RecipeLike = AUTO,
    target: str = "ort-cpu",
    data: Source | None = None,
    eval_data: Source | None = None,
    metric: str | Metric | None = None,
    samples: int | None = 128,
    eval_samples: int | None = EVAL_SAMPLES,
    seed: int = 0,
    threads: int = 1,
    shapes: Shapes | None = None,
    check: Check = "graph",
    measure: bool = True,
    repeat: int = 50,
    seconds: float | None = 60.0,
    require_drop: bool = False,
    max_drop: float | None = None,
    tune: float | None = None,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Report:
    """Rewrites, compiles, profiles and compares, and writes `model.onnx`, `artifact/` and the report into `out`.

    The original is compiled and measured in the same process, interleaved with the result. Without `eval_data` the
    data is split: one half calibrates, the other evaluates.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: Folder; replaced at the end if it holds an earlier output, and refused if it holds something else.
        recipe: Built-in name, path, `Recipe`, passes, or `auto` for the built-in one that suits the kind of model.
        target: Name of the target.
        data: Calibration data, and evaluation data unless `eval_data` is given.
        eval_data: Evaluation data.
        metric: Task metric, `module:function` or a callable.
        samples: Most calibration feeds to use.
        eval_samples: Most evaluation feeds to use.
        seed: Of everything random.
        threads: Threads a run.
        shapes: Fixes dynamic input shapes.
        check: Validation after every pass.
        measure: Whether to measure latency, memory and time by node, of the original as well.
        repeat: Rounds of timing.
        seconds: Most seconds to spend on timing.
        max_drop: Limit for passes that choose by it, if the recipe sets none.
        require_drop: Fail at once if `Fidelity.drop` would be None.
        tune: Most seconds to measure, for the original and for the result each, how their parts run best on this
            machine; see `compile`.
        progress: Told about every step.
        notice: Told which recipe was chosen and why, before the work begins.

    Raises:
        OnnxcompError: If anything is wrong with what was given; `out` stays as it was.
    """
    from onnxcomp.report import ModelReport, Report, write_report  # brings rich and jinja2, of no use to other verbs

    out = Path(out)
    scored = as_metric(metric)
    if scored is not None and data is None and eval_data is None:
        raise DataError("a metric needs evaluation data as well; give some with --data or --eval-data")
    chosen = make_target(target)
    compiler = tuned(chosen, tune, progress)
    chosen.require_device()
    capabilities = chosen.capabilities()
    original = load_model(model, shapes)
    if not isinstance(model, ir.Model) and Path(model).resolve().is_relative_to(out.resolve()):
        raise OnnxcompError(f"{model} lies in the folder {out}, which is replaced; give another folder")
    choice = choose(recipe, original, data=data is not None)
    plan = choice.recipe
    calibration, evaluation, warnings = split_data(original, data, eval_data, samples, eval_samples, seed)
    if require_drop and scored is None:
        check_drop(original, evaluation)
    warnings += [*choice.warnings, *_reservations(plan, target, capabilities)]
    with replacing(out) as work:
        choice.tell(notice)
        rewritten = original.clone() if isinstance(model, ir.Model) else load_model(model, shapes)
        passes = pipeline_of(_limited(plan.passes, max_drop), chosen, check, seed, threads).run(
            rewritten, calibration, progress
        )
        save(rewritten, work / "model.onnx")
        if progress:
            progress("compile", 0, None)
        baseline = compiled(original, compiler, work / "baseline")
        executable, lowering = lowered(rewritten, chosen)
        artifact = compiler.compile(executable, work / "artifact")
        sessions = {
            "before": chosen.load(baseline, threads=threads),
            "after": chosen.load(artifact, threads=threads),
        }
        streams = len(sessions["after"].states) > len(sessions["before"].states)
        timed = _steps(evaluation) if streams and evaluation is not None else []
        if streams and measure:
            warnings.append(
                f"the rewritten model carries state: times are medians over {len(timed)} steps of the evaluation data, "
                "run as one stream"
                if timed
                else "the rewritten model carries state, and its times are those of one feed over and over, in which "
                "nothing changes: give a sequence as data"
            )
        fidelity = fidelity_of(sessions, original, rewritten, evaluation, scored, progress)
        feeds = load_data("random", input_specs(original), seed=seed) if evaluation is None else evaluation
        feed = next(iter(feeds))
        latency = time_sessions(sessions, timed or [feed], repeat, seconds, progress) if measure else {}
        name = original.graph.name or "model" if isinstance(model, ir.Model) else str(model)
        before = ModelReport(
            path=name,
            file_bytes=file_bytes(model, original),
            **figures(original, chosen, baseline, feed, threads, latency.get("before")),
        )
        after = ModelReport(
            path=str(out / "model.onnx"),
            file_bytes=file_bytes(work / "model.onnx", load(work / "model.onnx")),
            **figures(rewritten, chosen, artifact, feed, threads, latency.get("after")),
        )
        report = Report(
            recipe=plan.name,
            target=target,
            threads=threads,
            environment={**environment(), "cpu features": ", ".join(capabilities.features)},
            before=before,
            after=after,
            passes=(*passes, *(step for step in lowering if step.edits)),
            fidelity=fidelity,
            ratio=ratio(latency["after"], latency["before"]) if measure and (timed or not streams) else None,
            calibration="" if calibration is None else calibration.name,
            calibration_samples=0 if calibration is None else len(calibration),
            warnings=tuple(warnings),
            artifact=str(out / "artifact"),
            recipe_source=plan.source,
            metadata=choice.metadata(),
        )
        report = replace(report, warnings=(*warnings, *_findings(report)))
        shutil.rmtree(work / "baseline")
        write_report(report, work)
    return report


def _steps(evaluation: Data) -> list[Feed]:
    """The first steps of a sequence, as many as a timing runs and memory holds; none if there is no more than one."""
    found: list[Feed] = []
    size = 0
    for feed in evaluation.take(_MOST_STEPS):
        size += sum(array.nbytes for array in feed.values())
        if size > _MOST_BYTES and len(found) > 1:
            break
        found.append(feed)
    return found if len(found) > 1 else []


def _limited(passes: Sequence[Pass], max_drop: float | None) -> list[Pass]:
    """The passes, those that choose under a limit on the drop with this one unless they have one."""
    return [replace(p, max_drop=max_drop) if isinstance(p, Mixed) and p.max_drop is None else p for p in passes]


def _reservations(recipe: Recipe, target: str, capabilities: Capabilities) -> list[str]:
    """What the reader has to know about recipe and machine."""
    found = []
    if recipe.target not in (None, target):
        found.append(f"recipe {recipe.name!r} is made for target {recipe.target}, not {target}")
    if capabilities.reduce_range:
        found.append(
            "this CPU has no 8-bit dot product that keeps its sums (VNNI): weights keep to 7 bits, and integers gain "
            "less time than on CPUs that have it"
        )
    return found


def _findings(report: Report) -> list[str]:
    """What the figures say that the reader must not miss."""
    found = []
    if report.verdict.kind == "slower":
        found.append(f"the rewritten model is slower than the original on {report.target}")
    if fallbacks := report.after.audit.fallbacks:
        quantized = sum(r.quantized for r in report.after.audit.rows)
        found.append(f"{len(fallbacks)} of {quantized} quantized nodes run in float on {report.target}")
    return found
