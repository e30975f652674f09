"""What comes back of a job: whether it ended well, outputs, figures, and the state of the device meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from onnxcomp.errors import DeviceError
from onnxcomp.target import Array

BAD_INPUT, CANNOT_LOAD, NOT_EXECUTABLE, NOT_FOUND = 2, 3, 126, 127
_CAUSES = {4: ", as when it was compiled for a CPU with other instructions", 9: ", as when memory is short"}
_TAIL = 4000


class _Timing(BaseModel):
    median: float
    p10: float
    p90: float
    p99: float
    min: float
    mean: float


class Figures(BaseModel):
    """What a runner prints."""

    model_config = ConfigDict(frozen=True)

    load_ms: float
    first_ms: float
    latency_ms: _Timing | None = None
    samples: int = 0
    threads: int
    peak_rss_bytes: int
    outputs: dict[str, str] = Field(default_factory=dict)


def check_code(code: int, said: str, where: str) -> None:
    """Fails unless the job's script ended well.

    Args:
        code: Its exit code.
        said: What it wrote to stderr.
        where: What the device is called.

    Raises:
        DeviceError: With the line that the runner left.
    """
    if code == 0:
        return
    told = f": {line}" if (line := last_line(said)) else ""
    if code in (NOT_EXECUTABLE, NOT_FOUND):
        raise DeviceError(
            f"{where} cannot start what runs the artifact{told}; look whether it is of the artifact's architecture, "
            "has what is named here, and may run programs in the folder of its jobs (--folder)"
        )
    if code == CANNOT_LOAD:
        raise DeviceError(f"{where} cannot load the artifact{told}; look whether it was compiled for it")
    if code == BAD_INPUT:
        raise DeviceError(f"the run failed on {where}{told}")
    if code > 128:
        raise DeviceError(
            f"the artifact was ended on {where} by signal {code - 128}{_CAUSES.get(code - 128, '')}{told}"
        )
    raise DeviceError(f"the artifact failed on {where} with exit code {code}{told}")


def read_figures(out: Path, index: int, where: str) -> Figures:
    """What the runner printed in one of its runs.

    Raises:
        DeviceError: If it is not what a runner prints.
    """
    path = out / f"{index}.json"
    try:
        return Figures.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise DeviceError(f"what the runner on {where} printed cannot be read: {reason}") from error


def read_outputs(out: Path, steps_of: Sequence[int], names: Sequence[str], where: str) -> list[dict[str, Array]]:
    """Outputs by name for every feed of a job whose runs took so many steps; 0 is a run of one feed.

    Raises:
        DeviceError: If one is missing or no array.
    """
    found: list[dict[str, Array]] = []
    for index, steps in enumerate(steps_of):
        files = read_figures(out, index, where).outputs
        arrays = {name: _array(out / str(index), files.get(name, ""), steps, name, where) for name in names}
        if steps:
            found += [{name: array[i] for name, array in arrays.items()} for i in range(steps)]
        else:
            found.append(arrays)
    return found


def _array(folder: Path, file: str, steps: int, name: str, where: str) -> Array:
    if not file or Path(file).name != file or not (folder / file).is_file():
        raise DeviceError(f"{where} gave back no output {name!r}")
    try:
        array: Array = np.load(folder / file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DeviceError(f"output {name!r} of {where} is no array: {error}") from error
    if steps and array.shape[:1] != (steps,):
        raise DeviceError(f"{where} gave back {list(array.shape)} as output {name!r} of {steps} steps")
    return array


def read_state(out: Path) -> tuple[str, tuple[float, float] | None]:
    """Governor and temperatures before and after the job, in degrees Celsius; empty and None if not told."""
    before, after = (_celsius(_content(out / name)) for name in ("before", "after"))
    return _content(out / "governor"), None if before is None or after is None else (before, after)


def _celsius(text: str) -> float | None:
    return int(text) / 1000 if text.lstrip("-").isdigit() else None


def _content(path: Path) -> str:
    try:
        return last_line(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""


def last_line(text: str) -> str:
    """The last line with something in it."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def tail(file: IO[bytes]) -> str:
    """The end of what was written to a file."""
    file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
    return file.read().decode(errors="replace")
