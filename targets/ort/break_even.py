"""When sparse kernels pay on this machine: what was measured on it, or else what was measured on another one."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import platformdirs
from pydantic import TypeAdapter, ValidationError

from onnxcomp import native
from onnxcomp.break_even import BreakEven
from onnxcomp.errors import TargetError
from onnxcomp.model import file_hash
from onnxcomp.targets.ort.default_break_even import DEFAULT
from onnxcomp.targets.ort.runtime import onnxruntime

_MAX_BYTES = 1 << 20
_ENTRIES = TypeAdapter(list[BreakEven])


def table(features: Sequence[str]) -> tuple[BreakEven, ...]:
    """What `store` kept on this machine, else the table that comes with the package.

    A file that is damaged counts as none: it is only a cache.
    """
    try:
        path = cache_path(features)
        if path.stat().st_size > _MAX_BYTES:
            return DEFAULT
        return tuple(_ENTRIES.validate_python(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, ValidationError):
        return DEFAULT


def store(entries: Iterable[BreakEven], features: Sequence[str]) -> Path:
    """Keeps measured entries beside those of other shapes that were measured before; returns the file.

    Raises:
        TargetError: If it cannot be written.
    """
    path = cache_path(features)
    old = table(features) if path.is_file() else ()
    merged = {_case(e): e for e in (*old, *entries)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump([asdict(e) for e in merged.values()], file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def cache_path(features: Sequence[str]) -> Path:
    """Where results are kept; they hold for one kind of CPU, one onnxruntime and one native library."""
    library = native.library_path()
    key = json.dumps(
        [
            platform.machine(), platform.processor(), sorted(features), os.cpu_count(), onnxruntime().__version__,
            file_hash(library) if library else "",
        ]
    )  # fmt: skip
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("onnxcomp") / f"ort-cpu-break-even-{name}.json"


def _case(entry: BreakEven) -> tuple[str | int, ...]:
    return entry.op, entry.weights, entry.dense, entry.inputs, entry.outputs, entry.rows, entry.threads
