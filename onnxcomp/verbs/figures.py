"""What running the models tells: fidelity, times, multiply-accumulates."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.compare import Fidelity, Metric, Run, compare, compare_layers
from onnxcomp.data import Data
from onnxcomp.errors import DataError, RecipeError
from onnxcomp.macs import MAC_OPS, count_macs
from onnxcomp.model import ModelSize, model_size
from onnxcomp.profile import Latency, measure
from onnxcomp.rewrite import Progress
from onnxcomp.state import model_state
from onnxcomp.target import Artifact, Audit, Feed, Session, Target
from onnxcomp.verbs.resolve import reference_runner

LAYER_SAMPLES = 4
"""Feeds on which layers are compared."""


def check_drop(model: ir.Model, data: Data | None) -> None:
    """Fails before long work when the drop of a model without a metric could not be told after it.

    Raises:
        DataError: If there is no data.
        RecipeError: If no output of the model looks like class scores on the first feed.
    """
    if data is None:
        raise DataError("a drop is told on evaluation data; give some with --data or --eval-data")
    feed = next(iter(data))
    state = {s.output for s in model_state(model)}
    names = [name for v in model.graph.outputs if (name := v.name or "") not in state]
    outputs: dict[str, Any] = reference_runner()(model, names)(feed)
    if not all(isinstance(v, np.ndarray) and v.size for v in outputs.values()):
        return  # a later feed may have elements
    if compare(lambda _: outputs, lambda _: outputs, [feed], data_name=data.name).drop() is None:
        shapes = ", ".join(f"{name} {'x'.join(map(str, v.shape)) or 'scalar'}" for name, v in outputs.items())
        raise RecipeError(
            "--max-drop needs --metric, or an output with class scores; use --min-sqnr instead "
            f"(the outputs are {shapes}; class scores have 2 or 3 dimensions, or are integers)"
        )


def fidelity_of(
    sessions: Mapping[str, Session],
    original: ir.Model,
    rewritten: ir.Model,
    evaluation: Data | None,
    metric: Metric | None,
    progress: Progress | None,
) -> Fidelity | None:
    """Compares the session `after` with `before`, and the layers of the two models; None without data."""
    if evaluation is None:
        return None

    def scored(run: Run) -> float | Mapping[str, float]:
        for session in sessions.values():
            session.reset()
        return metric(run) if metric else {}

    fidelity = compare(
        sessions["before"].run,
        sessions["after"].run,
        evaluation,
        data_name=evaluation.name,
        seen_by_calibration=evaluation.seen_by_calibration,
        metric=scored if metric else None,
        progress=progress,
    )
    layers = compare_layers(original, rewritten, reference_runner(), evaluation.take(LAYER_SAMPLES), progress=progress)
    return replace(fidelity, layers=layers)


def time_sessions(
    sessions: Mapping[str, Session],
    feeds: Sequence[Feed],
    repeat: int,
    seconds: float | None,
    progress: Progress | None,
) -> dict[str, Latency]:
    """Latency of every session, measured interleaved.

    Args:
        sessions: Name to session.
        feeds: What a run takes: each round the next one, over and over from a reset; all sessions the same in a round.
        repeat: Rounds.
        seconds: Most time to spend.
        progress: Told about every round.
    """

    def run_of(session: Session) -> Callable[[], object]:
        steps = itertools.cycle(range(len(feeds)))

        def run() -> object:
            step = next(steps)
            if step == 0:
                session.reset()
            return session.run(feeds[step])

        return (lambda: session.run(feeds[0])) if len(feeds) == 1 else run

    def told(done: int, total: int) -> None:
        if progress:
            progress("profile", done, total)

    return measure({k: run_of(s) for k, s in sessions.items()}, repeat=repeat, seconds=seconds, progress=told)


def figures(
    model: ir.Model, target: Target, artifact: Artifact, feed: Feed, threads: int, latency: Latency | None
) -> dict[str, Any]:
    """The fields of a `ModelReport` that come from running the model."""
    size, audit = audited(model, artifact, feed)
    found: dict[str, Any] = {"size": size, "audit": audit}
    if latency is not None:
        found["latency"] = latency
        found["peak_memory"] = target.peak_memory(artifact, feed, threads=threads)
        found["node_times"] = tuple(target.node_times(artifact, feed, threads=threads))
    return found


def audited(model: ir.Model, artifact: Artifact, feed: Feed) -> tuple[ModelSize, Audit]:
    """Size of a model and audit of its artifact, with the multiply-accumulates of a run on `feed`."""
    macs = _macs(model, feed)
    rows = tuple(replace(r, macs=macs.get(r.node, r.macs)) for r in artifact.audit.rows)
    return replace(model_size(model), macs=sum(macs.values())), replace(artifact.audit, rows=rows)


def _macs(model: ir.Model, feed: Feed) -> dict[str, int]:
    """Multiply-accumulates by node when the model runs `feed`, by the shapes that really occur.

    Shape inference gives up where shapes are computed, as in the attention of most exporters.
    """
    bound = model.clone()
    linear = [n for n in bound.graph if n.op_type in MAC_OPS]
    used = [v for n in linear for v in (*n.inputs, *n.outputs) if v is not None and not v.is_initializer()]
    values = {v.name or "": v for v in used}
    if values:
        for name, array in reference_runner()(model, list(values))(feed).items():
            values[name].shape = ir.Shape(array.shape)
    return {n.name or "": count_macs(n) for n in bound.graph.all_nodes()}
