"""A real ssh server on loopback, artifacts, and a stand-in for the runner of TVM artifacts."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from devices.stand_in import STAND_IN, put_runner
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.targets.device import job
from onnxcomp.targets.device.artifacts import own_architecture


@pytest.fixture(autouse=True)
def _devices_of_the_test(monkeypatch, tmp_path):
    monkeypatch.setenv("ONNXCOMP_CONFIG", str(tmp_path / "config"))


@pytest.fixture(autouse=True)
def deployed(monkeypatch):
    """Triples that a runner was asked for; what is given is the stand-in, which copies its input."""
    triples: list[str] = []

    def deploy(triple: str, folder: Path, *, gpu: bool) -> None:
        triples.append(triple)
        put_runner(folder, STAND_IN)

    monkeypatch.setattr(job, "deploy_runner", deploy)
    return triples


@pytest.fixture
def artifact(tmp_path) -> Callable[..., Path]:
    """Makes the folder of a TVM artifact whose output `y` is its input `x`; `mode` is what the stand-in does."""

    def make(mode: str = "copy", *, arch: str = "", size: int = 0) -> Path:
        folder = tmp_path / f"artifact_{mode}_{arch}"
        folder.mkdir()
        tensor = {"dtype": "float32", "shape": [2, 3]}
        manifest = {
            "target": "tvm-cpu",
            "triple": f"{arch or own_architecture()}-linux-gnu",
            "inputs": [{"name": "x", **tensor}],
            "outputs": [{"name": "y", **tensor}],
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "mode").write_text(mode)
        (folder / "weights.bin").write_bytes(bytes(size))
        return folder

    return make


@dataclass
class Server:
    """An ssh server of the test's own, with keys of its own.

    Attributes:
        port: On loopback.
        folder: Where its keys are.
        work: Folder for jobs, as a device's `--folder`.
    """

    port: int
    folder: Path
    work: Path
    process: subprocess.Popen[bytes]

    @property
    def settings(self) -> dict[str, str | int]:
        return {
            "host": f"{getpass.getuser()}@127.0.0.1",
            "port": self.port,
            "identity": str(self.folder / "user"),
            "known_hosts": str(self.folder / "known_hosts"),
            "folder": str(self.work),
            "timeout": 60,
        }

    def left(self, seconds: float = 10.0) -> list[str]:
        """What is in the folder for jobs, or still runs there, after waiting for it to be gone."""
        ends = time.monotonic() + seconds
        while (found := self._found()) and time.monotonic() < ends:
            time.sleep(0.05)
        return found

    def _found(self) -> list[str]:
        running = [str(process) for process in self.processes()]
        return [p.name for p in self.work.iterdir()] + running

    def processes(self) -> list[psutil.Process]:
        """What runs by way of this server, whatever its parent is by now; the shells of jobs come first."""
        found = [p for p in psutil.process_iter() if self._is_ours(p)]
        return sorted(found, key=lambda p: p.pid)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            environment = process.environ()
            return process.status() != psutil.STATUS_ZOMBIE and environment.get("SSH_CONNECTION", "").endswith(
                f" {self.port}"
            )
        except psutil.Error:
            return False


def _key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def _sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sshd = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("needs OpenSSH's client and server")
    folder = tmp_path_factory.mktemp("sshd")
    folder.chmod(0o700)
    _key(folder / "host")
    _key(folder / "user")
    _key(folder / "stranger")
    shutil.copy(folder / "user.pub", folder / "authorized_keys")
    port = _free_port()
    host_key = (folder / "host.pub").read_text().split()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key[0]} {host_key[1]}\n")
    other = (folder / "stranger.pub").read_text().split()
    (folder / "changed_hosts").write_text(f"[127.0.0.1]:{port} {other[0]} {other[1]}\n")
    (folder / "no_hosts").touch()
    lines = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": "none",
        "AuthorizedKeysFile": folder / "authorized_keys", "PasswordAuthentication": "no", "UsePAM": "no",
        "KbdInteractiveAuthentication": "no", "PermitRootLogin": "prohibit-password", "StrictModes": "no",
        "SetEnv": f"HOME={folder}",  # what the developer's shell starts with is no part of the test
    }  # fmt: skip
    (folder / "config").write_text("".join(f"{k} {v}\n" for k, v in lines.items()))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd gives up its rights there
    log = (folder / "log").open("wb")
    process = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "config"], stderr=log)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        else:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-500:]}")
        yield Server(port, folder, folder, process)
    finally:
        process.terminate()
        process.wait(10)
        log.close()


@pytest.fixture
def server(_sshd: Server, tmp_path: Path) -> Server:
    """The server, with a folder for the jobs of one test."""
    work = tmp_path / "work on the device"
    work.mkdir()
    return Server(_sshd.port, _sshd.folder, work, _sshd.process)


@pytest.fixture(scope="module")
def module_mlp():
    """A small model, for tests that compile it once."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(8, 32)), "w2": rng.normal(size=(32, 4))}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
