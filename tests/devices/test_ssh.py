"""Devices over ssh, against a real server on loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from onnxcomp import api
from onnxcomp.errors import DataError, DeviceError
from onnxcomp.targets.device.artifacts import own_architecture

FOREIGN = "riscv64"


@pytest.fixture
def device(server):
    api.add_device("board", "ssh", **server.settings)
    return server


def feeds(count: int = 1) -> list[dict[str, np.ndarray]]:
    return [{"x": np.arange(6, dtype=np.float32).reshape(2, 3) + i} for i in range(count)]


def again(server, **changed: str | int) -> None:
    """Adds the device anew, with some settings changed."""
    api.remove_device("board")
    api.add_device("board", "ssh", **{**server.settings, **changed})


def running(server) -> Path:
    """Folder of the job that runs on the device, once its runner does."""
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        for folder in server.work.glob("onnxcomp.*"):
            if (folder / "out" / "0.json").exists():
                return folder
        time.sleep(0.02)
    raise AssertionError("no job was started")


@contextmanager
def in_background(function, *arguments):
    """Runs a function that is expected to fail with a `DeviceError`, which is in the list in the end."""
    errors: list[DeviceError] = []

    def run() -> None:
        try:
            function(*arguments)
        except DeviceError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield errors
    thread.join(40)
    assert not thread.is_alive()


def test_outputs_come_back_and_nothing_stays(device, artifact):
    sent = feeds(3)
    found = api.run_on("board", artifact(), sent)
    assert [list(f) for f in found] == [["y"]] * 3
    for feed, outputs in zip(sent, found, strict=True):
        np.testing.assert_array_equal(outputs["y"], feed["x"])
    assert device.left() == []


def test_folder_need_not_be_given(server, artifact):
    api.add_device("board", "ssh", **{k: v for k, v in server.settings.items() if k != "folder"})
    np.testing.assert_array_equal(api.run_on("board", artifact(), feeds())[0]["y"], feeds()[0]["x"])
    assert server.left() == []


def test_no_feeds_need_no_device(device, artifact):
    assert api.run_on("board", artifact(), []) == []


def test_profile_is_what_the_runner_printed(device, artifact, deployed):
    found = api.profile(artifact(), device="board", repeat=50)
    assert found.latency.median == 2.0
    assert (found.samples, found.load_ms, found.first_ms, found.peak_memory) == (50, 1.5, 2.5, 1000)
    assert deployed == [f"{own_architecture()}-linux-gnu"]
    assert device.left() == []


def test_ort_artifact_is_run_by_the_python_there(device, model_path, tmp_path, x, run):
    again(device, python=sys.executable)
    api.compile(model_path, tmp_path / "artifact")
    found = api.run_on("board", tmp_path / "artifact", [{"x": x[:2]}])
    np.testing.assert_allclose(found[0]["y"], run(model_path, {"x": x[:2]})[0], atol=1e-6)
    assert api.profile(tmp_path / "artifact", device="board", repeat=10).samples == 10
    assert device.left() == []


def test_python_that_is_not_there(device, model_path, tmp_path):
    again(device, python="/none/python3")
    api.compile(model_path, tmp_path / "artifact")
    with pytest.raises(DeviceError, match=r"cannot start what runs the artifact: .*/none/python3"):
        api.profile(tmp_path / "artifact", device="board")
    assert device.left() == []


def test_python_without_onnxruntime(device, model_path, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    again(device, python=str(bare))
    api.compile(model_path, tmp_path / "artifact")
    with pytest.raises(DeviceError, match=r"cannot load the artifact: ModuleNotFoundError: .*onnxruntime"):
        api.profile(tmp_path / "artifact", device="board")
    found = api.check_device("board")
    assert found.python
    assert not found.onnxruntime


def test_check_tells_what_the_device_is(device):
    found = api.check_device("board")
    assert found.arch == own_architecture()
    assert found.cores == os.cpu_count()
    assert found.memory > 1 << 28
    assert found.free > 0
    assert found.python


def test_check_with_another_architecture_than_expected(server):
    api.add_device("board", "ssh", **server.settings, arch=FOREIGN)
    with pytest.raises(DeviceError, match=f"is {own_architecture()}, not {FOREIGN}"):
        api.check_device("board")


def test_feed_that_does_not_fit_is_not_sent(device, artifact):
    with pytest.raises(DataError, match="2x3"):
        api.run_on("board", artifact(), [{"x": np.zeros((2, 4), np.float32)}])


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("refuse", "the run failed on board: onnxcomp-run: no such input"),
        ("elsewhere", "cannot load the artifact: onnxcomp-run: wrong architecture; look whether"),
        ("illegal", "ended on board by signal 4, as when it was compiled for a CPU with other instructions"),
        ("die", "ended on board by signal 9, as when memory is short"),
    ],
)
def test_failing_runner(device, artifact, mode, message):
    with pytest.raises(DeviceError, match=message):
        api.run_on("board", artifact(mode), feeds())
    assert device.left() == []


def test_wrong_architecture_is_refused_before_it_is_sent(device, artifact):
    with pytest.raises(DeviceError, match=f"is {own_architecture()}; the artifact was compiled for {FOREIGN}"):
        api.run_on("board", artifact(arch=FOREIGN, size=1 << 22), feeds())
    assert device.left() == []


@pytest.mark.parametrize("mode", ["sleep", "children"])
def test_time_is_up(device, artifact, mode):
    again(device, timeout=2)
    started = time.monotonic()
    with pytest.raises(DeviceError, match=r"--timeout 2 s.*removed"):
        api.run_on("board", artifact(mode), feeds())
    assert time.monotonic() - started < 10
    assert device.left() == []


def test_unknown_host_key(device, artifact):
    again(device, known_hosts=str(device.folder / "no_hosts"))
    with pytest.raises(DeviceError, match=r"host key .* is not known.*--known-hosts"):
        api.run_on("board", artifact(), feeds())
    with pytest.raises(DeviceError, match="is not known"):
        api.check_device("board")


def test_changed_host_key(device, artifact):
    again(device, known_hosts=str(device.folder / "changed_hosts"))
    with pytest.raises(DeviceError, match="is not the known one"):
        api.run_on("board", artifact(), feeds())


def test_wrong_identity(device, artifact):
    again(device, identity=str(device.folder / "stranger"))
    with pytest.raises(DeviceError, match=r"refuses the key.*--identity"):
        api.run_on("board", artifact(size=1 << 22), feeds())


def test_nobody_listens(device, artifact):
    again(device, port=1)
    with pytest.raises(DeviceError, match=r"cannot be reached: .*refused.*ssh -p 1"):
        api.run_on("board", artifact(), feeds())


def test_folder_that_is_not_there(device, artifact):
    again(device, folder=str(device.work / "none"))
    with pytest.raises(DeviceError, match=r"no folder can be made.*--folder"):
        api.run_on("board", artifact(), feeds())
    assert api.check_device("board").warnings


def test_server_that_goes_away(device, artifact):
    with in_background(api.run_on, "board", artifact("children"), feeds()) as errors:
        running(device)
        device.processes()[0].parent().kill()  # the server's process for this connection
    assert "went away while the artifact ran there" in str(errors[0])
    assert device.left() == []


def test_shell_that_is_killed_there(device, artifact):
    with in_background(api.run_on, "board", artifact("children"), feeds()) as errors:
        running(device)
        device.processes()[0].kill()
    assert errors
    assert device.left() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_command_line_that_is_ended(device, artifact, tmp_path, number):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    code = (
        "import sys, onnxcomp.cli\n"
        "from onnxcomp.targets.device import job\n"
        "from devices.stand_in import STAND_IN, put_runner\n"
        "job.deploy_runner = lambda triple, folder, gpu: put_runner(folder, STAND_IN)\n"
        "onnxcomp.cli.main()\n"
    )
    line = [sys.executable, "-c", code, "profile", artifact("sleep"), "--device", "board"]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    running(device)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), err
    assert out == ""
    assert "Traceback" not in err
    assert device.left() == []
    assert number == signal.SIGKILL or list(temporary.iterdir()) == []


@pytest.fixture
def small(server, artifact):
    """A file system of 4 MB as the device's folder."""
    mounted = server.work / "small"
    mounted.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", mounted], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    api.add_device("board", "ssh", **{**server.settings, "folder": str(mounted)})
    try:
        yield mounted
    finally:
        subprocess.run(["umount", mounted], check=True)


def test_artifact_that_does_not_fit_is_not_sent(small, artifact):
    with pytest.raises(DeviceError, match=r"has 4\.\d MB free in .*, and the artifact needs 10\.0 MB"):
        api.run_on("board", artifact(size=10_000_000), feeds())
    assert list(small.iterdir()) == []


def test_disk_that_is_full_while_the_artifact_arrives(small, artifact, monkeypatch):
    from onnxcomp.targets.device import ssh

    monkeypatch.setattr(ssh, "_SPARE", -9_900_000)
    with pytest.raises(DeviceError, match=r"could not be unpacked on .*, where 0\.0 MB are left: tar: "):
        api.run_on("board", artifact(size=10_000_000), feeds())
    assert list(small.iterdir()) == []


def test_disk_that_is_full_while_the_artifact_runs(small, artifact):
    with pytest.raises(DeviceError, match=r"the run failed on board: .*No space left"):
        api.run_on("board", artifact("fill"), feeds())
    assert list(small.iterdir()) == []


def test_noisy_login_shell_does_not_matter(device, artifact, monkeypatch, tmp_path):
    noisy = tmp_path / "bin"
    noisy.mkdir()
    wrapper = noisy / "ssh"
    wrapper.write_text(f'#!/bin/sh\necho "Welcome"; exec {shutil.which("ssh")} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{noisy}:{os.environ['PATH']}")
    np.testing.assert_array_equal(api.run_on("board", artifact(), feeds())[0]["y"], feeds()[0]["x"])
    assert api.check_device("board").arch == own_architecture()
