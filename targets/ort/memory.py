"""Loads a model, runs it and prints the peak memory of this process.

Started as a process of its own, with nothing imported but onnxruntime and NumPy, so that the figure is that of the
model in use and not of the toolkit. The argument is a JSON file with the keys `model`, `feed` (an .npz file), `library`
(path or null), `providers` (names and options), `threads`, `runs`, and `in_place`, pairs of an input and an output that
have one buffer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def peak_bytes() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would not do: a child inherits its parent's peak across fork and exec.
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(job_path: str) -> None:
    """Does what the job file says."""
    import numpy as np
    import onnxruntime

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if job["library"]:
        options.register_custom_ops_library(job["library"])
    names, settings = zip(*job["providers"], strict=True)
    session = onnxruntime.InferenceSession(
        job["model"], options, providers=list(names), provider_options=list(settings), enable_fallback=0
    )
    if set(names) - set(session.get_providers()):
        sys.exit(f"onnxruntime loaded {session.get_providers()} and not {list(names)}")
    with np.load(job["feed"], allow_pickle=False) as archive:
        feed = {name: archive[f"array_{index}"] for index, name in enumerate(job["inputs"])}
    run = _bound(session, feed, job["in_place"]) if job["in_place"] else lambda: session.run(None, feed)
    for _ in range(job["runs"]):
        run()
    print(json.dumps({"peak_bytes": peak_bytes()}))


def _bound(session: Any, feed: Mapping[str, Any], in_place: Sequence[tuple[str, str]]) -> Callable[[], None]:
    """A run in which an input and an output of each pair have one buffer."""
    import onnxruntime

    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for output in session.get_outputs():
        binding.bind_output(output.name, "cpu")
    for source, target in in_place:
        binding.bind_ortvalue_output(target, values[source])
    return lambda: session.run_with_iobinding(binding)


if __name__ == "__main__":
    main(sys.argv[1])
