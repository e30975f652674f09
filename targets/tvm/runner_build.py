"""Builds `onnxcomp-run`, which runs artifacts on a device, and gathers what it needs there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import platformdirs

from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.linking import GLIBC, architecture, call, compiler, is_host

PROGRAM = "onnxcomp-run"
LIBRARIES = ("libtvm_runtime.so", "libtvm_ffi.so", "libtvm_runtime_extra.so")
"""TVM's runtime; the last of them sorts and draws random numbers, and may be left out for models that do neither."""

GPU_LIBRARY = "libtvm_runtime_cuda.so"
"""What the runtime needs for kernels of a GPU."""

_ALL = (*LIBRARIES, GPU_LIBRARY)
_SOURCES = Path(__file__).parent / "runner"
_PACKAGES = {"apache-tvm": "tvm", "apache-tvm-ffi": "tvm_ffi"}
_FLAGS = ("-std=c++17", "-O2", "-s", "-Wall", "-Wextra")
# Nothing of the runtime is called by name: it registers the virtual machine when it is loaded.
_LINK_FLAGS = ("-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN")


def deploy(triple: str, folder: Path, *, gpu: bool = False) -> Path:
    """Puts the runner and TVM's runtime into a folder, which is then ready to be copied to a device.

    Args:
        triple: LLVM's target triple of the device.
        folder: Made if it is not there; files of the same names are replaced.
        gpu: Whether artifacts for a GPU are to run too.

    Returns:
        Path of the program in that folder.

    Raises:
        CompileError: If the runner cannot be built or the runtime cannot be had.
    """
    files = {PROGRAM: runner(triple), **libraries(triple)}
    if not gpu:
        del files[GPU_LIBRARY]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            temporary = folder / f".{name}.{os.getpid()}"
            shutil.copy(path, temporary)
            os.replace(temporary, folder / name)
    except OSError as error:
        raise CompileError(f"cannot write to {folder}: {error.strerror or error}") from error
    return folder / PROGRAM


def runner(triple: str) -> Path:
    """The program for a triple, from the user's cache or built. It looks for the libraries beside itself.

    Raises:
        CompileError: If it cannot be built.
    """
    sources = sorted(_SOURCES.glob("*.cpp"))
    if not sources:
        raise CompileError(f"the sources of {PROGRAM} are not installed in {_SOURCES}")
    command = compiler(triple, cxx=True)
    key = hashlib.sha256(
        json.dumps([command, call([*command, "--version"]), _FLAGS, _LINK_FLAGS, _versions()]).encode()
    )
    for path in sorted(_SOURCES.iterdir()):
        key.update(path.read_bytes() if path.suffix in (".cpp", ".h") else b"")
    folder = _cache() / f"runner-{architecture(triple)}-{key.hexdigest()[:16]}"
    if not (folder / PROGRAM).is_file():
        found = libraries(triple)
        linked = [str(found[name]) for name in LIBRARIES[:2]]
        include = ["-isystem", str(_package("tvm_ffi") / "include")]
        with _new(folder) as new:
            output = ["-o", str(new / PROGRAM)]
            call([*command, *_FLAGS, *include, *map(str, sources), *output, *_LINK_FLAGS, *linked, "-ldl"])
    return folder / PROGRAM


def libraries(triple: str) -> Mapping[str, Path]:
    """TVM's runtime for a triple by file name: of the installed packages, or of the same versions for that machine.

    Raises:
        CompileError: If TVM is not installed, or its packages for that machine cannot be downloaded.
    """
    if is_host(triple):
        folders = {name: _package(name) / "lib" for name in _PACKAGES.values()}
        return {name: folders["tvm_ffi" if name == "libtvm_ffi.so" else "tvm"] / name for name in _ALL}
    arch = architecture(triple)
    folder = _cache() / f"libraries-{arch}-{'-'.join(_versions().values())}"
    if not folder.is_dir():
        with _new(folder) as new:
            _download(arch, new)
    return {name: folder / name for name in _ALL}


def _download(arch: str, folder: Path) -> None:
    wanted = [f"{name}=={version}" for name, version in _versions().items()]
    platforms = [f"--platform=manylinux_{glibc}_{arch}" for glibc in (GLIBC.replace(".", "_"), "2_27", "2_17")]
    arguments = ["--no-deps", "--only-binary=:all:", *platforms, *wanted]
    with tempfile.TemporaryDirectory(dir=folder.parent) as wheels:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "-d", wheels]
        try:
            call([*pip, *arguments])
        except CompileError as error:
            raise CompileError(
                f"cannot download TVM's runtime for {arch}. On a machine with a network do 'pip download "
                f"{' '.join(arguments)}', and set PIP_NO_INDEX=1 and PIP_FIND_LINKS to the folder here. {error}"
            ) from error
        for wheel in Path(wheels).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for info in archive.infolist():
                    name = Path(info.filename).name
                    if name in _ALL:
                        (folder / name).write_bytes(archive.read(info))
    if absent := [name for name in _ALL if not (folder / name).is_file()]:
        raise CompileError(f"TVM's packages for {arch} lack {', '.join(absent)}")


@functools.cache
def _versions() -> dict[str, str]:
    try:
        return {name: importlib.metadata.version(name) for name in _PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise CompileError(f"{error.name} is not installed: pip install 'onnxcomp[tvm]'") from error


def _package(name: str) -> Path:
    """The folder of a package, which is not imported for that."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CompileError(f"{name} is not installed: pip install 'onnxcomp[tvm]'")
    return Path(spec.origin).parent


def _cache() -> Path:
    return platformdirs.user_cache_path("onnxcomp") / "tvm"


@contextlib.contextmanager
def _new(folder: Path) -> Iterator[Path]:
    """A folder that gets the name `folder` when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
            new = Path(work, "new")
            new.mkdir()
            yield new
            try:
                new.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except OSError as error:
        raise CompileError(f"cannot write to {folder.parent}: {error.strerror or error}") from error
