"""Sessions: an artifact that runs feeds, and probes that return values from inside a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import CalibrationError, CompileError, DeviceError
from onnxcomp.feeds import check_feed, describe
from onnxcomp.state import StateSpec, check_state, model_state
from onnxcomp.target import Array, Feed, Session, TensorSpec
from onnxcomp.targets.ort.carried import Bound, Handed
from onnxcomp.targets.ort.feeds import tensor_spec
from onnxcomp.targets.ort.probe import PLACEHOLDER, build_probe
from onnxcomp.targets.ort.runtime import clean, make_session, session_options


class OrtSession(Session):
    """Runs an onnxruntime session and carries its state from run to run.

    State marked `in_place` has one buffer that is input and output of every run, unless there are strings among the
    inputs and outputs; see `onnxcomp.targets.ort.carried`.

    Args:
        session: The `onnxruntime.InferenceSession`.
        state: Streaming state of the model.
        returns: Names of the outputs that a run returns; by default all but those of the state.
        alive: Memory that the session uses without owning it.
        model_hash: Tells the model from others.
    """

    def __init__(
        self,
        session: Any,
        state: Sequence[StateSpec] = (),
        *,
        returns: Sequence[str] | None = None,
        alive: object = None,
        model_hash: str = "",
    ) -> None:
        self._session = session
        self._states = tuple(state)
        self._alive = alive
        self._model_hash = model_hash
        carried_in = {s.input for s in state}
        carried_out = {s.output for s in state}
        specs = [tensor_spec(i) for i in session.get_inputs()]
        self._specs = {s.name: s for s in specs if s.name not in carried_in}
        fetch = [o.name for o in session.get_outputs()]
        self._returns = [n for n in fetch if n not in carried_out] if returns is None else list(returns)
        self._outputs = tuple(tensor_spec(o) for o in session.get_outputs() if o.name in self._returns)
        # onnxruntime binds no strings; kernels that work in place take two buffers as well.
        strings = any(s.dtype.kind == "O" for s in (*specs, *self._outputs))
        self._in_place = any(s.in_place for s in state) and not strings
        self._carried = (Bound if self._in_place else Handed)(session, self._states, fetch, self._returns)
        self._lost = False

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Inputs that a feed has to give."""
        return tuple(self._specs.values())

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs that a run returns."""
        return self._outputs

    @property
    def states(self) -> Sequence[StateSpec]:
        """The streaming state."""
        return self._states

    @property
    def model_hash(self) -> str:
        """Hash of the model files; empty for a model in memory."""
        return self._model_hash

    def run(self, feed: Feed) -> dict[str, Array]:
        """Runs the model once.

        A feed that does not fit leaves the streaming state as it was, and so does a run that fails, unless some state
        is in place: that may be half written then, and runs are refused until `reset` or `restore`.

        Raises:
            DataError: If the feed does not fit the inputs.
            DeviceError: If the run fails, or the state was lost in one that did.
        """
        check_feed(feed, self._specs)
        self._need_state()
        self._lost = self._in_place  # should anything end the run, an interrupt included
        try:
            results = self._carried.run(feed)
        except Exception as error:  # onnxruntime's exceptions have no common root below Exception
            lost = "; the streaming state is lost: call reset() or restore()" if self._lost else ""
            raise DeviceError(
                f"onnxruntime failed while running: {clean(error)}; the model takes "
                f"{describe(self._specs.values())}{lost}"
            ) from error
        self._lost = False
        return results

    def reset(self) -> None:
        """Forgets the streaming state, which is zero then."""
        self._carried.write({s.input: s.zeros() for s in self._states})
        self._lost = False

    def state(self) -> dict[str, Array]:
        """Copies of the streaming state by input name.

        Raises:
            DeviceError: If the state was lost in a run that failed.
        """
        self._need_state()
        return {name: array.copy() for name, array in self._carried.read().items()}

    def restore(self, state: Mapping[str, Array]) -> None:
        """Goes on from a streaming state, of which copies are taken.

        Raises:
            DataError: If names, shapes or dtypes are not those of the model; the state then is what it was.
        """
        check_state(state, self._states)
        self._carried.write(state)
        self._lost = False

    def stream(self) -> OrtSession:
        """Another stream over the same onnxruntime session, which starts from reset; it may run on another thread."""
        return OrtSession(
            self._session, self._states, returns=self._returns, alive=self._alive, model_hash=self._model_hash
        )

    def _need_state(self) -> None:
        if self._lost:
            raise DeviceError(
                "an earlier run failed and may have left the streaming state half written: call reset(), or restore() "
                "with a state from before"
            )


def reference_runner(
    model: ir.Model, outputs: Sequence[str], *, threads: int = 0, optimize: bool = True
) -> Callable[[Feed], dict[str, Array]]:
    """Prepares `model` for runs that return values from inside it.

    `model` is neither changed nor cloned: a probe is written as protobuf from its nodes, with the wanted values as
    outputs, and weights of more than `SHARE_ABOVE` bytes in all are shared with it in memory, external ones mapped from
    their file; such a probe is not optimised, since onnxruntime's optimizer looks for the data on disk.
    Whatever the wanted values do not need is not run. Streaming state is carried as in a session.

    Args:
        model: The model.
        outputs: Names of values of the main graph: inputs, weights, outputs of nodes.
        threads: Threads of one run; 0 lets onnxruntime choose.
        optimize: Whether onnxruntime optimises the probe.

    Raises:
        CalibrationError: If a name is no value of the main graph, or onnxruntime cannot run the model.
    """
    return probe_session(model, outputs, threads=threads, optimize=optimize).run


def probe_session(model: ir.Model, outputs: Sequence[str], *, threads: int = 0, optimize: bool = True) -> OrtSession:
    """The session behind `reference_runner`, which tells the shapes of the values as well."""
    state = model_state(model)
    wanted = list(dict.fromkeys(outputs))
    fetch = list(dict.fromkeys([*wanted, *(s.output for s in state)]))
    probe = build_probe(model, fetch)
    options = session_options(threads=threads, domains=model.opset_imports, optimize=optimize and not probe.weights)
    for name, value in probe.weights.items():
        options.add_initializer(name, value)
    try:
        with tempfile.TemporaryDirectory(prefix="onnxcomp-probe-") as folder:
            # onnxruntime wants the file of a placeholder to exist, though it never opens it.
            Path(folder, PLACEHOLDER).touch()
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            inner = make_session(probe.proto.SerializeToString(), options)
    except CompileError as error:
        raise CalibrationError(f"the model cannot be run: {error}") from error
    # A probe returns values from inside the model, which a buffer written in place could change under its hands.
    apart = [s.model_copy(update={"in_place": False}) for s in state]
    return OrtSession(inner, apart, returns=wanted, alive=probe.weights)
