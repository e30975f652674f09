"""Verbs that run models: how fast they are, and how close to each other."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import overload

from onnxcomp.break_even import BreakEven
from onnxcomp.compare import Fidelity, Metric, compare_layers
from onnxcomp.compare import compare as compare_outputs
from onnxcomp.data import Source, load_data
from onnxcomp.device import Device, DeviceProfile
from onnxcomp.errors import GraphError, RecipeError
from onnxcomp.passes._dense import find_dense
from onnxcomp.profile import ratio
from onnxcomp.rewrite import Progress
from onnxcomp.specs import input_specs
from onnxcomp.verbs.devices import profile_on
from onnxcomp.verbs.figures import LAYER_SAMPLES, check_drop, time_sessions
from onnxcomp.verbs.resolve import (
    ModelLike,
    Shapes,
    artifact_of,
    as_metric,
    compiled,
    load_model,
    make_target,
    reference_runner,
    target_for,
)
from onnxcomp.verbs.results import Profile


@overload
def profile(
    model: ModelLike,
    baseline: ModelLike | None = ...,
    *,
    device: None = ...,
    target: str | None = ...,
    data: Source = ...,
    threads: int = ...,
    repeat: int = ...,
    seconds: float | None = ...,
    seed: int = ...,
    shapes: Shapes | None = ...,
    progress: Progress | None = ...,
) -> Profile: ...
@overload
def profile(
    model: ModelLike,
    baseline: None = ...,
    *,
    device: str | Device,
    target: str | None = ...,
    data: Source = ...,
    threads: int = ...,
    repeat: int = ...,
    seconds: float | None = ...,
    seed: int = ...,
    shapes: Shapes | None = ...,
    progress: Progress | None = ...,
) -> DeviceProfile: ...
def profile(
    model: ModelLike,
    baseline: ModelLike | None = None,
    *,
    device: str | Device | None = None,
    target: str | None = None,
    data: Source = "random",
    threads: int = 1,
    repeat: int = 50,
    seconds: float | None = 60.0,
    seed: int = 0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> Profile | DeviceProfile:
    """Measures a model, or the folder of an artifact, on a target; with a baseline both interleaved in one process.

    Args:
        model: `.onnx` file, artifact folder, or model.
        baseline: What to compare with; not on a device.
        device: Where to run; by default in this process.
        target: Name of the target; by default that of the artifact, else `ort-cpu`.
        data: The first feed is run.
        threads: Threads a run.
        repeat: Rounds.
        seconds: Most seconds to spend on timing.
        seed: For random data.
        shapes: Fixes dynamic input shapes.
        progress: Told about every round.
    """
    if device is not None:
        if baseline is not None:
            raise RecipeError("a device measures one model at a time; profile the baseline by itself")
        return profile_on(
            device, model, target=target, data=data, threads=threads, repeat=repeat, seconds=seconds, seed=seed,
            shapes=shapes,
        )  # fmt: skip
    chosen = target_for(model, target)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        artifacts = {"model": artifact_of(model, chosen, Path(folder, "model"), shapes)}
        if baseline is not None:
            artifacts["baseline"] = artifact_of(baseline, chosen, Path(folder, "baseline"), shapes)
        sessions = {name: chosen.load(a, threads=threads) for name, a in artifacts.items()}
        feed = next(iter(load_data(data, sessions["model"].inputs, seed=seed)))
        latency = time_sessions(sessions, [feed], repeat, seconds, progress)
        return Profile(
            target=target or chosen.name,
            threads=threads,
            latency=latency,
            ratio=ratio(latency["model"], latency["baseline"]) if baseline is not None else None,
            node_times=tuple(chosen.node_times(artifacts["model"], feed, threads=threads)),
            peak_memory=chosen.peak_memory(artifacts["model"], feed, threads=threads),
            carries_state=bool(sessions["model"].states),
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
    require_drop: bool = False,
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
        require_drop: Fail at once if `Fidelity.drop` would be None.
        progress: Told about every feed.
    """
    chosen = make_target(target)
    scored = as_metric(metric)
    a, b = load_model(reference, shapes), load_model(other, shapes)
    feeds = load_data(data, input_specs(a), seed=seed).take(samples)
    if require_drop and scored is None:
        check_drop(a, feeds)
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        sessions = [
            chosen.load(compiled(m, chosen, Path(folder, str(i))), threads=threads) for i, m in enumerate((a, b))
        ]
        fidelity = compare_outputs(
            sessions[0].run, sessions[1].run, feeds, data_name=feeds.name, metric=scored, progress=progress
        )
    if not layers:
        return fidelity
    return replace(fidelity, layers=compare_layers(a, b, reference_runner(), feeds.take(LAYER_SAMPLES)))


def calibrate_target(
    target: str = "ort-cpu", model: ModelLike | None = None, *, threads: int = 1, progress: Progress | None = None
) -> tuple[BreakEven, ...]:
    """Measures on this machine from which sparsity on the target's sparse kernels beat its dense ones.

    The result is kept, and decides from then on which products `threshold` makes sparse and how they are compiled.

    Args:
        target: Name of the target.
        model: Model whose products are measured; by default products of common shapes.
        threads: Threads a run.
        progress: Told about every case.

    Raises:
        OnnxcompError: If the target has no sparse kernels, or the model no product that fits them.
    """
    chosen = make_target(target)
    shapes: tuple[tuple[int, int], ...] = ()
    if model is not None:
        dense, _ = find_dense(load_model(model, None))
        shapes = tuple(dict.fromkeys((d.inputs, d.outputs) for d in dense if d.inputs % 32 == d.outputs % 32 == 0))
        if not shapes:
            raise GraphError("the model has no product with a constant matrix whose sides are multiples of 32")

    def told(done: int, total: int) -> None:
        if progress:
            progress("measure", done, total)

    return tuple(chosen.calibrate(shapes, threads=threads, progress=told))
