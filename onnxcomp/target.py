"""What a target is: capabilities, compilation into an artifact, sessions that run it, and the audit of what really ran.

The core knows targets only through these types; implementations live in `onnxcomp.targets` and are found through the
entry point group `onnxcomp.targets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxcomp.break_even import BreakEven
from onnxcomp.errors import DataError, RecipeError, UnsupportedError

if TYPE_CHECKING:
    import os

    from onnxcomp.rewrite import Pass
    from onnxcomp.state import StateSpec

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = Mapping[str, Array]
"""One set of model inputs: input name to array."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, element type and shape of a model input or output; an unknown dimension is a string or None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where an op type needs Q/DQ pairs for the target to run it on integers.

    Attributes:
        kind: `linear` has a constant weight (Conv, MatMul, Gemm); `elementwise` has an integer kernel with quantization
            parameters of its own for every input and output (Add, Concat, GlobalAveragePool); `passthrough` only moves
            values, so its output keeps the input's parameters (Reshape, Transpose, MaxPool).
        output: The output has to be quantized as well, else the target computes in float.
        bias: Form of the bias: `int32` is a DequantizeLinear of an int32 tensor with scale `s_x * s_w`.
    """

    kind: Literal["linear", "elementwise", "passthrough"]
    output: bool = True
    bias: Literal["int32", "float"] = "int32"


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a target can run.

    Attributes:
        target: Name of the target.
        max_opset: Highest opset of the default ONNX domain that the target loads.
        activation_dtypes: Element types of quantized activations that integer kernels take, best first.
        weight_dtypes: Element types of quantized weights that integer kernels take, best first.
        placements: Op type to the Q/DQ placement that it needs.
        reduce_range: Weights must keep to 7 bits, since the CPU's 8-bit dot product saturates in 16 bits.
        features: CPU or device features found, for the report.
        contrib_ops: Ops outside the ONNX standard that it has fast kernels for, as `domain::op_type`.
        break_even: When sparse kernels pay, by measurement.
    """

    target: str
    max_opset: int
    activation_dtypes: tuple[ir.DataType, ...]
    weight_dtypes: tuple[ir.DataType, ...]
    placements: Mapping[str, Placement]
    reduce_range: bool = False
    features: tuple[str, ...] = ()
    contrib_ops: frozenset[str] = frozenset()
    break_even: tuple[BreakEven, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """What one compute node (MatMul, Gemm, Conv and the like) of the model became in the executable.

    Attributes:
        node: Name of the node in the model that was compiled.
        op_type: Its op type there.
        executed_as: Op type of the node that computes it in the executable, e.g. `QLinearConv`; empty when not found.
        executed_name: Name of that node, as in `NodeTime.node`.
        macs: Multiply-accumulates per run, 0 when the shape is unknown.
        quantized: The model asks for integer execution: its activation and weight come from DequantizeLinear.
        integer: It is executed on integers.
        reason: Why a quantized node is not executed on integers, or why the target chose another form; else empty.
    """

    node: str
    op_type: str
    executed_as: str
    macs: int
    quantized: bool
    integer: bool
    reason: str = ""
    executed_name: str = ""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The list of what really runs, read back from the executable and not from what was asked for."""

    rows: tuple[AuditRow, ...]
    executed_ops: Mapping[str, int] = field(default_factory=dict)
    """Op type to number of nodes in the executable."""
    note: str = ""
    """Why nothing is known, if the executable was not looked at; else empty."""

    @property
    def integer_mac_share(self) -> float:
        """Share of all multiply-accumulates that run on integers, 0 to 1."""
        total = sum(r.macs for r in self.rows)
        return sum(r.macs for r in self.rows if r.integer) / total if total else 0.0

    @property
    def fallbacks(self) -> tuple[AuditRow, ...]:
        """Nodes that were quantized but are executed in float."""
        return tuple(r for r in self.rows if r.quantized and not r.integer)


@dataclass(frozen=True, kw_only=True)
class NodeTime:
    """Mean time that one executed node takes in one run, in microseconds."""

    node: str
    op_type: str
    microseconds: float


MANIFEST_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A folder that holds a compiled model and its `manifest.json`.

    Attributes:
        path: The folder.
        manifest: Target, versions, hashes, inputs, outputs, state and audit, as written to `manifest.json`.
        audit: What each compute node became.
    """

    path: Path
    manifest: Mapping[str, Any]
    audit: Audit


class Session(ABC):
    """A loaded artifact that runs feeds. Streaming state, if the model has any, is carried from run to run.

    A session is one stream, for one thread at a time; `stream` makes others of the same model. A session that carries
    state overrides `states`, `state`, `restore` and `stream`; what they do here is right for one without.
    """

    @property
    @abstractmethod
    def inputs(self) -> Sequence[TensorSpec]:
        """Inputs that a feed has to give; state inputs are not among them."""

    @property
    @abstractmethod
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs that a run returns; state outputs are not among them."""

    @abstractmethod
    def run(self, feed: Feed) -> dict[str, Array]:
        """Runs the model once.

        Args:
            feed: Input name to array.

        Returns:
            Output name to array.

        Raises:
            DataError: If the feed does not fit the inputs.
            DeviceError: If the run fails.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forgets the streaming state."""

    @property
    def states(self) -> Sequence[StateSpec]:
        """The streaming state that is carried."""
        return ()

    @property
    def model_hash(self) -> str:
        """What tells the loaded model from others, for saved states; empty if that is not known."""
        return ""

    def state(self) -> dict[str, Array]:
        """Copies of the streaming state by input name, each of the shape and dtype of its spec; empty if there is none.

        Raises:
            DeviceError: If the state was lost in a run that failed.
        """
        self._need_no_state()
        return {}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Goes on from a streaming state that `state` returned, of this stream or another one of the same model.

        Args:
            state: Input name to array, of which copies are taken.

        Raises:
            DataError: If names, shapes or dtypes are not those of `states`; the state then is what it was.
        """
        self._need_no_state()
        if state:
            raise DataError(f"the session carries no state, but some was given for {', '.join(map(repr, state))}")
        self.reset()

    def stream(self) -> Session:
        """Another stream over the same loaded model, which starts from reset; weights are shared, state is not.

        What carries no state is every stream at once, and returned itself.
        """
        self._need_no_state()
        return self

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Writes the streaming state to a file; see `onnxcomp.state.save_state`."""
        from onnxcomp.state import save_state

        save_state(path, self.state(), model_hash=self.model_hash)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Goes on from the streaming state in a file that `save_state` wrote, in this process or another one.

        Raises:
            DataError: If the file is damaged, or of another model; the state then is what it was.
        """
        from onnxcomp.state import load_state

        self.restore(load_state(path, model_hash=self.model_hash, states=self.states))

    def _need_no_state(self) -> None:
        if self.states:
            raise UnsupportedError(f"{type(self).__name__} does not give its streaming state away")


class Target(ABC):
    """Something that a model can be compiled for."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Says what the target can run on this machine."""

    @classmethod
    def boards(cls) -> Mapping[str, str]:
        """Names of boards that models can be compiled for, with what they are; empty where there is no choice."""
        return {}

    def on(self, board: str) -> Target:
        """The same target for another board.

        Args:
            board: One of `boards`, or the path of a file that describes one.

        Raises:
            RecipeError: If there is no such board.
        """
        raise RecipeError(f"target {self.name!r} has no boards to choose from; write it without {board!r}")

    def tuned(self, seconds: float, progress: Callable[[str, int, int | None], None] | None = None) -> Target:
        """The same target, which measures while it compiles how parts of a model run best on this machine.

        What was measured is kept, and used again for other models by a tuned target; a target that is not tuned does
        not look at it.

        Args:
            seconds: Most seconds of wall-clock time to measure for, a model; at 0, only what was kept is used.
            progress: Told what is measured, and how many of the seconds are over.

        Raises:
            UnsupportedError: If the target has nothing to tune.
            DeviceError: If it does not compile for this machine.
        """
        raise UnsupportedError(f"target {self.name!r} has nothing to tune; leave --tune out")

    def require_device(self) -> None:
        """Fails where models can be compiled for the target but not run, so that long work does not begin in vain.

        Raises:
            DeviceError: If the device, or what drives it, is missing.
        """
        return

    @abstractmethod
    def lowering(self) -> Sequence[Pass]:
        """Passes that turn a portable rewritten model into the form which the target executes best."""

    @abstractmethod
    def compile(self, model: ir.Model, out: Path) -> Artifact:
        """Compiles a model into the folder `out`, replacing an artifact that is there; `model` stays as it is.

        Raises:
            CompileError: If the target rejects the model.
            UnsupportedError: If an op has no implementation on the target; the message names the node.
        """

    @abstractmethod
    def open(self, path: Path) -> Artifact:
        """Reads the artifact in folder `path`.

        Raises:
            TargetError: If `path` is not an artifact of this target.
        """

    @abstractmethod
    def load(self, artifact: Artifact, *, threads: int = 1) -> Session:
        """Loads an artifact for running, with `threads` threads a run."""

    @abstractmethod
    def node_times(self, artifact: Artifact, feed: Feed, *, threads: int = 1, repeat: int = 10) -> Sequence[NodeTime]:
        """Measures the time of every executed node, mean over `repeat` runs, in execution order."""

    @abstractmethod
    def peak_memory(self, artifact: Artifact, feed: Feed, *, threads: int = 1) -> int:
        """Peak resident memory in bytes of a process that only loads the artifact and runs it."""

    def calibrate(
        self,
        shapes: Sequence[tuple[int, int]] = (),
        *,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[BreakEven]:
        """Measures on this machine when sparse kernels pay, and keeps the result for later compilations.

        Args:
            shapes: Rows and columns of the weights to measure; common ones by default.
            threads: Threads of a run.
            progress: Told how many of how many cases are measured.

        Raises:
            UnsupportedError: If the target has no sparse kernels.
        """
        raise UnsupportedError(f"target {self.name!r} has no sparse kernels to measure")
