"""Time per kernel, by hooks of TVM's virtual machine, and peak memory, from the runner in a process of its own."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import DeviceError
from onnxcomp.feeds import check_feed
from onnxcomp.manifest import tensor_specs
from onnxcomp.target import Artifact, Feed, NodeTime
from onnxcomp.targets.tvm.runner_build import deploy
from onnxcomp.targets.tvm.session import Loaded

_WARMUP = 2
_MEMORY_RUNS = 3
_MEMORY_SECONDS = 600
_RUNTIME = "vm."  # functions of the virtual machine itself: memory and shapes


def node_times(artifact: Artifact, feed: Feed, *, threads: int, repeat: int) -> tuple[NodeTime, ...]:
    """Mean time of every call of a kernel over `repeat` runs, in the order of the calls.

    Names are those of kernels. Several nodes of one shape share one, so its calls are numbered. The hook adds about a
    microsecond to each.

    Raises:
        DataError: If the feed does not fit.
        DeviceError: If the run fails.
    """
    loaded = Loaded(artifact, threads)
    check_feed(feed, loaded.inputs)
    values = {
        **{name: loaded.placed(array) for name, array in feed.items()},
        **{s.input: loaded.placed(s.zeros()) for s in loaded.states},
    }
    clock = _Clock(loaded.device)
    loaded.machine.set_instrument(clock)
    for run in range(_WARMUP + repeat):
        clock.begin(counts=run >= _WARMUP)
        loaded.run(values)
    return tuple(
        NodeTime(
            node=f"{name}#{number}" if number else name,
            op_type=name.rstrip("0123456789"),
            microseconds=t / repeat * 1e6,
        )
        for (name, number), t in clock.total.items()
    )


def peak_memory(artifact: Artifact, feed: Feed, *, threads: int) -> int:
    """Peak resident memory in bytes of the runner that a device gets, when it loads the artifact and runs it.

    Raises:
        CompileError: If the runner cannot be built.
        DataError: If the feed does not fit.
        DeviceError: If the run fails.
    """
    check_feed(feed, tensor_specs(artifact.manifest["inputs"]))
    with tempfile.TemporaryDirectory(prefix="onnxcomp-memory-") as folder:
        program = deploy(artifact.manifest["triple"], Path(folder, "bin"))
        inputs = []
        for index, (name, array) in enumerate(feed.items()):
            file = Path(folder, f"{index}.npy")
            np.save(file, array)
            inputs += ["--input", f"{name}={file}"]
        runs = ["--warmup", "0", "--repeat", str(_MEMORY_RUNS), "--threads", str(threads)]
        try:
            done = subprocess.run(
                [program, artifact.path, *inputs, *runs],
                capture_output=True, text=True, check=False, timeout=_MEMORY_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"the runner did not end in {_MEMORY_SECONDS} s") from error
    if done.returncode:
        raise DeviceError(f"the runner failed: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return int(json.loads(done.stdout)["peak_rss_bytes"])


class _Clock:
    """Sums up seconds by name of a kernel and number of its call."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.total: dict[tuple[str, int], float] = defaultdict(float)
        self._calls: dict[str, int] = defaultdict(int)
        self._counts = False
        self._start = 0.0

    def begin(self, *, counts: bool) -> None:
        """A new run."""
        self._calls.clear()
        self._counts = counts

    def __call__(self, _: Any, name: str, before: bool, *__: Any) -> int:
        if not name.startswith(_RUNTIME):
            self._device.sync()  # of a GPU, which else has only been told what to do
            now = time.perf_counter()
            if before:
                self._start = time.perf_counter()
            else:
                if self._counts:
                    self.total[name, self._calls[name]] += now - self._start
                self._calls[name] += 1
        return 0  # the virtual machine is to go on
