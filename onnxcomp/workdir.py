"""Output folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from onnxcomp.errors import OnnxcompError

MARKER = "report.json"
_OURS = frozenset(
    {MARKER, "report.md", "report.html", "model.onnx", "model.onnx.data", "model.onnx.1.data", "artifact"},
)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `out` when the block ends without an exception.

    Args:
        out: Does not exist, is empty, or holds an earlier output of ours and nothing else.

    Raises:
        OnnxcompError: If `out` is something else, or cannot be replaced.
    """
    out = out.resolve()
    try:
        _check_replaceable(out)
        parents = [p for p in out.parents if not p.exists()]
        out.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise OnnxcompError(f"cannot write to {out}: {error.strerror or error}") from error
    try:
        with work as folder:
            new, old = Path(folder, "new"), Path(folder, "old")
            new.mkdir()
            yield new
            _swap(new, out, old)
    except BaseException:
        with suppress(OSError):
            for parent in parents:
                parent.rmdir()
        raise


def _check_replaceable(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OnnxcompError(f"{out} is a file; give the name of a folder")
    # Both would fail at the very end, when the folder is renamed.
    if out.is_mount():
        raise OnnxcompError(f"{out} is a mount point, which cannot be replaced; give a folder inside it")
    if Path.cwd().is_relative_to(out):
        raise OnnxcompError(f"{out} is the current folder, or holds it; give another folder")
    names = {entry.name for entry in out.iterdir()}
    if names and not _is_ours(out, names):
        raise OnnxcompError(f"{out} is not empty and holds no earlier output of onnxcomp; give another folder")


def _is_ours(out: Path, names: set[str]) -> bool:
    """Whether nothing is lost with the folder but what onnxcomp wrote."""
    if MARKER not in names or names - _OURS:
        return False
    try:
        return "report_version" in json.loads((out / MARKER).read_bytes())
    except (ValueError, TypeError):
        return False


def _swap(new: Path, out: Path, old: Path) -> None:
    try:
        try:  # around both, since an interrupt between the two would lose what was there
            if out.exists():
                os.rename(out, old)
            os.rename(new, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
    except OSError as error:
        raise OnnxcompError(f"cannot write to {out}: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Fails before long work rather than after it, when the folder of an output file cannot be written.

    Raises:
        OnnxcompError: With the reason.
    """
    try:
        if path.is_dir():
            raise OnnxcompError(f"{path} is a folder; give the name of a file")
        if not path.parent.exists():
            raise OnnxcompError(f"cannot write {path}: there is no folder {path.parent}")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OnnxcompError(f"cannot write {path}: {error.strerror or error}") from error
