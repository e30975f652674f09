"""ONNX Runtime on the CPU of this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from onnxcomp import native
from onnxcomp.break_even import BreakEven
from onnxcomp.errors import UnsupportedError
from onnxcomp.manifest import model_hash
from onnxcomp.rewrite import Pass
from onnxcomp.target import Artifact, Capabilities, Feed, NodeTime, Session, Target
from onnxcomp.targets.ort.break_even import store
from onnxcomp.targets.ort.break_even_trials import SHAPES, measure
from onnxcomp.targets.ort.capabilities import capabilities
from onnxcomp.targets.ort.compile import compile_model, open_artifact
from onnxcomp.targets.ort.delta_lowering import NativeDelta
from onnxcomp.targets.ort.dense_steps import DenseSteps, DenseStepsSession
from onnxcomp.targets.ort.lowering import NativeOps
from onnxcomp.targets.ort.manifest import DENSE, MANY, MODEL
from onnxcomp.targets.ort.nm_lowering import NativeNm
from onnxcomp.targets.ort.profiling import node_times, peak_memory, states
from onnxcomp.targets.ort.rows import Rows, RowsSession
from onnxcomp.targets.ort.runtime import make_session, session_options
from onnxcomp.targets.ort.session import OrtSession, reference_runner

__all__ = ["OrtCpu", "reference_runner"]


class OrtCpu(Target):
    """Compiles for onnxruntime's CPU provider; an artifact is the ONNX model with an audit of what it is fused to."""

    name: ClassVar[str] = "ort-cpu"
    summary: ClassVar[str] = "ONNX Runtime on the CPU of this machine"

    def capabilities(self) -> Capabilities:
        """Says what onnxruntime executes on integers on this CPU."""
        return capabilities(self.name)

    def lowering(self) -> Sequence[Pass]:
        """Portable ops to native ones; Q/DQ pairs stay, since they are what onnxruntime fuses."""
        return (NativeOps(), NativeNm(), NativeDelta())

    def compile(self, model: ir.Model, out: Path) -> Artifact:
        """Compiles a model into the folder `out`, replacing an artifact that is there; `model` stays as it is.

        Raises:
            CompileError: If onnxruntime rejects the model, or `out` holds something else than an artifact.
            UnsupportedError: If an op has no kernel; the message names the node.
        """
        return compile_model(model, Path(out), self.capabilities())

    def open(self, path: Path) -> Artifact:
        """Reads and checks the artifact in folder `path`.

        Raises:
            TargetError: If `path` is not an artifact of this target, or was damaged.
        """
        return open_artifact(Path(path), self.name)

    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Loads an artifact for running, with `threads` threads a run; 0 lets onnxruntime choose."""

        def session(name: str) -> OrtSession:
            options = session_options(threads=threads, domains=artifact.manifest["opsets"])
            inner = make_session(artifact.path / name, options)
            carried = () if name == DENSE else states(artifact)
            return OrtSession(inner, carried, model_hash=model_hash(artifact))

        rows, dense = artifact.manifest["rows"], artifact.manifest["dense"]
        one = session(MODEL)
        if dense is not None:
            return DenseStepsSession(one, lambda: session(DENSE), DenseSteps.model_validate(dense))
        return one if rows is None else RowsSession(one, lambda: session(MANY), Rows.model_validate(rows))

    def node_times(self, artifact: Artifact, feed: Feed, *, threads: int = 1, repeat: int = 10) -> Sequence[NodeTime]:
        """Measures the time of every executed node, mean over `repeat` runs, in execution order."""
        return node_times(artifact, feed, threads=threads, repeat=repeat)

    def calibrate(
        self,
        shapes: Sequence[tuple[int, int]] = (),
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[BreakEven]:
        """Measures from which sparsity on the native kernels are faster than onnxruntime's dense ops of like accuracy.

        Takes about a minute for the common shapes. Results are kept in the user's cache folder.

        Raises:
            UnsupportedError: If onnxcomp was installed without its native library.
            TargetError: If the result cannot be written.
        """
        if not native.available():
            raise UnsupportedError("onnxcomp was installed without its native library; there are no kernels to measure")
        found = tuple(measure(shapes or SHAPES, threads=threads, progress=progress))
        store(found, self.capabilities().features)
        return found

    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Peak resident memory in bytes of a process that only loads the artifact and runs it."""
        return peak_memory(artifact, feed, threads=threads)
