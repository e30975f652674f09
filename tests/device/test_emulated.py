"""Artifacts on an emulated 64-bit ARM: outputs are those of here. It says nothing about speed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from device import artifacts, root  # noqa: E402
from sparse_ops import assert_close, make_call, portable, tolerance  # noqa: E402

from onnxcomp import native  # noqa: E402
from onnxcomp.errors import CompileError  # noqa: E402
from onnxcomp.rewrite import Context  # noqa: E402
from onnxcomp.targets import device  # noqa: E402
from onnxcomp.targets.ort import OrtCpu  # noqa: E402
from onnxcomp.targets.ort.lowering import NativeOps  # noqa: E402
from onnxcomp.targets.tvm import TvmAarch64, TvmCpu, linking, runner_build  # noqa: E402

ARM = "aarch64-linux-gnu"
NATIVE = Path(__file__).parents[2] / "onnxcomp" / "native"
MODELS = [artifacts.cnn, artifacts.mlp, artifacts.recurrent]

# Sums of one or two hundred products of float32 that vectors of another length take in another order.
RTOL, ATOL = 1e-5, 1e-4

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(root.missing()), reason=f"needs {root.missing()}")]


@pytest.fixture(scope="module", autouse=True)
def made():
    try:
        return root.made()
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Artifacts of the models, by the name of what made them."""
    try:
        linking.compiler(ARM)
    except CompileError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("arm")
    return {make.__name__: TvmAarch64().compile(make(), folder / make.__name__).path for make in MODELS}


def same(outputs, expected):
    assert outputs.keys() == expected.keys()
    for name, array in outputs.items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_allclose(array, expected[name], rtol=RTOL, atol=ATOL)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Commands of the runner for the emulated machine and, where it is an x86-64, for this one."""
    folder = tmp_path_factory.mktemp("programs")
    emulated = root.command(runner_build.deploy(ARM, folder / "arm"))
    here = "x86_64-linux-gnu"
    return emulated, [str(runner_build.deploy(here, folder / "here"))] if linking.is_host(here) else None


@pytest.mark.parametrize("make", MODELS)
def test_the_runner_gives_what_it_gives_here(make, programs, compiled, tmp_path):
    model = make()
    feeds = artifacts.feeds(model)
    emulated, here = programs
    (tmp_path / "arm").mkdir()
    outputs, report = artifacts.run(emulated, compiled[make.__name__], feeds, tmp_path / "arm", "--check")
    assert report["steps"] == len(feeds)
    same(outputs, artifacts.expected(model, feeds))
    if here:
        artifact = TvmCpu().compile(model, tmp_path / "artifact").path
        same(outputs, artifacts.run(here, artifact, feeds, tmp_path)[0])


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Any]:
    """A session of TVM's RPC server, which the emulated Python runs."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # The server starts itself anew for each session, by the name of the Python that runs it.
    again = folder / "python"
    again.write_text(f'#!/bin/sh\nexec {shlex.join(root.python())} "$@"\n')
    again.chmod(0o755)
    serve = "runpy.run_module('tvm.exec.rpc_server', run_name='__main__')"
    start = f"import sys, runpy; sys.executable = {str(again)!r}; {serve}"
    command = root.python("-c", start, "--host=127.0.0.1", f"--port={port}", f"--port-end={port + 1}")
    with (folder / "log").open("wb") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield connected(port, running, folder / "log")
    finally:
        os.killpg(running.pid, signal.SIGTERM)  # with those that it started
        running.wait(30)


def connected(port: int, running: subprocess.Popen[bytes], log: Path) -> Any:
    deadline = time.monotonic() + 180
    while True:
        try:
            return tvm.rpc.connect("127.0.0.1", port, session_timeout=120)
        except Exception:  # noqa: PERF203
            assert running.poll() is None, log.read_text()
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def test_an_rpc_server_gives_the_same(compiled, tmp_path):
    model = artifacts.recurrent()
    feeds = artifacts.feeds(model)
    artifact = compiled["recurrent"]
    manifest = json.loads((artifact / "manifest.json").read_text())
    weights = [
        np.fromfile(artifact / "weights.bin", w["dtype"], int(np.prod(w["shape"])), offset=w["offset"]).reshape(
            w["shape"]
        )
        for w in manifest["weights"]
    ]
    with server(tmp_path) as session:
        there = session.cpu()
        session.upload(str(artifact / "model.so"))
        machine = tvm.relax.VirtualMachine(session.load_module("model.so"), there)
        values = {s["input"]: tvm.runtime.tensor(np.zeros(s["shape"], s["dtype"]), there) for s in manifest["state"]}
        kept = [tvm.runtime.tensor(w, there) for w in weights]
        steps = []
        for feed in feeds:
            values.update({name: tvm.runtime.tensor(array, there) for name, array in feed.items()})
            machine.set_input("main", *(values[name] for name in manifest["parameters"]), *kept)
            machine.invoke_stateful("main")
            results = dict(zip(manifest["returns"], machine.get_outputs("main"), strict=True))
            values.update({s["input"]: results[s["output"]] for s in manifest["state"]})
            steps.append({o["name"]: results[o["name"]].numpy() for o in manifest["outputs"]})
    same({name: np.stack([s[name] for s in steps]) for name in steps[0]}, artifacts.expected(model, feeds))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The native library for the emulated machine."""
    compiler = f"{ARM}-g++"
    if not (shutil.which(compiler) and shutil.which("cmake")):
        pytest.skip(f"needs {compiler} and cmake")
    folder = tmp_path_factory.mktemp("native")
    settings = {"CMAKE_CXX_COMPILER": compiler, "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64"}
    configure = ["cmake", "-S", str(NATIVE), "-B", str(folder), *(f"-D{k}={v}" for k, v in settings.items())]
    for command in (configure, ["cmake", "--build", str(folder)]):
        subprocess.run(command, check=True, capture_output=True, timeout=900)
    return folder / "onnxcomp_native.so"


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
@pytest.mark.parametrize("isa", ["", "portable"])
@pytest.mark.parametrize("op_type", ["ThresholdMatMul", "ThresholdMatMulInt8", "ThresholdMatMulInt4"])
def test_onnxruntime_with_the_native_library_is_right(op_type, isa, library, tmp_path):
    call = make_call(op_type, 96, 64, batch=(3,))
    feed = call.activations
    target, model = OrtCpu(), portable(call)
    NativeOps().apply(model, Context(capabilities=target.capabilities()))
    artifact = target.compile(model, tmp_path / "artifact")
    assert native.DOMAIN in artifact.manifest["opsets"]
    command = [str(Path(device.__file__).with_name("ort_run.py")), str(artifact.path / "model.onnx")]
    for name, array in feed.items():
        np.save(tmp_path / f"{name}.npy", array)
        command += ["--input", f"{name}={tmp_path / name}.npy"]
    command += ["--native", str(library), "--out", str(tmp_path / "out")]
    environment = {"ONNXCOMP_ISA": isa} if isa else {}
    done = subprocess.run(
        root.python(*command, environment=environment), check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    (file,) = json.loads(done.stdout)["outputs"].values()
    # Not against the outputs here: each instruction set rounds the inputs of integer kernels in its own way, or not.
    assert_close(np.load(tmp_path / "out" / file), call, tolerance(call))
