"""Artifacts for GPUs: compiled on any machine, run on an emulated GPU by sessions and by the runner."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from cuda_emulator.building import build_libraries, compile_kernels  # noqa: E402

from onnxcomp import api  # noqa: E402
from onnxcomp.errors import CompileError, DeviceError, RecipeError, TargetError  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm import TvmCuda, compile  # noqa: E402
from onnxcomp.targets.tvm.gpu import nvcc, packing  # noqa: E402
from onnxcomp.targets.tvm.linking import compiler  # noqa: E402
from onnxcomp.targets.tvm.runner_build import deploy  # noqa: E402

FATBIN = bytes.fromhex("50ed55ba")
HERE = "h100"
"""A board whose CPU has the architecture of this machine."""


def model() -> ir.Model:
    """GELU by a kernel of ours, the rest by TVM's own code; the sum over all runs is carried as state."""
    shape = [2, 3, 37]
    nodes = [
        helper.make_node("Gelu", ["x"], ["a"]),
        helper.make_node("Sin", ["a"], ["b"]),
        helper.make_node("Add", ["b", "before"], ["after"]),
        helper.make_node("ReduceMean", ["after"], ["y"], keepdims=0),
    ]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "before", "after")}
    graph = helper.make_graph(
        nodes,
        "sums",
        [values["x"], values["before"]],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, []), values["after"]],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    state = [{"input": "before", "output": "after", "shape": shape, "dtype": "float32"}]
    helper.set_model_props(proto, {"onnxcomp.state": json.dumps(state)})
    return ir.from_proto(proto)


@pytest.fixture
def emulated(monkeypatch) -> None:
    """Kernels are compiled for the emulator instead of a GPU, which then is there."""
    cuda_emulator.require()
    monkeypatch.setattr(packing, "compile_fatbin", lambda source, _: compile_kernels(source))
    monkeypatch.setattr(compile, "nvcc", lambda: None)


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((2, 3, 37)).astype(np.float32)} for _ in range(3)]


def expected(feeds) -> list[np.ndarray]:
    run = reference_runner(model(), ["y"])
    return [run(feed)["y"] for feed in feeds]


def test_a_session_runs_an_artifact_and_carries_its_state(emulated, feeds, tmp_path):
    target = TvmCuda(HERE)
    artifact = target.compile(model(), tmp_path / "out")
    assert artifact.manifest["gpu"] == "sm_90"
    session = target.load(target.open(tmp_path / "out"))
    found = [session.run(feed)["y"] for feed in feeds]
    np.testing.assert_allclose(found, expected(feeds), rtol=1e-5, atol=1e-6)
    kept = session.state()
    session.reset()
    np.testing.assert_allclose(session.run(feeds[0])["y"], found[0], rtol=1e-6)
    session.restore(kept)
    assert not np.allclose(session.run(feeds[0])["y"], found[0], rtol=1e-6)
    assert target.peak_memory(artifact, feeds[0]) > 0
    times = target.node_times(artifact, feeds[0], repeat=2)
    assert all(t.microseconds > 0 for t in times)


def test_names_that_cuda_does_not_know_are_no_matter(emulated, feeds, tmp_path):
    x, y = (ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT)) for name in ("a b/x:0", "y"))
    x.shape = y.shape = ir.Shape(["new", 37])
    nodes = [ir.node("Sin", [x], name="s"), ir.node("Cos", [x], name="c")]
    total = ir.node("Add", [nodes[0].outputs[0], nodes[1].outputs[0]], outputs=[y], name="t")
    graph = ir.Graph([x], [y], nodes=[*nodes, total], opset_imports={"": 20}, name="named")
    target = TvmCuda(HERE)
    session = target.load(target.compile(ir.Model(graph, ir_version=10), tmp_path / "out"))
    given = feeds[0]["x"][0]
    np.testing.assert_allclose(session.run({"a b/x:0": given})["y"], np.sin(given) + np.cos(given), atol=1e-6)


def test_the_runner_runs_an_artifact_without_python(emulated, feeds, tmp_path):
    TvmCuda(HERE).compile(model(), tmp_path / "out")
    program = deploy("x86_64-linux-gnu", tmp_path / "bin", gpu=True)
    np.save(tmp_path / "x.npy", np.stack([feed["x"] for feed in feeds]))
    arguments = ["--input", f"x={tmp_path / 'x.npy'}", "--steps", "3", "--out", str(tmp_path / "y"), "--repeat", "3"]
    done = subprocess.run(
        [program, tmp_path / "out", *arguments],
        env={"LD_LIBRARY_PATH": str(build_libraries()[0].parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latency_ms"]["median"] > 0
    np.testing.assert_allclose(np.load(tmp_path / "y" / "y.npy"), expected(feeds), rtol=1e-5, atol=1e-6)


def test_the_runner_tells_that_there_is_no_gpu(emulated, tmp_path):
    TvmCuda(HERE).compile(model(), tmp_path / "out")
    for gpu in (True, False):
        program = deploy("x86_64-linux-gnu", tmp_path / f"bin{gpu}", gpu=gpu)
        done = subprocess.run([program, tmp_path / "out", "--random"], capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert "needs NVIDIA's driver and libcudart.so.13" in done.stderr


def test_without_a_gpu_an_artifact_is_compiled_and_not_run():
    """In a process of its own, in which no GPU is emulated."""
    code = (
        "from onnxcomp.errors import DeviceError\n"
        "from onnxcomp.targets.tvm import TvmCuda\n"
        "try:\n"
        f"    TvmCuda({HERE!r}).require_device()\n"
        "except DeviceError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "runtime for CUDA cannot be loaded" in done.stdout or "no NVIDIA GPU" in done.stdout


@pytest.mark.parametrize(("board", "arch", "machine"), [("jetson-orin", "sm_87", 183), ("h100", "sm_90", 62)])
def test_machine_code_takes_the_place_of_source(board, arch, machine, tmp_path):
    try:
        nvcc.nvcc()
        compiler("aarch64-linux-gnu")
    except CompileError as error:
        pytest.skip(str(error))
    artifact = TvmCuda(board).compile(model(), tmp_path / "out")
    code = (tmp_path / "out" / "model.so").read_bytes()
    assert int.from_bytes(code[18:20], "little") == machine  # of the ELF header
    assert FATBIN in code
    assert b"__global__" not in code
    assert artifact.manifest["gpu"] == arch


def test_a_blob_that_is_not_understood_is_refused():
    with pytest.raises(CompileError, match="form that is not known"):
        packing.with_code(b"\x04\0\0\0\0\0\0\0cudasomething more than that", "source", lambda: b"code")


def test_boards():
    assert set(TvmCuda.boards()) >= {"jetson-orin", "h100"}
    with pytest.raises(RecipeError, match="jetson-orin"):
        TvmCuda("jetson-orinn")


def test_a_board_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    text = 'summary = "mine"\narch = "sm_86"\nhost = "x86-64-v3"\nmultiprocessors = 10\nmemory_mib = 8192\n'
    path.write_text(text, encoding="utf-8")
    assert TvmCuda(str(path)).capabilities().features[0] == "sm_86"
    path.write_text(text.replace("sm_86", "86"), encoding="utf-8")
    with pytest.raises(TargetError, match="arch"):
        TvmCuda(str(path))
    path.write_text(text.replace("x86-64-v3", "z80"), encoding="utf-8")
    with pytest.raises(RecipeError, match="z80"):
        TvmCuda(str(path))


def test_devices_that_have_no_gpu_refuse(emulated, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXCOMP_CONFIG", str(tmp_path / "config"))
    artifact = TvmCuda(HERE).compile(model(), tmp_path / "out")
    api.add_device("arm", "emulated")
    with pytest.raises(DeviceError, match="emulates a CPU"):
        api.run_on("arm", artifact.path, [{"x": np.zeros((2, 3, 37), np.float32)}])
