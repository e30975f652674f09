"""Sessions: an artifact that runs feeds, and probes that return values from inside a model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import CalibrationError, CompileError, DeviceError
from onnxcomp.state import StateSpec, model_state
from onnxcomp.target import Array, Feed, Session, TensorSpec
from onnxcomp.targets.ort.feeds import check_feed, describe, tensor_spec
from onnxcomp.targets.ort.probe import PLACEHOLDER, build_probe
from onnxcomp.targets.ort.runtime import clean, make_session, session_options


class OrtSession(Session):
    """Runs an onnxruntime session and carries its state from run to run.

    Args:
        session: The `onnxruntime.InferenceSession`.
        state: Streaming state of the model.
        returns: Names of the outputs that a run returns; by default all but those of the state.
        alive: Memory that the session uses without owning it.
    """

    def __init__(
        self,
        session: Any,
        state: Sequence[StateSpec] = (),
        *,
        returns: Sequence[str] | None = None,
        alive: object = None,
    ) -> None:
        self._session = session
        self._state = tuple(state)
        self._alive = alive
        carried_in = {s.input for s in state}
        carried_out = {s.output for s in state}
        specs = [tensor_spec(i) for i in session.get_inputs()]
        self._specs = {s.name: s for s in specs if s.name not in carried_in}
        self._fetch = [o.name for o in session.get_outputs()]
        self._returns = [n for n in self._fetch if n not in carried_out] if returns is None else list(returns)
        self._outputs = tuple(tensor_spec(o) for o in session.get_outputs() if o.name in self._returns)
        self._carried: dict[str, Array] = {}
        self.reset()

    @property
    def inputs(self) -> Sequence[TensorSpec]:
        """Inputs that a feed has to give."""
        return tuple(self._specs.values())

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        """Outputs that a run returns."""
        return self._outputs

    @property
    def state(self) -> Sequence[StateSpec]:
        """The streaming state."""
        return self._state

    def run(self, feed: Feed) -> dict[str, Array]:
        """Runs the model once.

        A run that fails leaves the streaming state as it was.

        Raises:
            DataError: If the feed does not fit the inputs.
            DeviceError: If the run fails.
        """
        check_feed(feed, self._specs)
        try:
            values = self._session.run(self._fetch, {**feed, **self._carried})
        except Exception as error:  # onnxruntime's exceptions have no common root below Exception
            raise DeviceError(
                f"onnxruntime failed while running: {clean(error)}; the model takes {describe(self._specs.values())}"
            ) from error
        results: dict[str, Array] = dict(zip(self._fetch, values, strict=True))
        self._carried = {s.input: results[s.output] for s in self._state}
        return {name: results[name] for name in self._returns}

    def reset(self) -> None:
        """Forgets the streaming state."""
        self._carried = {s.input: s.zeros() for s in self._state}


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
    return OrtSession(inner, state, returns=wanted, alive=probe.weights)
