"""Runs an ONNX model on a device that has Python, NumPy and onnxruntime, and nothing else of ours.

This file is sent to the device and run there by itself. Its command line and what it prints are those of the runner of
TVM artifacts; the first argument is the model file. Streaming state is taken from the manifest beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

BAD_INPUT, CANNOT_LOAD = 2, 3


def main(arguments: list[str]) -> int:
    """Runs the command line; gives the exit code."""
    parser = argparse.ArgumentParser(prog="ort_run")
    parser.add_argument("model", type=Path)
    parser.add_argument("--input", action="append", default=[], metavar="NAME=FILE.npy")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--native", type=Path, help="library of custom ops")
    options = parser.parse_args(arguments)
    try:
        session, states, load_ms = _load(options)
    except Exception as error:  # onnxruntime's exceptions have no common root below Exception
        return _fail(CANNOT_LOAD, error)
    try:
        print(json.dumps({"load_ms": load_ms, **_run(options, session, states)}))
    except Exception as error:
        return _fail(BAD_INPUT, error)
    return 0


def _fail(code: int, error: Exception) -> int:
    print(" ".join(f"{type(error).__name__}: {error}".split())[:1000], file=sys.stderr)
    return code


def _load(options: argparse.Namespace) -> tuple[Any, list[dict[str, Any]], float]:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if options.native is not None:
        settings.register_custom_ops_library(str(options.native.resolve()))
    started = time.perf_counter()
    session = onnxruntime.InferenceSession(str(options.model), settings, providers=["CPUExecutionProvider"])
    load_ms = 1e3 * (time.perf_counter() - started)
    manifest = json.loads((options.model.parent / "manifest.json").read_text(encoding="utf-8"))
    return session, manifest.get("state", []), load_ms


def _run(options: argparse.Namespace, session: Any, states: list[dict[str, Any]]) -> dict[str, Any]:
    import numpy as np

    given = {}
    for text in options.input:
        name, _, file = text.rpartition("=")
        given[name] = np.load(file, allow_pickle=False)
    steps = options.steps or 1
    feeds = [{k: v[i] for k, v in given.items()} for i in range(steps)] if options.steps else [given]
    state = {s["input"]: np.zeros(s["shape"], s["dtype"]) for s in states}
    names = [o.name for o in session.get_outputs()]

    def step(index: int) -> tuple[dict[str, Any], float]:
        started = time.perf_counter()
        found = dict(zip(names, session.run(names, {**feeds[index % steps], **state}), strict=True))
        taken = 1e3 * (time.perf_counter() - started)
        state.update({s["input"]: found[s["output"]] for s in states})
        return found, taken

    found, times = zip(*(step(i) for i in range(steps)), strict=True)
    first_ms, later = times[0], list(times[1:])
    files = {}
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        for position, name in enumerate(n for n in names if n not in {s["output"] for s in states}):
            files[name] = f"{position}.npy"
            arrays = [outputs[name] for outputs in found]
            np.save(options.out / files[name], np.stack(arrays) if options.steps else arrays[0])
    if options.repeat:
        later = []
        for i in range(options.warmup):
            step(i)
        ends = float("inf") if options.seconds is None else time.perf_counter() + options.seconds
        while len(later) < options.repeat and (not later or time.perf_counter() < ends):
            later.append(step(options.warmup + len(later))[1])
    return {
        "first_ms": first_ms,
        "latency_ms": _summary(np.asarray(later)) if later else None,
        "samples": len(later),
        "threads": options.threads,
        "peak_rss_bytes": _peak(),
        "steps": steps,
        "outputs": files,
    }


def _summary(times: Any) -> dict[str, float]:
    import numpy as np

    percentiles = {f"p{q}": float(np.percentile(times, q)) for q in (10, 90, 99)}
    return {
        "median": float(np.median(times)),
        **percentiles,
        "min": float(times.min()),
        "mean": float(times.mean()),
    }


def _peak() -> int:
    """Peak resident bytes; what `getrusage` tells may be of the process that started this one."""
    with open("/proc/self/status", encoding="utf-8") as lines:
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
