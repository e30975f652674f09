"""Where artifacts are put: built beside their place, and moved there when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from onnxcomp.errors import CompileError, TargetError
from onnxcomp.manifest import MANIFEST


@contextlib.contextmanager
def new_artifact(out: Path, files: Collection[str]) -> Iterator[tuple[Path, Path]]:
    """A folder to fill, which takes the place of `out` at the end, and one for what is not kept.

    An artifact that is there is replaced by a rename; anything else that is there is left alone.

    Args:
        out: Place of the artifact, an absolute path.
        files: Names that the files of an artifact of this target may have, besides the manifest.

    Raises:
        CompileError: If `out` cannot be written or holds something else.
        TargetError: If the finished folder cannot be moved.
    """
    _check_place(out, files)
    with _scratch(out) as scratch:
        folder = scratch / "artifact"
        folder.mkdir()
        yield folder, scratch
        _put(folder, out, scratch)


def _check_place(out: Path, files: Collection[str]) -> None:
    if not out.parent.is_dir():
        raise CompileError(f"{out.parent} is not a folder; create it first")
    if not out.exists():
        return
    if not out.is_dir():
        raise CompileError(f"{out} is a file; an artifact is a folder, give another name")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if MANIFEST not in names or names - {MANIFEST, *files}:
        raise CompileError(
            f"{out} is not empty and not an artifact of onnxcomp, so it is not replaced; give a new or empty folder"
        )


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    try:
        scratch = tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent)
    except OSError as error:
        raise CompileError(f"cannot write to {out.parent}: {error.strerror or error}") from error
    try:
        yield Path(scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put(folder: Path, out: Path, scratch: Path) -> None:
    """Moves the finished folder into place; if that fails, what was there is put back."""
    old = scratch / "old"
    try:
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(folder, out)
        except BaseException:
            if old.exists():
                os.replace(old, out)
            raise
    except OSError as error:
        raise TargetError(f"cannot move the artifact to {out}: {error.strerror or error}") from error
