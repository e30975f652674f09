"""The verb that makes a quantized model of another tool run in the integer kernels of a target."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.data import Data, Source, load_data
from onnxcomp.errors import DataError
from onnxcomp.model import load, save
from onnxcomp.profile import ratio
from onnxcomp.registry import load_pass
from onnxcomp.rewrite import Check, Pass, Progress
from onnxcomp.specs import input_specs
from onnxcomp.verbs.closeness import closeness_to_reference, fidelity_to
from onnxcomp.verbs.figures import audited, time_sessions
from onnxcomp.verbs.resolve import ModelLike, Shapes, compiled, load_model, make_target, pipeline_of
from onnxcomp.verbs.results import Legalization
from onnxcomp.workdir import check_writable


def legalize(
    model: ModelLike,
    out: str | os.PathLike[str] | None,
    *,
    target: str = "ort-cpu",
    exact: bool = False,
    calibrate: bool = False,
    data: Source | None = None,
    samples: int | None = 64,
    seed: int = 0,
    threads: int = 1,
    shapes: Shapes | None = None,
    check: Check = "graph",
    min_sqnr: float = 30.0,
    reference: ModelLike | None = None,
    measure: bool = False,
    repeat: int = 50,
    seconds: float | None = 60.0,
    progress: Progress | None = None,
) -> Legalization:
    """Rewrites a quantized model with `cleanup` and `legalize`, and compares the result with what it was made from.

    Both are compiled for the target: the audits say what ran on integers before and does now. The original that outputs
    are compared with is the one that the file tells, without what a runtime's optimizer makes of it. The result is
    written only if every output is that of the original up to rounding, or no further from what the original stands for
    (two roundings of one model may be further apart than each is from that), or no further from the original than the
    target itself is. If it is not, and an exact rewrite changes anything, that is taken.

    Args:
        model: Path or model; a model in memory is left unchanged.
        out: The `.onnx` file to write, or None to write nothing (a dry run).
        target: Name of the target.
        exact: Keep every integer of the model what it is, even where that leaves an op in float.
        calibrate: Also quantize tensors whose range the graph does not tell; one half of `data` tells it, and the
            outputs are compared on the other.
        data: Feeds to compare the outputs on; random ones by default, which tell less.
        samples: Most feeds to calibrate with, and to compare on; None for all.
        seed: Of everything random.
        threads: Threads a run.
        shapes: Fixes dynamic input shapes.
        check: Validation after every pass.
        min_sqnr: SQNR in dB to the original from which on an output is taken for the same.
        reference: The float model that the original was made from. By default the original without rounding, where
            `min_sqnr` is missed and that can be told.
        measure: Whether to measure both models, interleaved.
        repeat: Rounds of timing.
        seconds: Most seconds to spend on timing.
        progress: Told about every step.

    Raises:
        OnnxcompError: If anything is wrong with what was given; nothing is written then.
    """
    if calibrate and data is None:
        raise DataError("calibration needs data; give some with --data")
    make_target(target).require_device()
    if out is not None:
        check_writable(Path(out))
    original = load_model(model, shapes)
    calibration, evaluation = _data(original, data, samples, seed, calibrate)
    attempt = partial(
        _attempt,
        model,
        original,
        target=target,
        calibration=calibration,
        evaluation=evaluation,
        seed=seed,
        threads=threads,
        shapes=shapes,
        check=check,
        min_sqnr=min_sqnr,
        reference=None if reference is None else load_model(reference, shapes),
        timing=(repeat, seconds) if measure else None,
        progress=progress,
    )
    found = attempt(_passes(exact, calibrate))
    if not found.accepted and not exact:
        careful = attempt(_passes(exact=True, calibrate=False))
        if careful.accepted and careful.passes[-1].applied:
            found = replace(careful, exact=True, refused_sqnr=found.fidelity.worst_sqnr)
    found = replace(found, exact=found.exact or exact)
    if out is None or not found.accepted:
        return found
    save(found.model, out)
    return replace(found, path=Path(out), model=load(out))  # its weights may have lain in a file that is replaced now


def _attempt(
    model: ModelLike,
    original: ir.Model,
    steps: Sequence[Pass],
    *,
    target: str,
    calibration: Data | None,
    evaluation: Data,
    seed: int,
    threads: int,
    shapes: Shapes | None,
    check: Check,
    min_sqnr: float,
    reference: ir.Model | None,
    timing: tuple[int, float | None] | None,
    progress: Progress | None,
) -> Legalization:
    """One rewrite and what there is to know about it; nothing is written."""
    chosen = make_target(target)
    rewritten = original.clone() if isinstance(model, ir.Model) else load_model(model, shapes)
    passes = pipeline_of(steps, chosen, check, seed).run(rewritten, calibration, progress)
    feed = next(iter(evaluation))
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        if progress:
            progress("compile", 0, None)
        models = {"before": original, "after": rewritten}
        artifacts = {name: compiled(m, chosen, Path(folder, name)) for name, m in models.items()}
        audits = {name: audited(m, artifacts[name], feed)[1] for name, m in models.items()}
        sessions = {name: chosen.load(a, threads=threads) for name, a in artifacts.items()}
        fidelity, runtime = (
            fidelity_to(original, sessions[name], evaluation, threads, progress) for name in ("after", "before")
        )
        found = Legalization(
            path=None,
            model=rewritten,
            target=target,
            threads=threads,
            passes=passes,
            before=audits["before"],
            after=audits["after"],
            fidelity=fidelity,
            runtime=runtime,
            min_sqnr=min_sqnr,
        )
        if reference is not None or not found.accepted:
            name, figures = closeness_to_reference(
                original, sessions["after"], reference, evaluation, threads, progress
            )
            found = replace(found, reference=name, to_reference=figures)
        if timing is not None:
            latency = time_sessions(sessions, [feed], *timing, progress)
            found = replace(found, latency=latency, ratio=ratio(latency["after"], latency["before"]))
    return found


def _passes(exact: bool, calibrate: bool) -> tuple[Pass, ...]:
    options: dict[str, Any] = {name: True for name, given in (("exact", exact), ("calibrate", calibrate)) if given}
    return load_pass("cleanup")(), load_pass("legalize")(**options)


def _data(
    model: ir.Model, data: Source | None, samples: int | None, seed: int, calibrate: bool
) -> tuple[Data | None, Data]:
    """Feeds to calibrate with, if any, and feeds to compare on."""
    found = load_data("random" if data is None else data, input_specs(model), seed=seed)
    if data is None or not calibrate:
        return None, found.take(samples)
    return found.split(samples, samples)
