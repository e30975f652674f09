"""How close a legalized model is to what the file of the original told, and to what the original stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxcomp.compare import Fidelity, Run, compare
from onnxcomp.data import Data
from onnxcomp.errors import GraphError
from onnxcomp.rewrite import Progress
from onnxcomp.specs import input_specs
from onnxcomp.target import Array, Feed, Session
from onnxcomp.unrounded import unrounded

GIVEN, UNROUNDED = "the reference", "the original without rounding"


def fidelity_to(original: ir.Model, session: Session, data: Data, threads: int, progress: Progress | None) -> Fidelity:
    """Compares a session with the original as its file tells it."""
    session.reset()
    return _compared(_as_written(original, _outputs(session), threads), session.run, data, progress)


def closeness_to_reference(
    original: ir.Model,
    session: Session,
    reference: ir.Model | None,
    data: Data,
    threads: int,
    progress: Progress | None,
) -> tuple[str, Mapping[str, Fidelity]]:
    """Compares the original as its file tells it, and a session, with what the original stands for.

    Args:
        original: The quantized model.
        session: What was made of it.
        reference: The float model that it came from; None for the original without rounding.
        data: Feeds of the original.
        threads: Threads a run.
        progress: Told about every feed.

    Returns:
        What it was compared with, and the figures of the original, `before`, and the session, `after`; empty if no
        reference is given and none can be made.

    Raises:
        GraphError: If the reference has not the outputs of the original.
        DataError: If it takes other feeds.
    """
    name, model = (UNROUNDED, unrounded(original)) if reference is None else (GIVEN, reference)
    if model is None:
        return "", {}
    outputs = _outputs(session)
    found = [v.name for v in model.graph.outputs]
    if missing := [output for output in outputs if output not in found]:
        raise GraphError(f"the reference has no output {missing[0]!r}, which the model has; it has {found}")
    session.reset()
    runs: dict[str, Run] = {"before": _as_written(original, outputs, threads), "after": session.run}
    return name, {
        k: _compared(_casting(_as_written(model, outputs, threads), model), run, data, progress)
        for k, run in runs.items()
    }


def _outputs(session: Session) -> list[str]:
    return [spec.name for spec in session.outputs]


def _as_written(model: ir.Model, outputs: Sequence[str], threads: int) -> Run:
    """Runs a model op by op, without what a runtime's optimizer makes of it; streaming state starts anew."""
    from onnxcomp.targets.ort.session import reference_runner

    return reference_runner(model, outputs, threads=threads, optimize=False)


def _casting(run: Run, model: ir.Model) -> Run:
    """Takes feeds in another float type than the model has."""
    kinds = {spec.name: spec.dtype for spec in input_specs(model)}

    def cast(name: str, array: Array) -> Array:
        kind = kinds.get(name, array.dtype)
        return array.astype(kind) if array.dtype.kind == kind.kind == "f" else array

    def run_cast(feed: Feed) -> Mapping[str, Array]:
        return run({name: cast(name, array) for name, array in feed.items()})

    return run_cast


def _compared(reference: Run, other: Run, data: Data, progress: Progress | None) -> Fidelity:
    return compare(
        reference,
        other,
        data,
        data_name=data.name,
        seen_by_calibration=data.seen_by_calibration,
        progress=progress,
    )
