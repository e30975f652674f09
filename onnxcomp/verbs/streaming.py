"""The verb that runs a sequence as a stream, and the page that shows what it took."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from onnxcomp import plots, templates
from onnxcomp.data import Source, load_data
from onnxcomp.errors import OnnxcompError, RecipeError
from onnxcomp.report import write_whole
from onnxcomp.rewrite import Progress
from onnxcomp.stream_profile import StreamProfile
from onnxcomp.stream_timing import profile_sessions
from onnxcomp.verbs.resolve import ModelLike, Shapes, artifact_of, target_for
from onnxcomp.verbs.sparsity_page import check_page


def profile_stream(
    model: ModelLike,
    baseline: ModelLike | None = None,
    *,
    data: Source,
    target: str | None = None,
    samples: int | None = None,
    threads: int = 1,
    repeat: int = 50,
    seconds: float | None = 60.0,
    shapes: Shapes | None = None,
    progress: Progress | None = None,
) -> StreamProfile:
    """Measures what every step of a stream takes; with a baseline both interleaved step by step in one process.

    Args:
        model: `.onnx` file, artifact folder, or model; with state or without.
        baseline: What to compare with, as the model for single frames. It takes the same inputs.
        data: The sequence, whose feeds are run in order after a reset; all of it is held in memory.
        target: Name of the target; by default that of the artifact, else `ort-cpu`.
        samples: Most steps to use.
        threads: Threads a run.
        repeat: Passes through the sequence.
        seconds: Most seconds to spend on timing, after which 5 passes suffice.
        shapes: Fixes dynamic input shapes.
        progress: Told about every pass.

    Raises:
        RecipeError: If the data is random, of which no two steps have anything in common.
        DataError: If the sequence does not fit, or has fewer than two steps.
    """
    if isinstance(data, str) and data == "random":
        raise RecipeError("a stream is measured on a sequence of real inputs; give it as data instead of random")
    chosen = target_for(model, target)

    def told(done: int, total: int) -> None:
        if progress:
            progress("profile", done, total)

    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        artifacts = {"model": artifact_of(model, chosen, Path(folder, "model"), shapes)}
        if baseline is not None:
            artifacts["baseline"] = artifact_of(baseline, chosen, Path(folder, "baseline"), shapes)
        sessions = {name: chosen.load(a, threads=threads) for name, a in artifacts.items()}
        feeds = load_data(data, sessions["model"].inputs).take(samples)
        return profile_sessions(
            sessions, list(feeds), target=target or chosen.name, threads=threads, data=feeds.name, repeat=repeat,
            seconds=seconds, progress=told,
        )  # fmt: skip


def write_stream_page(profile: StreamProfile, path: str | os.PathLike[str], *, model: str = "model") -> None:
    """Writes one HTML page that loads nothing, with density and latency over the steps; whole or not at all.

    The plot needs matplotlib, without which there are tables only. The same profile gives the same bytes.

    Args:
        profile: As `profile_stream` returns it.
        path: A file that ends in `.html`, in a folder that exists; replaced if it is there.
        model: What the model is called, in the title.

    Raises:
        OnnxcompError: If the page cannot be written there.
    """
    check_page(path)
    plot = ""
    if plots.available():
        times = {"model": [s.model_ms for s in profile.steps]}
        if profile.baseline is not None:
            times = {"baseline": [s.baseline_ms or 0.0 for s in profile.steps], **times}
        densities = {"input": [s.density for s in profile.steps], "state": [s.state_density for s in profile.steps]}
        shown = {k: v for k, v in densities.items() if any(d is not None for d in v)}
        plot = plots.stream(shown, times, [s.error for s in profile.steps])
    text = templates.page("stream.html.jinja", {"profile": profile, "model": model, "plot": plot})
    try:
        write_whole(Path(path), text)
    except OSError as error:
        raise OnnxcompError(f"cannot write {path}: {error.strerror or error}") from error
