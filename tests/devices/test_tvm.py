"""Real TVM artifacts: by the real runner here, over ssh, and emulated, and by a real RPC server on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

tvm = pytest.importorskip("tvm")

from onnxcomp import api  # noqa: E402
from onnxcomp.errors import DeviceError, UnsupportedError  # noqa: E402
from onnxcomp.targets.device import job  # noqa: E402
from onnxcomp.targets.device.runner import deploy_runner  # noqa: E402


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("rpc") / "log"
    line = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(found)]
    with log.open("wb") as file:
        process = subprocess.Popen([*line, "--port-end", str(found + 1)], stdout=file, stderr=file)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", found)) == 0:
                    break
            if process.poll() is not None:
                pytest.skip(f"the RPC server does not start here: {log.read_text()[-500:]}")
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture
def device(port):
    api.add_device("board", "rpc", host="127.0.0.1", port=port, timeout=60)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, module_mlp):
    folder = tmp_path_factory.mktemp("compiled")
    onnx.save(module_mlp, folder / "mlp.onnx")
    api.compile(folder / "mlp.onnx", folder / "artifact", target="tvm-cpu")
    return folder


FEEDS = [{"x": np.random.default_rng(i).normal(size=(1, 8)).astype(np.float32)} for i in range(3)]


@pytest.fixture
def same(run, compiled):
    """Compares what a device computes for `FEEDS` with onnxruntime."""

    def check(device: str, artifact) -> None:
        found = api.run_on(device, artifact, FEEDS)
        for feed, outputs in zip(FEEDS, found, strict=True):
            np.testing.assert_allclose(outputs["y"], run(compiled / "mlp.onnx", feed)[0], rtol=1e-4, atol=1e-5)

    return check


@pytest.fixture
def real_runner(monkeypatch):
    monkeypatch.setattr(job, "deploy_runner", deploy_runner)


def test_rpc(device, compiled, same):
    same("board", compiled / "artifact")


def test_runner(real_runner, compiled, same):
    same("local", compiled / "artifact")
    found = api.profile(compiled / "artifact", device="local", repeat=20)
    assert found.samples == 20
    assert found.latency.min <= found.latency.median <= found.latency.p99


def test_runner_over_ssh(real_runner, compiled, same, server):
    api.add_device("board", "ssh", **server.settings)
    same("board", compiled / "artifact")
    assert api.profile(compiled / "artifact", device="board", repeat=20).samples == 20
    assert server.left() == []


@pytest.mark.slow
def test_emulated_runner(real_runner, compiled, same, tmp_path):
    api.add_device("arm", "emulated")
    try:
        api.check_device("arm")
        deploy_runner("aarch64-linux-gnu", tmp_path / "runner", gpu=False)
    except DeviceError as error:
        pytest.skip(str(error))
    api.compile(compiled / "mlp.onnx", tmp_path / "artifact", target="tvm-aarch64")
    same("arm", tmp_path / "artifact")
    found = api.profile(tmp_path / "artifact", device="arm")
    assert (found.latency, found.load_ms, found.first_ms, found.peak_memory) == (None, None, None, None)


def test_profile_reads_the_clock_of_the_server(device, compiled):
    found = api.profile(compiled / "artifact", device="board", repeat=20)
    assert found.latency.min <= found.latency.median <= found.latency.p99
    assert (found.samples, found.threads) == (20, 1)
    assert found.peak_memory is None
    assert "RPC" in found.note


def test_check(device):
    assert api.check_device("board").kind == "rpc"


def test_nobody_listens(compiled):
    api.add_device("board", "rpc", host="127.0.0.1", port=1)
    with pytest.raises(DeviceError, match=r"127\.0\.0\.1:1\) cannot be reached: .*rpc_server"):
        api.run_on("board", compiled / "artifact", [{"x": np.zeros((1, 8), np.float32)}])


def test_artifact_of_another_target(device, model_path, tmp_path):
    api.compile(model_path, tmp_path / "artifact")
    with pytest.raises(UnsupportedError, match="TVM artifacts only"):
        api.profile(tmp_path / "artifact", device="board")
