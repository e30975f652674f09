"""Files in which a target keeps what it measured of break-even sparsities."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import platformdirs
from pydantic import TypeAdapter, ValidationError

from onnxcomp.break_even import BreakEven
from onnxcomp.errors import TargetError
from onnxcomp.report import write_whole

_MAX_BYTES = 1 << 20
_ENTRIES = TypeAdapter(list[BreakEven])


def cache_path(target: str, key: object) -> Path:
    """The file of a target in the user's cache folder, for one `key`, which JSON can express."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return platformdirs.user_cache_path("onnxcomp") / f"{target}-break-even-{name}.json"


def load(path: Path, default: tuple[BreakEven, ...]) -> tuple[BreakEven, ...]:
    """What `store` kept in a file, else `default`. A file that is damaged counts as none: it is only a cache."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return default
        return tuple(_ENTRIES.validate_python(json.loads(path.read_text(encoding="utf-8"))))
    except (OSError, ValueError, ValidationError):
        return default


def store(path: Path, entries: Iterable[BreakEven]) -> None:
    """Keeps measured entries beside those of other shapes that were measured before.

    Raises:
        TargetError: If the file cannot be written.
    """
    merged = {_case(e): e for e in (*load(path, ()), *entries)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps([asdict(e) for e in merged.values()], indent=1))
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror or error}") from error


def _case(entry: BreakEven) -> tuple[str | int, ...]:
    return entry.op, entry.weights, entry.dense, entry.inputs, entry.outputs, entry.rows, entry.threads
