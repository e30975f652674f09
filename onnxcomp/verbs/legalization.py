"""The verb that makes a quantized model of another tool run in the integer kernels of a target."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.compare import compare
from onnxcomp.data import Data, Source, load_data
from onnxcomp.errors import DataError
from onnxcomp.model import input_specs, load, save
from onnxcomp.profile import ratio
from onnxcomp.registry import load_pass
from onnxcomp.rewrite import Check, Pass, Progress
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
    measure: bool = False,
    repeat: int = 50,
    seconds: float | None = 60.0,
    progress: Progress | None = None,
) -> Legalization:
    """Rewrites a quantized model with `cleanup` and `legalize`, and compares the result with what it was made from.

    Both are compiled for the target: the audits say what ran on integers before and does now. The result is written
    only if its outputs are those of the original, up to rounding.

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
        min_sqnr: Lowest SQNR in dB, of the worst output against the original, with which the result is written.
        measure: Whether to measure both models, interleaved.
        repeat: Rounds of timing.
        seconds: Most seconds to spend on timing.
        progress: Told about every step.

    Raises:
        OnnxcompError: If anything is wrong with what was given; nothing is written then.
    """
    if calibrate and data is None:
        raise DataError("calibration needs data; give some with --data")
    steps = _passes(exact, calibrate)
    chosen = make_target(target)
    if out is not None:
        check_writable(Path(out))
    original = load_model(model, shapes)
    calibration, evaluation = _data(original, data, samples, seed, calibrate)
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
        fidelity = compare(
            sessions["before"].run,
            sessions["after"].run,
            evaluation,
            data_name=evaluation.name,
            seen_by_calibration=evaluation.seen_by_calibration,
            progress=progress,
        )
        latency = time_sessions(sessions, feed, repeat, seconds, progress) if measure else {}
    found = Legalization(
        path=None,
        model=rewritten,
        target=target,
        threads=threads,
        passes=passes,
        before=audits["before"],
        after=audits["after"],
        fidelity=fidelity,
        min_sqnr=min_sqnr,
        latency=latency,
        ratio=ratio(latency["after"], latency["before"]) if measure else None,
    )
    if out is None or not found.accepted:
        return found
    save(rewritten, out)
    return replace(found, path=Path(out), model=load(out))  # its weights may have lain in a file that is replaced now


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
