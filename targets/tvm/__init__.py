"""TVM: one shared object with kernels of our own, for a CPU on which neither Python nor ONNX Runtime has to be.

TVM itself is imported when a model is compiled or run, not before.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import Self, override

from onnxcomp.cpu import cpu_flags
from onnxcomp.errors import DeviceError, TargetError
from onnxcomp.manifest import read_manifest
from onnxcomp.rewrite import Pass
from onnxcomp.target import Artifact, Capabilities, Feed, NodeTime, Session, Target
from onnxcomp.targets.tvm.boards import HOST, boards, machine
from onnxcomp.targets.tvm.capabilities import capabilities
from onnxcomp.targets.tvm.lower.everything import Kernels
from onnxcomp.targets.tvm.lower.prepare import Prepare
from onnxcomp.targets.tvm.manifest import Manifest, check_files

_SAME = {"amd64": "x86_64", "arm64": "aarch64"}


class _Tvm(Target):
    """What the targets share.

    Args:
        board: Name of a board, or the path of a `.toml` file that describes one.
    """

    architecture: ClassVar[str]
    default: ClassVar[str]

    def __init__(self, board: str = "") -> None:
        self._machine = machine(board or self.default, self.architecture, cpu_flags())

    @classmethod
    @override
    def boards(cls) -> Mapping[str, str]:
        """Names of boards with what they are."""
        return {name: board.summary for name, board in boards(cls.architecture).items()}

    @override
    def on(self, board: str) -> Self:
        return type(self)(board)

    @override
    def capabilities(self) -> Capabilities:
        return capabilities(self.name, self._machine)

    @override
    def require_device(self) -> None:
        here = platform.machine().lower()
        if _SAME.get(here, here) != self.architecture:
            raise DeviceError(
                f"{self.name} compiles for {self.architecture}, and this machine is {here}: run the artifact on a "
                "device, with onnxcomp profile ARTIFACT --device NAME"
            )
        _require_tvm()

    @override
    def lowering(self) -> Sequence[Pass]:
        return (Prepare(), Kernels(machine=self._machine))

    @override
    def compile(self, model: ir.Model, out: Path) -> Artifact:
        _require_tvm()
        from onnxcomp.targets.tvm.compile import compile_model

        return compile_model(model, Path(out), self._machine, self.capabilities(), self.lowering())

    @override
    def open(self, path: Path) -> Artifact:
        manifest = read_manifest(Manifest, Path(path), self.name)
        check_files(Path(path), manifest)
        return Artifact(path=Path(path), manifest=manifest.model_dump(), audit=manifest.to_audit())

    @override
    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Loads an artifact; TVM has one pool of threads for all sessions of a process.

        Raises:
            DeviceError: If it is for another kind of CPU.
        """
        self.require_device()
        from onnxcomp.targets.tvm.session import Loaded, TvmSession

        return TvmSession(Loaded(artifact, threads))

    @override
    def node_times(self, artifact: Artifact, feed: Feed, *, threads: int = 1, repeat: int = 10) -> Sequence[NodeTime]:
        self.require_device()
        from onnxcomp.targets.tvm.profiling import node_times

        return node_times(artifact, feed, threads=threads, repeat=repeat)

    @override
    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Peak resident memory of the runner, as on a device: neither Python nor TVM's compiler is in it."""
        self.require_device()
        from onnxcomp.targets.tvm.profiling import peak_memory

        return peak_memory(artifact, feed, threads=threads)


class TvmCpu(_Tvm):
    """Compiles for x86-64; by default for the CPU of this machine."""

    name: ClassVar[str] = "tvm-cpu"
    summary: ClassVar[str] = "TVM with kernels of our own on x86-64, by default the CPU of this machine"
    architecture: ClassVar[str] = "x86_64"
    default: ClassVar[str] = HOST


class TvmAarch64(_Tvm):
    """Compiles for 64-bit ARM, on any machine."""

    name: ClassVar[str] = "tvm-aarch64"
    summary: ClassVar[str] = "TVM with kernels of our own on 64-bit ARM, by default with dot products"
    architecture: ClassVar[str] = "aarch64"
    default: ClassVar[str] = "cortex-a76"


def _require_tvm() -> None:
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise TargetError(f"TVM cannot be imported ({error}); install it: pip install 'onnxcomp[tvm]'") from error
