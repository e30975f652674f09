"""TVM: one shared object with kernels of our own, for a CPU or GPU where neither Python nor ONNX Runtime has to be.

TVM itself is imported when a model is compiled or run, not before.
"""

from __future__ import annotations

import copy
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from typing_extensions import Self, override

from onnxcomp.break_even import BreakEven
from onnxcomp.cpu import cpu_flags
from onnxcomp.errors import DeviceError, TargetError
from onnxcomp.manifest import read_manifest
from onnxcomp.rewrite import Pass
from onnxcomp.target import Artifact, Capabilities, Feed, NodeTime, Session, Target
from onnxcomp.targets.tvm.boards import HOST, boards, machine
from onnxcomp.targets.tvm.break_even import store, table
from onnxcomp.targets.tvm.capabilities import capabilities
from onnxcomp.targets.tvm.gpu.boards import gpu as gpu_machine
from onnxcomp.targets.tvm.gpu.boards import gpu_boards
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.lower.everything import Kernels
from onnxcomp.targets.tvm.lower.prepare import Prepare
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.manifest import Manifest, check_files
from onnxcomp.targets.tvm.tuning import Tuning

_SAME = {"amd64": "x86_64", "arm64": "aarch64"}


class _Tvm(Target):
    """What the targets share.

    Args:
        board: Name of a board, or the path of a `.toml` file that describes one.
    """

    default: ClassVar[str]
    _machine: Machine
    _tuning: Tuning | None = None

    def __init__(self, board: str = "") -> None:
        self._machine = self._found(board or self.default)

    def _found(self, board: str) -> Machine:
        raise NotImplementedError

    @override
    def on(self, board: str) -> Self:
        return type(self)(board)

    @override
    def capabilities(self) -> Capabilities:
        return capabilities(self.name, self._machine)

    @override
    def require_device(self) -> None:
        self._require(self._machine.triple, self._machine.arch if isinstance(self._machine, Gpu) else "")

    def _require(self, triple: str, gpu: str) -> None:
        """Checks that code for a CPU and a GPU, if one is named, runs here."""
        here, architecture = _architecture(), triple.partition("-")[0]
        if here != architecture:
            raise DeviceError(
                f"{self.name} on this board is for {architecture}, and this machine is {here}: choose another board "
                "(onnxcomp list targets), or compile, and run the artifact on a device, with onnxcomp profile ARTIFACT "
                "--device NAME"
            )
        _require_tvm()
        if gpu:
            from onnxcomp.targets.tvm.gpu.device import require_gpu

            require_gpu(gpu)

    @override
    def lowering(self) -> Sequence[Pass]:
        return (Prepare(), Kernels(machine=self._machine))

    @override
    def compile(self, model: ir.Model, out: Path) -> Artifact:
        _require_tvm()
        from onnxcomp.targets.tvm.compile import compile_model

        return compile_model(model, Path(out), self._machine, self.capabilities(), self.lowering(), self._tuning)

    @override
    def open(self, path: Path) -> Artifact:
        manifest = read_manifest(Manifest, Path(path), self.name)
        check_files(Path(path), manifest)
        return Artifact(path=Path(path), manifest=manifest.model_dump(), audit=manifest.to_audit())

    @override
    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Loads an artifact; TVM has one pool of threads for all sessions of a process.

        Raises:
            DeviceError: If it is for another kind of CPU, or for a GPU that is not here.
        """
        self._require(artifact.manifest["triple"], artifact.manifest["gpu"])
        from onnxcomp.targets.tvm.session import Loaded, TvmSession

        return TvmSession(Loaded(artifact, threads))

    @override
    def node_times(self, artifact: Artifact, feed: Feed, *, threads: int = 1, repeat: int = 10) -> Sequence[NodeTime]:
        self._require(artifact.manifest["triple"], artifact.manifest["gpu"])
        from onnxcomp.targets.tvm.profiling import node_times

        return node_times(artifact, feed, threads=threads, repeat=repeat)

    @override
    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Peak resident memory of the runner, as on a device: neither Python nor TVM's compiler is in it."""
        self._require(artifact.manifest["triple"], artifact.manifest["gpu"])
        from onnxcomp.targets.tvm.profiling import peak_memory

        return peak_memory(artifact, feed, threads=threads)


class _TvmCpu(_Tvm):
    """For CPUs of one architecture."""

    architecture: ClassVar[str]

    @classmethod
    @override
    def boards(cls) -> Mapping[str, str]:
        """Names of boards with what they are."""
        return {name: board.summary for name, board in boards(cls.architecture).items()}

    @override
    def _found(self, board: str) -> Machine:
        return machine(board, self.architecture, cpu_flags())

    @override
    def tuned(self, seconds: float, progress: Callable[[str, int, int | None], None] | None = None) -> Self:
        """The same target, with loops of TVM's own tuned on one thread; results are kept in the user's cache."""
        self._require_this("tuning", "compile on such a machine, or without --tune")
        other = copy.copy(self)
        other._tuning = Tuning(seconds=seconds, progress=progress)
        return other

    def _require_this(self, what: str, advice: str) -> None:
        """Checks that the board is this machine, on which `what` measures."""
        _require_tvm()
        here = machine(HOST, self.architecture, cpu_flags())
        same = _architecture() == self.architecture
        if not same or replace(self._machine, name=here.name) != here:
            raise DeviceError(
                f"{what} measures on this machine, which is {here.name if same else _architecture()}, and what was "
                f"asked for is {self._machine.name}: {advice}"
            )


class TvmCpu(_TvmCpu):
    """Compiles for x86-64; by default for the CPU of this machine."""

    name: ClassVar[str] = "tvm-cpu"
    summary: ClassVar[str] = "TVM with kernels of our own on x86-64, by default the CPU of this machine"
    architecture: ClassVar[str] = "x86_64"
    default: ClassVar[str] = HOST

    @override
    def capabilities(self) -> Capabilities:
        return capabilities(self.name, self._machine, table(self._machine))

    @override
    def calibrate(
        self,
        shapes: Sequence[tuple[int, int]] = (),
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[BreakEven]:
        """Measures from which sparsity on the sparse kernels are faster than the dense ones, which takes minutes.

        Dense products of 8-bit weights are those of dynamically quantized activations. Results are kept in the user's
        cache folder.

        Raises:
            DeviceError: If the board is not this machine.
            TargetError: If the result cannot be written.
        """
        self._require_this("calibration", "calibrate on such a machine")
        from onnxcomp.targets.ort.break_even_trials import SHAPES
        from onnxcomp.targets.tvm.break_even_trials import measure

        found = []
        for entry in measure(self._machine, shapes or SHAPES, threads=threads, progress=progress):
            found.append(entry)
            store([entry], self._machine)  # an interrupt is to leave what was measured before
        return found


class TvmAarch64(_TvmCpu):
    """Compiles for 64-bit ARM, on any machine."""

    name: ClassVar[str] = "tvm-aarch64"
    summary: ClassVar[str] = "TVM with kernels of our own on 64-bit ARM, by default with dot products"
    architecture: ClassVar[str] = "aarch64"
    default: ClassVar[str] = "cortex-a76"


class TvmCuda(_Tvm):
    """Compiles for an NVIDIA GPU, on any machine; the artifact holds machine code for it, and PTX for later ones."""

    name: ClassVar[str] = "tvm-cuda"
    summary: ClassVar[str] = "TVM with kernels of our own on NVIDIA GPUs"
    default: ClassVar[str] = "jetson-orin"

    @classmethod
    @override
    def boards(cls) -> Mapping[str, str]:
        """Names of boards with what they are."""
        return {name: board.summary for name, board in gpu_boards().items()}

    @override
    def _found(self, board: str) -> Machine:
        return gpu_machine(board, cpu_flags())

    @override
    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Bytes of GPU memory that are taken while the model runs."""
        self._require(artifact.manifest["triple"], artifact.manifest["gpu"])
        from onnxcomp.targets.tvm.gpu.device import peak_memory

        return peak_memory(artifact, feed)


def _architecture() -> str:
    """That of this machine, as triples name it."""
    here = platform.machine().lower()
    return _SAME.get(here, here)


def _require_tvm() -> None:
    try:
        import tvm  # noqa: F401
    except ImportError as error:
        raise TargetError(f"TVM cannot be imported ({error}); install it: pip install 'onnxcomp[tvm]'") from error
