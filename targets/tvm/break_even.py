"""When sparse kernels in TIR pay: what was measured on this machine, or else what was measured on another one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from onnxcomp import break_even_store
from onnxcomp.break_even import BreakEven
from onnxcomp.targets.tvm.default_break_even import DEFAULT
from onnxcomp.targets.tvm.machine import Machine


def table(machine: Machine) -> tuple[BreakEven, ...]:
    """What `store` kept on this machine, else the table that comes with the package."""
    return break_even_store.load(cache_path(machine), DEFAULT)


def store(entries: Iterable[BreakEven], machine: Machine) -> Path:
    """Keeps measured entries beside those of other shapes that were measured before; returns the file.

    Raises:
        TargetError: If it cannot be written.
    """
    path = cache_path(machine)
    break_even_store.store(path, entries)
    return path


def cache_path(machine: Machine) -> Path:
    """Where results are kept; they hold for one kind of CPU, one board, and one version of TVM and of the kernels."""
    versions = [_version("onnxcomp"), _version("apache-tvm")]
    key = [platform.machine(), platform.processor(), os.cpu_count(), machine.name, machine.instruction_sets, versions]
    return break_even_store.cache_path("tvm", key)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
