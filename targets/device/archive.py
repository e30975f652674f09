"""Tar archives that go to a device, whose size is known before, and that come back, which are not trusted."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from onnxcomp.errors import DeviceError
from onnxcomp.targets.device.job import Job

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_MAX_RETURNED = 4 << 30


def size(job: Job) -> int:
    """Bytes that `pack` writes."""
    return sum(len(header) + _padded(length) for header, _, length in _members(job)) + len(_END)


def pack(job: Job, stream: IO[bytes]) -> None:
    """Writes a job as an archive.

    Raises:
        OSError: If a file changed its size meanwhile, or the stream is closed at its other end.
    """
    for header, content, length in _members(job):
        stream.write(header)
        with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as source:
            shutil.copyfileobj(source, stream, 1 << 18)
            if source.tell() != length:
                raise OSError(f"{content!s:.200} changed while it was sent")
        stream.write(bytes(_padded(length) - length))
    stream.write(_END)
    stream.flush()


def unpack(stream: IO[bytes], folder: Path, where: str) -> None:
    """Reads an archive of regular files into `folder`.

    Raises:
        DeviceError: If it is damaged, too large, or holds anything that would lie elsewhere.
    """
    total = 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not (member.isdir() or member.isreg()):
                    raise DeviceError(f"{where} gave back {member.name!r}, which is no file of the job")
                total += member.size
                if total > _MAX_RETURNED:
                    raise DeviceError(f"{where} gave back more than {_MAX_RETURNED >> 30} GiB")
                target = folder / path
                if member.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                source: Any = archive.extractfile(member)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 18)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DeviceError(f"the results of {where} arrived damaged: {error}") from error


def _members(job: Job) -> Iterator[tuple[bytes, Path | bytes, int]]:
    """Header, content and length of every file, in order."""
    for name, content in job.files.items():
        info = tarfile.TarInfo(name)
        info.size = len(content) if isinstance(content, bytes) else content.stat().st_size
        info.mode = 0o700 if name in job.executables else 0o600
        yield info.tobuf(tarfile.GNU_FORMAT), content, info.size


def _padded(length: int) -> int:
    return -(-length // _BLOCK) * _BLOCK


def write_folder(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Lays out a job on this machine, with links to the files that are here already."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.symlink_to(content.resolve())
