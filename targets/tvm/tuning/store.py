"""Results of searches in the user's cache: a file a workload, for one kind of CPU and one version of TVM.

A record is as good as code: a schedule may call for any intrinsic, or for code to be linked in. So these files are only
read where nobody but the user can have written them, and records that lie in an artifact are never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import Field, ValidationError

from onnxcomp.cpu import cpu_flags
from onnxcomp.errors import CompileError
from onnxcomp.manifest import Strict, versions
from onnxcomp.targets.tvm.machine import Machine

_OTHERS_WRITE = 0o022


class Result(Strict):
    """What is known of a workload.

    Attributes:
        workload: The function, as MetaSchedule writes it.
        record: The best schedule, as MetaSchedule writes it; None if none is faster than the plain loop.
        trials: Schedules that were measured.
        before_us: Microseconds of the plain loop.
        after_us: Microseconds of the best schedule, measured in turns with the plain loop.
        finished: The search came to its end; else it goes on when there is time for it.
    """

    workload: list[Any]
    record: list[Any] | None = None
    trials: int = Field(default=0, ge=0)
    before_us: float = Field(gt=0)
    after_us: float | None = Field(default=None, gt=0)
    finished: bool = False


def folder(machine: Machine) -> Path:
    """Where results of a machine are kept."""
    key = json.dumps(
        [asdict(machine), platform.processor(), sorted(cpu_flags()), os.cpu_count(), versions(["apache-tvm"])],
        default=str,
    )
    name = f"{machine.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return platformdirs.user_cache_path("onnxcomp") / "tvm" / "tuning" / name


def read(place: Path, key: str) -> Result | None:
    """What is known of the workload of that hash; a damaged file counts as nothing.

    Raises:
        CompileError: If others can write to the folder or the file.
    """
    path = place / f"{key}.json"
    try:
        with path.open("rb") as file:
            _check_private(place, place.stat())
            _check_private(path, os.fstat(file.fileno()))
            return Result.model_validate_json(file.read())
    except (OSError, ValidationError):
        return None


def write(place: Path, key: str, result: Result) -> None:
    """Keeps a result.

    Raises:
        CompileError: If it cannot be written.
    """
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", dir=place)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(result.model_dump_json())
            os.replace(name, place / f"{key}.json")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise CompileError(f"cannot write to {place}: {error.strerror or error}") from error


def _check_private(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid() or found.st_mode & _OTHERS_WRITE:
        raise CompileError(
            f"{path} can be written by other users, and what it says becomes code: it is not read; remove it, or take "
            "their right to write away"
        )
