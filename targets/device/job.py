"""A job: the folder that a device is given, with a shell script that runs the artifact there."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from onnxcomp import native
from onnxcomp.data import check_feed
from onnxcomp.errors import DataError
from onnxcomp.target import Array, Feed
from onnxcomp.targets.device.artifacts import DeviceArtifact
from onnxcomp.targets.device.runner import RUNNER, deploy_runner
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.manifest import model_file

SCRIPT = "job.sh"
OUT = "out"
_SENSORS = "cat /sys/class/thermal/thermal_zone*/temp 2>/dev/null | sort -n | tail -n 1"
_LIBRARIES = 'export LD_LIBRARY_PATH="$PWD/runner${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"'
_GOVERNOR = "cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a device is sent.

    Attributes:
        files: Path in the job's folder to a file here, or to its content.
        executables: Those of them that are run.
        arch: Architecture that the device has to have; empty if any will do.
        steps: Feeds that each run takes one after another; 0 for a run of one feed.
    """

    files: Mapping[str, Path | bytes]
    executables: frozenset[str]
    arch: str
    steps: tuple[int, ...]

    @cached_property
    def size(self) -> int:
        """Bytes that the files hold."""
        return sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in self.files.values())


def make_job(
    artifact: DeviceArtifact,
    feeds: Sequence[Feed],
    scratch: Path,
    *,
    options: Sequence[str] = (),
    launcher: Sequence[str] = (),
    python: str = "python3",
    native_library: bool = False,
) -> Job:
    """Puts together what runs an artifact on some feeds, as one stream if they are alike, else in a process each.

    Args:
        artifact: What is run.
        feeds: Input name to array.
        scratch: Empty folder, which the job needs as long as it lives.
        options: Further arguments of the runner.
        launcher: Command that runs the runner, as an emulator does.
        python: What runs Python on the device.
        native_library: Whether this machine's library of native ops goes along.

    Raises:
        DataError: If a feed does not fit, or a stream has feeds of different shapes.
        DeviceError: If there is no runner.
    """
    for index, feed in enumerate(feeds):
        check_feed(feed, artifact.inputs, f"feed {index}")
    runs = _runs(feeds)
    if artifact.carries_state and len(runs) > 1:
        raise DataError("the feeds of a stream need to have the same shapes on a device")
    files: dict[str, Path | bytes] = {f"artifact/{p.name}": p for p in artifact.files()}
    executables: set[str] = set()
    if artifact.is_tvm:
        folder = scratch / "runner"
        folder.mkdir()
        deploy_runner(artifact.triple, folder, gpu=bool(artifact.gpu))
        sent = [p for p in folder.iterdir() if p.is_file()]
        files |= {f"runner/{p.name}": p for p in sent}
        executables = {f"runner/{RUNNER}"}
    else:
        files["runner/ort_run.py"] = Path(__file__).with_name("ort_run.py")
        if native_library and (library := native.library_path()):
            files["runner/native.so"] = library
    lines = [_LIBRARIES, f"mkdir -p {OUT}", f"{_SENSORS} >{OUT}/before"]
    lines.append(f"{_GOVERNOR} >{OUT}/governor")
    for index, (feed, steps) in enumerate(runs):
        arguments: list[str] = ["--steps", str(steps)] if steps else []
        for position, (name, array) in enumerate(feed.items()):
            file = f"feeds/{index}/{position}.npy"
            files[file] = _npy(array)
            arguments += ["--input", f"{name}={file}"]
        first = {name: array[0] for name, array in feed.items()} if steps else feed
        command = [*launcher, *_command(artifact, first, python, "runner/native.so" in files), *arguments]
        text = shlex.join([*command, *options, "--out", f"{OUT}/{index}"])
        lines.append(f"{text} >{OUT}/{index}.json || exit")
    lines.append(f"{_SENSORS} >{OUT}/after; exit 0")
    files[SCRIPT] = "".join(line + "\n" for line in lines).encode()
    steps_of = tuple(steps for _, steps in runs)
    return Job(files=files, executables=frozenset(executables), arch=artifact.arch, steps=steps_of)


def _runs(feeds: Sequence[Feed]) -> list[tuple[Feed, int]]:
    """What each run is fed, and how many steps are stacked along the first axis; 0 if it is one feed as it is."""
    shapes = {tuple((name, np.shape(array)) for name, array in sorted(feed.items())) for feed in feeds}
    if len(feeds) == 1 or len(shapes) > 1 or not feeds[0]:
        return [(feed, 0) for feed in feeds]
    return [({name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}, len(feeds))]


def _command(artifact: DeviceArtifact, feed: Feed, python: str, with_native: bool) -> list[str]:
    if artifact.is_tvm:
        return [f"runner/{RUNNER}", "artifact"]
    model = model_file(OrtCpu().open(artifact.path), feed).name
    library = ["--native", "runner/native.so"] if with_native else []
    return [python, "runner/ort_run.py", f"artifact/{model}", *library]


def _npy(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)
    return file.getvalue()
