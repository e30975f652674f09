"""This machine and the emulated one as devices."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
from devices.stand_in import put_runner
from onnx import TensorProto, helper

from onnxcomp import api
from onnxcomp.device import Settings
from onnxcomp.errors import DeviceError, RecipeError, TargetError, UnsupportedError
from onnxcomp.targets.device import jobs
from onnxcomp.targets.device.artifacts import own_architecture
from onnxcomp.targets.device.local import LocalDevice

FEED = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_ort_artifact_gives_what_it_gives_in_this_process(model_path, tmp_path, x, run):
    api.compile(model_path, tmp_path / "artifact")
    found = api.run_on("local", tmp_path / "artifact", [{"x": x[:2]}, {"x": x[2:5]}])
    assert [f["y"].shape for f in found] == [(2, 4), (3, 4)]
    np.testing.assert_allclose(np.concatenate([f["y"] for f in found]), run(model_path, {"x": x[:5]})[0], atol=1e-6)


def test_profile_of_a_model_compiles_it(model_path):
    found = api.profile(model_path, device="local", repeat=10)
    assert found.target == "ort-cpu"
    assert found.samples == 10
    assert 0 < found.latency.min <= found.latency.p10 <= found.latency.median <= found.latency.p90 <= found.latency.p99
    assert found.peak_memory > 1 << 20


def test_state_is_carried_from_feed_to_feed(tmp_path, x):
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "s"], ["t"]), helper.make_node("Identity", ["t"], ["y"])],
        "sums",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("x", "s")],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("y", "t")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    state = [{"input": "s", "output": "t", "shape": [1, 8], "dtype": "float32"}]
    model.metadata_props.add(key="onnxcomp.state", value=json.dumps(state))
    onnx.save(model, tmp_path / "sums.onnx")
    api.compile(tmp_path / "sums.onnx", tmp_path / "artifact")
    found = api.run_on("local", tmp_path / "artifact", [{"x": row[None]} for row in x[:5]])
    np.testing.assert_allclose(np.concatenate([f["y"] for f in found]), np.cumsum(x[:5], axis=0), rtol=1e-5)


def test_tvm_artifact_is_run_by_the_runner(artifact, deployed):
    np.testing.assert_array_equal(api.run_on("local", artifact(), [FEED])[0]["y"], FEED["x"])
    assert deployed == [f"{own_architecture()}-linux-gnu"]


@pytest.mark.parametrize("mode", ["sleep", "children"])
def test_time_is_up(artifact, mode):
    with pytest.raises(DeviceError, match="still running on here after 1 s"):
        LocalDevice("here", Settings(timeout=1)).run(artifact(mode), [FEED])


def test_wrong_architecture(artifact, deployed):
    with pytest.raises(DeviceError, match="was compiled for riscv64"):
        api.run_on("local", artifact(arch="riscv64"), [FEED])
    assert deployed == []


def test_native_ops_need_the_library_of_the_device(model_path, tmp_path, monkeypatch):
    api.compile(model_path, tmp_path / "artifact")
    path = tmp_path / "artifact" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["opsets"]["onnxcomp.native"] = 1
    path.write_text(json.dumps(manifest))
    monkeypatch.setattr(jobs, "own_architecture", lambda: "riscv64")
    with pytest.raises(DeviceError, match="native library of onnxcomp, which is built for riscv64"):
        api.profile(tmp_path / "artifact", device="local")


def test_what_is_no_artifact(tmp_path, artifact):
    with pytest.raises(TargetError, match=r"manifest\.json"):
        api.run_on("local", tmp_path, [FEED])
    folder = artifact()
    (folder / "manifest.json").write_text("[1, 2")
    with pytest.raises(TargetError, match="cannot be read as JSON"):
        api.run_on("local", folder, [FEED])
    (folder / "manifest.json").write_text('{"target": "ort-cuda", "inputs": [], "outputs": []}')
    with pytest.raises(UnsupportedError, match="ort-cuda"):
        api.run_on("local", folder, [FEED])


def test_runner_that_prints_nonsense(artifact, monkeypatch):
    from onnxcomp.targets.device import job

    monkeypatch.setattr(job, "deploy_runner", lambda _, folder, gpu: put_runner(folder, "#!/bin/sh\n"))
    with pytest.raises(DeviceError, match="cannot be read"):
        api.run_on("local", artifact(), [FEED])


def test_baseline_and_device_exclude_each_other(model_path):
    with pytest.raises(RecipeError, match="one model at a time"):
        api.profile(model_path, model_path, device="local")


@pytest.fixture
def emulated():
    if shutil.which("qemu-aarch64") is None and shutil.which("qemu-aarch64-static") is None:
        pytest.skip("needs qemu-user")
    api.add_device("arm", "emulated")
    try:
        api.check_device("arm")
    except DeviceError as error:
        pytest.skip(str(error))


def test_emulation_takes_its_own_architecture_only(emulated, artifact, model_path, tmp_path):
    with pytest.raises(DeviceError, match="was compiled for x86_64"):
        api.run_on("arm", artifact(arch="x86_64"), [FEED])
    api.compile(model_path, tmp_path / "artifact")
    with pytest.raises(DeviceError, match="TVM artifacts only"):
        api.run_on("arm", tmp_path / "artifact", [FEED])


def test_emulation_needs_libraries(tmp_path):
    api.add_device("arm", "emulated", root=str(tmp_path))
    with pytest.raises(DeviceError, match=r"--root|qemu"):
        api.check_device("arm")
