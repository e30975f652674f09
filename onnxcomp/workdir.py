"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxcomp.errors import OnnxcompError

MARKER = "report.json"


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of `out` when the block ends without an exception.

    Args:
        out: Does not exist, is empty, or holds an earlier output of ours, known by its `report.json`.

    Raises:
        OnnxcompError: If `out` is something else, or its parent cannot be written.
    """
    try:
        if out.exists() and not out.is_dir():
            raise OnnxcompError(f"{out} is a file; give the name of a folder")
        if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
            raise OnnxcompError(f"{out} is not empty and holds no earlier output of onnxcomp; give another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise OnnxcompError(f"cannot write to {out}: {error.strerror or error}") from error
    with work as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        yield new
        try:
            if out.exists():
                os.rename(out, old)
            try:
                os.rename(new, out)
            except BaseException:
                if old.exists():
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
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OnnxcompError(f"cannot write {path}: {error.strerror or error}") from error
