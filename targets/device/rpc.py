"""A device on which a TVM RPC server runs; TVM has to be installed here, and TVM's runtime there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from onnxcomp.data import check_feed
from onnxcomp.device import Device, DeviceFacts, DeviceLatency, DeviceProfile, Settings
from onnxcomp.errors import DeviceError, OnnxcompError, UnsupportedError
from onnxcomp.model import root_cause
from onnxcomp.state import StateSpec
from onnxcomp.target import Array, Feed
from onnxcomp.targets.device.artifacts import DeviceArtifact

NOTE = "RPC tells no peak memory, and its load time has the upload in it"
_ENTRY = "main"
_AT_ONCE = 10
"""Runs that the server times before it is asked again."""


class RpcSettings(Settings):
    """How an RPC server is reached.

    Attributes:
        host: Its name or address.
        port: Its port.
        key: Name that the server was started with, if any.
    """

    host: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:%-]*$", max_length=255)
    port: int = Field(default=9090, ge=1, le=65535)
    key: str = Field(default="", pattern=r"^[A-Za-z0-9_.:-]*$", max_length=255)


class RpcDevice(Device):
    """A TVM RPC server, which runs TVM artifacts only."""

    kind: ClassVar[str] = "rpc"
    summary: ClassVar[str] = "a TVM RPC server"
    settings_type: ClassVar[type[Settings]] = RpcSettings
    settings: RpcSettings

    def check(self) -> DeviceFacts:
        """Connects, which is all that can be asked of an RPC server."""
        with self._session():
            return DeviceFacts(
                device=self.name,
                kind=self.kind,
                model=f"TVM RPC server {self.settings.host}:{self.settings.port}",
                warnings=("RPC tells neither architecture nor memory",),
            )

    def run(self, artifact: Path, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
        """Runs the artifact in folder `artifact` on feeds, one after another; state is carried from one to the next."""
        with self._loaded(artifact, feeds) as loaded:
            return [loaded.run(feed) for feed in feeds]

    def profile(
        self,
        artifact: Path,
        feed: Feed,
        *,
        threads: int = 1,
        warmup: int = 5,
        repeat: int = 50,
        seconds: float | None = 60.0,
    ) -> DeviceProfile:
        """Measures the artifact in folder `artifact` on one feed; the server's own clock is read."""
        with self._loaded(artifact, [feed]) as loaded:
            loaded.use(threads)
            loaded.bind(feed)
            first = loaded.times(1)
            if warmup:
                loaded.times(warmup)
            ends = None if seconds is None else time.perf_counter() + seconds
            times: list[float] = []
            while len(times) < repeat and (not times or ends is None or time.perf_counter() < ends):
                times += loaded.times(min(_AT_ONCE, repeat - len(times)))
            target, load_ms = loaded.artifact.target, loaded.load_ms
        p10, median, p90, p99 = (float(q) for q in np.percentile(times, [10, 50, 90, 99]))
        return DeviceProfile(
            device=self.name,
            kind=self.kind,
            target=target,
            threads=threads,
            latency=DeviceLatency(median=median, p10=p10, p90=p90, p99=p99, min=min(times), mean=float(np.mean(times))),
            samples=len(times),
            load_ms=load_ms,
            first_ms=first[0],
            note=NOTE,
        )

    @contextmanager
    def _session(self) -> Iterator[Any]:
        """A connection, with what goes wrong on it as an error that names the device."""
        where = f"device {self.name!r} ({self.settings.host}:{self.settings.port})"
        try:
            import tvm.rpc
        except ImportError as error:
            raise DeviceError(
                f"TVM cannot be imported ({error}), and without it there is no RPC: pip install 'onnxcomp[tvm]'"
            ) from error
        try:
            session = tvm.rpc.connect(
                self.settings.host, self.settings.port, self.settings.key, session_timeout=self.settings.timeout
            )
        except Exception as error:  # TVM's exceptions have no common root below Exception
            raise DeviceError(
                f"{where} cannot be reached: {_said(error)}; start the server there with: "
                f"python3 -m tvm.exec.rpc_server --host 0.0.0.0 --port {self.settings.port}"
            ) from error
        try:
            yield session
        except OnnxcompError:
            raise
        except Exception as error:
            raise DeviceError(f"{where} failed: {_said(error)}; look at what the server printed") from error

    @contextmanager
    def _loaded(self, path: Path, feeds: Sequence[Feed]) -> Iterator[_Remote]:
        artifact = DeviceArtifact(path)
        if not artifact.is_tvm:
            raise UnsupportedError(f"{artifact.path} is for {artifact.target}; an RPC server runs TVM artifacts only")
        if artifact.gpu:
            raise UnsupportedError(
                f"{artifact.path} is for a GPU; an RPC server runs those for CPUs, ssh those for GPUs"
            )
        for index, feed in enumerate(feeds):
            check_feed(feed, artifact.inputs, f"feed {index}")
        with self._session() as session:
            yield _Remote(artifact, session)


class _Remote:
    """An artifact on the server."""

    def __init__(self, artifact: DeviceArtifact, session: Any) -> None:
        import tvm
        from tvm import relax

        from onnxcomp.targets.tvm import TvmAarch64, TvmCpu
        from onnxcomp.targets.tvm.manifest import CODE, WEIGHTS
        from onnxcomp.targets.tvm.weights import mapped

        opener = next((t for t in (TvmCpu, TvmAarch64) if t.name == artifact.target), TvmCpu)
        manifest = opener().open(artifact.path).manifest
        self.artifact = artifact
        self._tvm, self._session, self._device = tvm, session, session.cpu(0)
        self._parameters: list[str] = manifest["parameters"]
        self._returns: list[str] = manifest["returns"]
        self._states = tuple(StateSpec.model_validate(s) for s in manifest["state"])
        started = time.perf_counter()
        session.upload(artifact.path / CODE, CODE)  # into a folder that goes with the connection
        try:
            self._machine = relax.VirtualMachine(session.load_module(CODE), self._device)
        except Exception as error:
            raise DeviceError(
                f"the server cannot load {artifact.path}, which was compiled for {artifact.triple}: "
                f"{_said(error)}; compile the model for the server's CPU"
            ) from error
        arrays = mapped(artifact.path / WEIGHTS, manifest["weights"])
        self._weights = [self._tensor(array) for array in arrays]
        self.load_ms = 1e3 * (time.perf_counter() - started)
        self._state: dict[str, Any] = {s.input: self._tensor(s.zeros()) for s in self._states}

    def use(self, threads: int) -> None:
        """Sets the threads of a run; 0 leaves them to the server."""
        if threads:
            self._session.get_function("runtime.config_threadpool")(1, threads)

    def bind(self, feed: Feed) -> None:
        """Sends the inputs of the next run."""
        given = {name: self._tensor(array) for name, array in feed.items()}
        values = {**given, **self._state}
        self._machine.set_input(_ENTRY, *(values[name] for name in self._parameters), *self._weights)

    def run(self, feed: Feed) -> dict[str, Array]:
        """Runs once, and carries the state."""
        self.bind(feed)
        self._machine.invoke_stateful(_ENTRY)
        found = self._machine.get_outputs(_ENTRY)
        values = dict(zip(self._returns, found if isinstance(found, tuple) else (found,), strict=True))
        self._state = {s.input: self._tensor(values[s.output].numpy()) for s in self._states}
        return {name: values[name].numpy() for name in self.artifact.outputs}

    def times(self, repeat: int) -> list[float]:
        """Milliseconds of runs on what was bound, by the server's clock."""
        timer = self._machine.time_evaluator("invoke_stateful", self._device, number=1, repeat=repeat)
        return [1e3 * seconds for seconds in timer(_ENTRY).results]

    def _tensor(self, array: Array) -> Any:
        return self._tvm.runtime.tensor(np.ascontiguousarray(array).reshape(array.shape), self._device)


def _said(error: Exception) -> str:
    return " ".join(str(root_cause(error)).split())[:300]
