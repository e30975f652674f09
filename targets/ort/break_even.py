"""When sparse kernels pay on this machine: what was measured on it, or else what was measured on another one."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path

from onnxcomp import break_even_store, native
from onnxcomp.break_even import BreakEven
from onnxcomp.model import file_hash
from onnxcomp.targets.ort.default_break_even import DEFAULT
from onnxcomp.targets.ort.runtime import onnxruntime


def table(features: Sequence[str]) -> tuple[BreakEven, ...]:
    """What `store` kept on this machine, else the table that comes with the package."""
    try:
        return break_even_store.load(cache_path(features), DEFAULT)
    except OSError:  # the native library cannot be read
        return DEFAULT


def store(entries: Iterable[BreakEven], features: Sequence[str]) -> Path:
    """Keeps measured entries beside those of other shapes that were measured before; returns the file.

    Raises:
        TargetError: If it cannot be written.
    """
    path = cache_path(features)
    break_even_store.store(path, entries)
    return path


def cache_path(features: Sequence[str]) -> Path:
    """Where results are kept; they hold for one kind of CPU, one onnxruntime and one native library."""
    library = native.library_path()
    key = [
        platform.machine(), platform.processor(), sorted(features), os.cpu_count(), onnxruntime().__version__,
        file_hash(library) if library else "",
    ]  # fmt: skip
    return break_even_store.cache_path("ort-cpu", key)
