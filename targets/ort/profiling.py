"""Time per executed node, from onnxruntime's profiler, and peak memory, from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import native
from onnxcomp.errors import DeviceError, RecipeError
from onnxcomp.feeds import check_feed
from onnxcomp.manifest import tensor_specs
from onnxcomp.state import StateSpec
from onnxcomp.target import Artifact, Feed, NodeTime
from onnxcomp.targets.ort import memory
from onnxcomp.targets.ort.manifest import model_file, providers_of
from onnxcomp.targets.ort.runtime import make_session, session_options
from onnxcomp.targets.ort.session import OrtSession

_WARMUP = 3
_SUFFIX = "_kernel_time"
_MEMORY_RUNS = 3
_MEMORY_SECONDS = 600


def node_times(artifact: Artifact, feed: Feed, *, threads: int, repeat: int) -> tuple[NodeTime, ...]:
    """Mean time of every executed node over `repeat` runs, in execution order.

    The profiler counts whole microseconds and adds a few to each node, so the sum exceeds the latency of a run.

    Raises:
        DataError: If the feed does not fit.
        DeviceError: If the run fails.
        RecipeError: If `repeat` is below 1.
    """
    if repeat < 1:
        raise RecipeError(f"repeat must be at least 1, not {repeat}")
    with tempfile.TemporaryDirectory(prefix="onnxcomp-profile-") as folder:
        options = session_options(threads=threads, domains=artifact.manifest["opsets"])
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "profile"))
        inner = make_session(model_file(artifact, feed), options)
        try:
            session = OrtSession(inner, states(artifact))
            for _ in range(_WARMUP + repeat):
                session.run(feed)
        finally:
            written = inner.end_profiling()
        events = json.loads(Path(written).read_text(encoding="utf-8"))
    return summarize(events, repeat)


def states(artifact: Artifact) -> tuple[StateSpec, ...]:
    """Streaming state of an artifact."""
    return tuple(StateSpec.model_validate(s) for s in artifact.manifest["state"])


def summarize(events: Sequence[Mapping[str, Any]], repeat: int) -> tuple[NodeTime, ...]:
    """Mean time of each node over the last `repeat` runs of a profile.

    A node with a body (If, Loop, Scan) is charged with its own time only, without that of the nodes in the body.

    Args:
        events: The profiler's events.
        repeat: Number of runs to count, from the end.
    """
    runs = sorted(e["ts"] for e in events if e.get("name") == "model_run")
    start = runs[-repeat] if len(runs) >= repeat else 0
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX) and e["ts"] >= start]
    kernels.sort(key=lambda e: (e["ts"], -e["dur"]))
    total: dict[tuple[str, str], float] = defaultdict(float)
    open_nodes: list[tuple[int, tuple[str, str]]] = []  # end and key of the nodes around the present one
    for event in kernels:
        key = (event["name"].removesuffix(_SUFFIX), event["args"].get("op_name", ""))
        end = event["ts"] + event["dur"]
        while open_nodes and open_nodes[-1][0] < end:
            open_nodes.pop()
        if open_nodes and open_nodes[-1][1][1] in {"If", "Loop", "Scan"}:
            total[open_nodes[-1][1]] -= event["dur"]
        total[key] += event["dur"]
        open_nodes.append((end, key))
    count = max(1, min(repeat, len(runs)))
    return tuple(
        NodeTime(node=name, op_type=op_type, microseconds=max(0.0, time / count))
        for (name, op_type), time in total.items()
    )


def peak_memory(artifact: Artifact, feed: Feed, *, threads: int) -> int:
    """Peak resident memory in bytes of a process that only loads the artifact and runs it.

    That includes the interpreter and the runtime, about 60 MB.

    Raises:
        DataError: If the feed does not fit.
        DeviceError: If the process fails.
    """
    check_feed(feed, tensor_specs(artifact.manifest["inputs"]))
    arrays = {**feed, **{s.input: s.zeros() for s in states(artifact)}}
    strings = any(entry["dtype"] == "string" for entry in artifact.manifest["inputs"] + artifact.manifest["outputs"])
    library = native.library_path() if native.DOMAIN in artifact.manifest["opsets"] else None
    with tempfile.TemporaryDirectory(prefix="onnxcomp-memory-") as folder:
        job = Path(folder, "job.json")
        job.write_text(
            json.dumps(
                {
                    "model": str((model_file(artifact, feed)).resolve()),
                    "feed": str(Path(folder, "feed.npz")),
                    "inputs": list(arrays),
                    "library": None if library is None else str(library),
                    "providers": [(p.name, p.options) for p in providers_of(artifact)],
                    "threads": threads,
                    "runs": _MEMORY_RUNS,
                    "in_place": [] if strings else [(s.input, s.output) for s in states(artifact) if s.in_place],
                }
            ),
            encoding="utf-8",
        )
        plain = (a.astype(str) if a.dtype.kind == "O" else a for a in arrays.values())
        named: dict[str, Any] = {f"array_{i}": a for i, a in enumerate(plain)}
        np.savez(Path(folder, "feed.npz"), **named)
        # The file is run by path: as a module its parent packages would be imported, and counted.
        code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, memory.__file__, str(job)],
                capture_output=True, text=True, check=False, timeout=_MEMORY_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"the process that measures memory did not end in {_MEMORY_SECONDS} s") from error
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise DeviceError(f"the process that measures memory failed: {last}")
    return int(json.loads(done.stdout.splitlines()[-1])["peak_bytes"])
