"""Runs an artifact in this process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax

from onnxcomp.errors import DeviceError
from onnxcomp.feeds import check_feed, describe
from onnxcomp.manifest import model_hash, tensor_specs
from onnxcomp.model import root_cause
from onnxcomp.state import StateSpec, check_state
from onnxcomp.target import Array, Artifact, Feed, Session, TensorSpec
from onnxcomp.targets.tvm.manifest import CODE, WEIGHTS
from onnxcomp.targets.tvm.weights import mapped


class Loaded:
    """Code and weights of an artifact, shared by its streams.

    Args:
        artifact: The artifact, for a CPU as that of this machine.
        threads: Threads of a run; TVM has one pool of threads for a process, so the session that was loaded last
            decides.

    Raises:
        DeviceError: If the code cannot be loaded.
    """

    def __init__(self, artifact: Artifact, threads: int) -> None:
        manifest = artifact.manifest
        try:
            self.device = tvm.cuda() if manifest["gpu"] else tvm.cpu()
            self.machine = relax.VirtualMachine(_code(artifact.path / CODE), self.device)
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
        except Exception as error:
            raise DeviceError(f"{artifact.path / CODE} cannot be loaded: {root_cause(error)}") from error
        arrays = mapped(artifact.path / WEIGHTS, manifest["weights"])
        self.weights = [self.placed(array) if manifest["gpu"] else tvm.runtime.from_dlpack(array) for array in arrays]
        self.parameters: list[str] = manifest["parameters"]
        self.returns: list[str] = manifest["returns"]
        self.inputs = tensor_specs(manifest["inputs"])
        self.outputs = tensor_specs(manifest["outputs"])
        self.states = tuple(StateSpec.model_validate(s) for s in manifest["state"])
        self.model_hash = model_hash(artifact)

    def placed(self, array: Array) -> Any:
        """A copy of an array where kernels run.

        Raises:
            DeviceError: If there is no memory for it.
        """
        try:
            return tvm.runtime.tensor(np.asarray(array, order="C"), self.device)
        except Exception as error:
            raise DeviceError(f"{array.nbytes} bytes cannot be put on the device: {root_cause(error)}") from error

    def run(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name, as TVM's tensors, of such tensors."""
        found = self.machine["main"](*(values[name] for name in self.parameters), *self.weights)
        results = [found] if len(self.returns) == 1 and hasattr(found, "numpy") else list(found)
        return dict(zip(self.returns, results, strict=True))


def _code(path: Path) -> Any:
    """Loads a shared object under a name of its own: for one that was loaded before, the system gives the old code."""
    with tempfile.TemporaryDirectory(prefix="onnxcomp-") as folder:
        return tvm.runtime.load_module(str(shutil.copy(path, folder)))


class TvmSession(Session):
    """One stream of a loaded artifact.

    A run that fails leaves the state as it was, unless some of it is in place: that may be half written then, and runs
    are refused until `reset` or `restore`.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._carried: dict[str, Any] = {}
        self._in_place = any(s.in_place for s in loaded.states)
        self._lost = False
        self.reset()

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Inputs that a feed has to give."""
        return tuple(self._loaded.inputs.values())

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs that a run returns."""
        return tuple(self._loaded.outputs.values())

    @property
    def states(self) -> Sequence[StateSpec]:
        """The streaming state."""
        return self._loaded.states

    @property
    def model_hash(self) -> str:
        """Hash of the artifact's files."""
        return self._loaded.model_hash

    def run(self, feed: Feed) -> dict[str, Array]:
        """Runs the model once.

        Raises:
            DataError: If the feed does not fit the inputs.
            DeviceError: If the run fails, or the state was lost in one that did.
        """
        check_feed(feed, self._loaded.inputs)
        self._need_state()
        given = {name: self._loaded.placed(array) for name, array in feed.items()}
        self._lost = self._in_place  # should anything end the run, an interrupt included
        try:
            results = self._loaded.run({**given, **self._carried})
            outputs = {name: results[name].numpy() for name in self._loaded.outputs}
            self._loaded.device.sync()  # of a GPU; a model may have state alone
        except Exception as error:
            lost = "; the streaming state is lost: call reset() or restore()" if self._lost else ""
            raise DeviceError(
                f"TVM failed while running: {root_cause(error)}; the model takes "
                f"{describe(self._loaded.inputs.values())}{lost}"
            ) from error
        self._carried = {s.input: results[s.output] for s in self.states}
        self._lost = False
        return outputs

    def reset(self) -> None:
        """Forgets the streaming state, which is zero then."""
        self.restore({s.input: s.zeros() for s in self.states})

    def state(self) -> dict[str, Array]:
        """Copies of the streaming state by input name.

        Raises:
            DeviceError: If the state was lost in a run that failed.
        """
        self._need_state()
        return {name: np.array(tensor.numpy()) for name, tensor in self._carried.items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Goes on from a streaming state, of which copies are taken.

        Raises:
            DataError: If names, shapes or dtypes are not those of the model; the state then is what it was.
        """
        check_state(state, self.states)
        self._carried = {name: self._loaded.placed(array) for name, array in state.items()}
        self._lost = False

    def stream(self) -> TvmSession:
        """Another stream over the same code and weights, which starts from reset."""
        return TvmSession(self._loaded)

    def _need_state(self) -> None:
        if self._lost:
            raise DeviceError(
                "an earlier run failed and may have left the streaming state half written: call reset(), or restore() "
                "with a state from before"
            )
