"""The verbs as Python functions. All wiring of passes, targets, data and measurement is here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx_ir as ir

from onnxcomp.compare import Fidelity, Metric, Run, compare_layers
from onnxcomp.compare import compare as _compare
from onnxcomp.data import Data, Source, load_data, load_function
from onnxcomp.doctor import Diagnosis, diagnose, environment
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.macs import MAC_OPS, count_macs
from onnxcomp.model import ModelSize, all_nodes, fix_shapes, initializers, input_specs, load, model_size, save
from onnxcomp.opset import opset
from onnxcomp.profile import Latency, Ratio, ratio
from onnxcomp.profile import measure as _time
from onnxcomp.recipe import Recipe, builtin_recipes, load_recipe
from onnxcomp.registry import PASSES, TARGETS, load_pass, load_target, names
from onnxcomp.report import ModelReport, Report, write_report
from onnxcomp.rewrite import Check, Pass, PassReport, Pipeline, Progress
from onnxcomp.select import Select, module_paths
from onnxcomp.target import Artifact, Audit, Capabilities, Feed, Session, Target
from onnxcomp.workdir import check_writable, replacing

if TYPE_CHECKING:
    from onnxcomp.calibrate import Runner
    from onnxcomp.export import ExportResult
    from onnxcomp.target import NodeTime

ModelLike: TypeAlias = "str | os.PathLike[str] | ir.Model"
RecipeLike: TypeAlias = "str | Recipe | Sequence[Pass]"
Shapes: TypeAlias = "Mapping[str, tuple[int, ...]]"

_LAYER_SAMPLES = 4
_EVAL_SAMPLES = 256
_FEW_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a model is made of.

    Attributes:
        path: The file, empty for a model in memory.
        file_bytes: Its size with external data.
        opset: Version of the default domain.
        producer: Exporter that wrote it.
        inputs: Input name to a text of type and shape.
        outputs: Output name to a text of type and shape.
        dynamic: Input name to the axes whose size is open; they are fixed with `shapes`.
        size: Nodes, weights, multiply-accumulates.
        selected: Name, op type and module path of every node that the selector takes; None without a selector.
    """

    path: str
    file_bytes: int
    opset: int
    producer: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    dynamic: Mapping[str, tuple[int, ...]]
    size: ModelSize
    selected: tuple[tuple[str, str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class RewriteResult:
    """What a rewrite did.

    Attributes:
        path: Where the model was written, None for a dry run.
        model: The rewritten model, as read back from the file if there is one.
        before: Size of the original.
        passes: What each pass did and refused.
    """

    path: Path | None
    model: ir.Model
    before: ModelSize
    passes: tuple[PassReport, ...]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What was measured.

    Attributes:
        target: Name of the target.
        threads: Threads a run.
        latency: Model name to latency; all were measured interleaved.
        ratio: Of the first model to the second, if there are two.
        node_times: Time by executed node of the first model.
        peak_memory: Peak resident bytes of the first model.
    """

    target: str
    threads: int
    latency: Mapping[str, Latency]
    ratio: Ratio | None
    node_times: tuple[NodeTime, ...]
    peak_memory: int


def export(factory: Any, out: str | os.PathLike[str], **options: Any) -> ExportResult:
    """Exports a torch module with the dynamo exporter; see `onnxcomp.export.export_module` for the options.

    Args:
        factory: `module:function` that returns a module and its example inputs, or a module.
        out: The `.onnx` file to write.
        **options: Of `export_module`.
    """
    from onnxcomp.export import export_module

    check_writable(Path(out))
    return export_module(factory, Path(out), runner=_runner(), **options)


def inspect(model: ModelLike, *, select: Select | None = None, shapes: Shapes | None = None) -> Inspection:
    """Looks at a model.

    Args:
        model: Path or model.
        select: Lists the nodes that this selector takes.
        shapes: Fixes dynamic input shapes, for the count of multiply-accumulates.
    """
    loaded = _load(model, shapes)
    selected = None
    if select is not None:
        selected = tuple(
            (n.name or "", n.op_type, (module_paths(n) or ("",))[-1]) for n in all_nodes(loaded) if select(n)
        )
    return Inspection(
        path="" if isinstance(model, ir.Model) else str(model),
        file_bytes=_file_bytes(model, loaded),
        opset=opset(loaded),
        producer=f"{loaded.producer_name or 'unknown'} {loaded.producer_version or ''}".strip(),
        inputs={v.name or "": f"{v.dtype} {v.shape}" for v in loaded.graph.inputs if not v.is_initializer()},
        outputs={v.name or "": f"{v.dtype} {v.shape}" for v in loaded.graph.outputs},
        dynamic=_dynamic(loaded),
        size=model_size(loaded),
        selected=selected,
    )


def rewrite(
    model: ModelLike,
    out: str | os.PathLike[str] | None,
    *,
    recipe: RecipeLike = "int8",
    target: str = "ort-cpu",
    data: Source | None = None,
    samples: int | None = 128,
    seed: int = 0,
    shapes: Shapes | None = None,
    check: Check = "graph",
    half: bool = False,
    progress: Progress | None = None,
) -> RewriteResult:
    """Rewrites a model with a recipe.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: The `.onnx` file to write, or None to write nothing (a dry run).
        recipe: Built-in name, path, `Recipe`, or passes.
        target: Whose capabilities the passes go by.
        data: Calibration data, all of which may be used.
        samples: Most calibration feeds to use, None for all.
        seed: Of everything random.
        shapes: Fixes dynamic input shapes.
        check: Validation after every pass.
        half: Calibrates with the first half of the data only, as `compress` does.
        progress: Told about every step.

    Raises:
        OnnxcompError: If anything is wrong with what was given; nothing is written then.
    """
    steps = _recipe(recipe).passes
    chosen = load_target(target)()
    if out is not None:
        check_writable(Path(out))
    original = _load(model, shapes)
    before = model_size(original)
    calibration = None if data is None else load_data(data, input_specs(original), seed=seed)
    if calibration is not None:
        calibration = calibration.split(samples, _EVAL_SAMPLES)[0] if half else calibration.take(samples)
    pipeline = Pipeline(passes=steps, capabilities=chosen.capabilities(), runner=_runner(), check=check, seed=seed)
    rewritten = original.clone() if isinstance(model, ir.Model) else original
    reports = pipeline.run(rewritten, calibration, progress)
    if out is not None:
        save(rewritten, out)
        rewritten = load(out)  # weights that were never in memory may have lain in a file that is replaced now
    return RewriteResult(path=None if out is None else Path(out), model=rewritten, before=before, passes=reports)


def compile(
    model: ModelLike,
    out: str | os.PathLike[str],
    *,
    target: str = "ort-cpu",
    shapes: Shapes | None = None,
) -> Artifact:
    """Compiles a model for a target into the folder `out`, with the audit of what really runs."""
    chosen = load_target(target)()
    return chosen.compile(_lower(_load(model, shapes), chosen), Path(out))


def profile(
    model: ModelLike,
    baseline: ModelLike | None = None,
    *,
    target: str = "ort-cpu",
    data: Source = "random",
    threads: int = 1,
    repeat: int = 50,
    seconds: float | None = 60.0,
    seed: int = 0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measures a model, or the folder of an artifact, on a target; with a baseline both interleaved in one process.

    Args:
        model: `.onnx` file, artifact folder, or model.
        baseline: What to compare with.
        target: Name of the target.
        data: The first feed is run.
        threads: Threads a run.
        repeat: Rounds.
        seconds: Most seconds to spend on timing.
        seed: For random data.
        shapes: Fixes dynamic input shapes.
        progress: Told about every round.
    """
    chosen = load_target(target)()
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        artifacts = {"model": _artifact(model, chosen, Path(folder, "model"), shapes)}
        if baseline is not None:
            artifacts["baseline"] = _artifact(baseline, chosen, Path(folder, "baseline"), shapes)
        sessions = {name: chosen.load(a, threads=threads) for name, a in artifacts.items()}
        feed = next(iter(load_data(data, sessions["model"].inputs, seed=seed)))
        latency = _measure(sessions, feed, repeat, seconds, progress)
        return Profile(
            target=target,
            threads=threads,
            latency=latency,
            ratio=ratio(latency["model"], latency["baseline"]) if baseline is not None else None,
            node_times=tuple(chosen.node_times(artifacts["model"], feed, threads=threads)),
            peak_memory=chosen.peak_memory(artifacts["model"], feed, threads=threads),
        )


def compare(
    reference: ModelLike,
    other: ModelLike,
    *,
    data: Source,
    metric: str | Metric | None = None,
    target: str = "ort-cpu",
    samples: int | None = None,
    threads: int = 1,
    seed: int = 0,
    shapes: Shapes | None = None,
    layers: bool = True,
    progress: Progress | None = None,
) -> Fidelity:
    """Compares a model with a reference as both run on a target, per output and per layer.

    Args:
        reference: The original.
        other: The model in question.
        data: Evaluation data.
        metric: Task metric, `module:function` or a callable.
        target: Name of the target.
        samples: Most feeds to use.
        threads: Threads a run.
        seed: For random data.
        shapes: Fixes dynamic input shapes.
        layers: Also compare layers, on the first few feeds.
        progress: Told about every feed.
    """
    chosen = load_target(target)()
    a, b = _load(reference, shapes), _load(other, shapes)
    feeds = load_data(data, input_specs(a), seed=seed).take(samples)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        sessions = [
            chosen.load(chosen.compile(_lower(m, chosen), Path(folder, str(i))), threads=threads)
            for i, m in enumerate((a, b))
        ]
        fidelity = _compare(
            sessions[0].run, sessions[1].run, feeds, data_name=feeds.name, metric=_metric(metric), progress=progress
        )
    if not layers:
        return fidelity
    return replace(fidelity, layers=compare_layers(a, b, _runner(), feeds.take(_LAYER_SAMPLES)))


def compress(
    model: ModelLike,
    out: str | os.PathLike[str],
    *,
    recipe: RecipeLike = "int8",
    target: str = "ort-cpu",
    data: Source | None = None,
    eval_data: Source | None = None,
    metric: str | Metric | None = None,
    samples: int | None = 128,
    eval_samples: int | None = _EVAL_SAMPLES,
    seed: int = 0,
    threads: int = 1,
    shapes: Shapes | None = None,
    check: Check = "graph",
    measure: bool = True,
    repeat: int = 50,
    seconds: float | None = 60.0,
    progress: Progress | None = None,
) -> Report:
    """Rewrites, compiles, profiles and compares, and writes `model.onnx`, `artifact/` and the report into `out`.

    The original is compiled and measured in the same process, interleaved with the result. Without `eval_data` the
    data is split: one half calibrates, the other evaluates.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: Folder; replaced at the end if it holds an earlier output, and refused if it holds something else.
        recipe: Built-in name, path, `Recipe`, or passes.
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
        progress: Told about every step.

    Raises:
        OnnxcompError: If anything is wrong with what was given; `out` stays as it was.
    """
    out = Path(out)
    plan = _recipe(recipe)
    scored = _metric(metric)
    if scored is not None and data is None and eval_data is None:
        raise DataError("a metric needs evaluation data as well; give some with --data or --eval-data")
    chosen = load_target(target)()
    capabilities = chosen.capabilities()
    original = _load(model, shapes)
    if not isinstance(model, ir.Model) and Path(model).resolve().is_relative_to(out.resolve()):
        raise OnnxcompError(f"{model} lies in the folder {out}, which is replaced; give another folder")
    calibration, evaluation, warnings = _split(original, data, eval_data, samples, eval_samples, seed)
    warnings += _reservations(plan, target, capabilities)
    with replacing(out) as work:
        rewritten = original.clone() if isinstance(model, ir.Model) else _load(model, shapes)
        pipeline = Pipeline(passes=plan.passes, capabilities=capabilities, runner=_runner(), check=check, seed=seed)
        passes = pipeline.run(rewritten, calibration, progress)
        save(rewritten, work / "model.onnx")
        if progress:
            progress("compile", 0, None)
        baseline = chosen.compile(_lower(original, chosen), work / "baseline")
        artifact = chosen.compile(_lower(rewritten, chosen), work / "artifact")
        sessions = {
            "before": chosen.load(baseline, threads=threads),
            "after": chosen.load(artifact, threads=threads),
        }
        fidelity = _fidelity(sessions, original, rewritten, evaluation, scored, progress)
        feeds = load_data("random", input_specs(original), seed=seed) if evaluation is None else evaluation
        feed = next(iter(feeds))
        latency = _measure(sessions, feed, repeat, seconds, progress) if measure else {}
        name = original.graph.name or "model" if isinstance(model, ir.Model) else str(model)
        before = ModelReport(
            path=name,
            file_bytes=_file_bytes(model, original),
            **_figures(original, chosen, baseline, feed, threads, latency.get("before")),
        )
        after = ModelReport(
            path=str(out / "model.onnx"),
            file_bytes=_file_bytes(work / "model.onnx", load(work / "model.onnx")),
            **_figures(rewritten, chosen, artifact, feed, threads, latency.get("after")),
        )
        report = Report(
            recipe=plan.name,
            target=target,
            threads=threads,
            environment={**environment(), "cpu features": ", ".join(capabilities.features)},
            before=before,
            after=after,
            passes=passes,
            fidelity=fidelity,
            ratio=ratio(latency["after"], latency["before"]) if measure else None,
            calibration="" if calibration is None else calibration.name,
            calibration_samples=0 if calibration is None else len(calibration),
            warnings=tuple(warnings),
            artifact=str(out / "artifact"),
            recipe_source=plan.source,
        )
        report = replace(report, warnings=(*warnings, *_findings(report)))
        shutil.rmtree(work / "baseline")
        write_report(report, work)
    return report


def list_passes() -> dict[str, str]:
    """Pass name to its summary."""
    return {name: load_pass(name).summary for name in names(PASSES)}


def list_targets() -> dict[str, str]:
    """Target name to its summary."""
    return {name: load_target(name).summary for name in names(TARGETS)}


def list_recipes() -> dict[str, str]:
    """Built-in recipe name to its summary."""
    return {name: load_recipe(name).summary for name in builtin_recipes()}


def list_ops() -> dict[str, str]:
    """Portable op to its summary."""
    from onnxcomp.ops import OPS

    return {f"onnxcomp::{name}": op.summary for name, op in OPS.items()}


def doctor() -> list[Diagnosis]:
    """Looks at what is installed and what this machine offers."""
    return diagnose()


def _runner() -> Runner:
    from onnxcomp.targets.ort.session import reference_runner

    return reference_runner


def _load(model: ModelLike, shapes: Shapes | None) -> ir.Model:
    if isinstance(model, ir.Model):
        if shapes:
            model = model.clone()
            fix_shapes(model, shapes)
        return model
    loaded = load(model)
    if shapes:
        fix_shapes(loaded, shapes)
    return loaded


def _recipe(recipe: RecipeLike) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, (str, os.PathLike)):
        return load_recipe(str(recipe))
    for step in recipe:
        if not isinstance(step, Pass):
            raise RecipeError(f"a recipe made in Python is a sequence of passes; {step!r} is none")
    return Recipe(name="custom", passes=tuple(recipe))


def _metric(metric: str | Metric | None) -> Metric | None:
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


def _lower(model: ir.Model, target: Target) -> ir.Model:
    steps = target.lowering()
    if not steps:
        return model
    lowered = model.clone()
    Pipeline(passes=steps, capabilities=target.capabilities()).run(lowered)
    return lowered


def _artifact(model: ModelLike, target: Target, folder: Path, shapes: Shapes | None) -> Artifact:
    if not isinstance(model, ir.Model) and Path(model).is_dir():
        return target.open(Path(model))
    return target.compile(_lower(_load(model, shapes), target), folder)


def _split(
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


def _fidelity(
    sessions: Mapping[str, Session],
    original: ir.Model,
    rewritten: ir.Model,
    evaluation: Data | None,
    metric: Metric | None,
    progress: Progress | None,
) -> Fidelity | None:
    if evaluation is None:
        return None

    def scored(run: Run) -> float | Mapping[str, float]:
        for session in sessions.values():
            session.reset()
        return metric(run) if metric else {}

    fidelity = _compare(
        sessions["before"].run,
        sessions["after"].run,
        evaluation,
        data_name=evaluation.name,
        seen_by_calibration=evaluation.seen_by_calibration,
        metric=scored if metric else None,
        progress=progress,
    )
    layers = compare_layers(original, rewritten, _runner(), evaluation.take(_LAYER_SAMPLES), progress=progress)
    return replace(fidelity, layers=layers)


def _measure(
    sessions: Mapping[str, Session], feed: Feed, repeat: int, seconds: float | None, progress: Progress | None
) -> dict[str, Latency]:
    def run_of(session: Session) -> Callable[[], object]:
        return lambda: session.run(feed)

    def told(done: int, total: int) -> None:
        if progress:
            progress("profile", done, total)

    return _time({k: run_of(s) for k, s in sessions.items()}, repeat=repeat, seconds=seconds, progress=told)


def _figures(
    model: ir.Model, target: Target, artifact: Artifact, feed: Feed, threads: int, latency: Latency | None
) -> dict[str, Any]:
    """The fields of a `ModelReport` that come from running the model."""
    macs = _macs(model, feed)
    figures: dict[str, Any] = {
        "size": replace(model_size(model), macs=sum(macs.values())),
        "audit": _with_macs(artifact.audit, macs),
    }
    if latency is not None:
        figures["latency"] = latency
        figures["peak_memory"] = target.peak_memory(artifact, feed, threads=threads)
        figures["node_times"] = tuple(target.node_times(artifact, feed, threads=threads))
    return figures


def _macs(model: ir.Model, feed: Feed) -> dict[str, int]:
    """Multiply-accumulates by node when the model runs `feed`, by the shapes that really occur.

    Shape inference gives up where shapes are computed, as in the attention of most exporters.
    """
    bound = model.clone()
    linear = [n for n in bound.graph if n.op_type in MAC_OPS]
    used = [v for n in linear for v in (*n.inputs, *n.outputs) if v is not None and not v.is_initializer()]
    values = {v.name or "": v for v in used}
    if values:
        for name, array in _runner()(model, list(values))(feed).items():
            values[name].shape = ir.Shape(array.shape)
    return {n.name or "": count_macs(n) for n in bound.graph.all_nodes()}


def _with_macs(audit: Audit, macs: Mapping[str, int]) -> Audit:
    return replace(audit, rows=tuple(replace(r, macs=macs.get(r.node, r.macs)) for r in audit.rows))


def _file_bytes(path: ModelLike, model: ir.Model) -> int:
    """Size of the file at `path`, which `model` was loaded from, with its external data."""
    if isinstance(path, ir.Model):
        return model_size(model).weight_bytes
    tensors = (v.const_value for v in initializers(model))
    files = {Path(t.path).resolve() for t in tensors if isinstance(t, ir.ExternalTensor)}
    return Path(path).stat().st_size + sum(f.stat().st_size for f in files)


def _dynamic(model: ir.Model) -> dict[str, tuple[int, ...]]:
    axes = {
        spec.name: tuple(i for i, size in enumerate(spec.shape or ()) if not isinstance(size, int))
        for spec in input_specs(model)
    }
    return {name: open_axes for name, open_axes in axes.items() if open_axes}
