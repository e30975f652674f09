"""Artifacts of the TVM targets: compiled, opened, run, refused."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto

from onnxcomp import api
from onnxcomp.errors import CompileError, DataError, DeviceError, TargetError
from onnxcomp.state import StateSpec, write_state
from onnxcomp.target import Artifact
from onnxcomp.verbs.resolve import compiled, make_target

pytest.importorskip("tvm")

X = {"x": np.random.default_rng(1).normal(size=(3, 24)).astype(np.float32)}


def mlp(*, rows: int | str = 3) -> ir.Model:
    """Two products, one of which keeps a sum as streaming state."""
    b = Builder()
    x = b.input("x", [rows, 24])
    hidden = b.op("Relu", b.op("Gemm", x, b.const(b.rng.normal(size=(40, 24)).astype(np.float32)),
                                   b.const(b.rng.normal(size=40).astype(np.float32)), transB=1))  # fmt: skip
    y = b.op("MatMul", hidden, b.const(b.rng.normal(size=(40, 7)).astype(np.float32)))
    return b.output(y).model()


def adder() -> ir.Model:
    b = Builder()
    total = b.op("Add", b.input("x", [3, 24]), b.input("sum", [3, 24]))
    model = b.output(b.op("Relu", total)).output(total).model()
    names = [v.name for v in model.graph.outputs]
    write_state(model, [StateSpec(input="sum", output=str(names[1]), shape=[3, 24], dtype="float32")])
    return model


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    return compiled(mlp(), make_target("tvm-cpu"), tmp_path_factory.mktemp("tvm") / "mlp")


def reference(model: ir.Model, feed, folder) -> dict[str, np.ndarray]:
    target = make_target("ort-cpu")
    return target.load(compiled(model, target, folder)).run(feed)


def test_outputs_are_those_of_onnxruntime(artifact, tmp_path):
    target = make_target("tvm-cpu")
    found = target.load(target.open(artifact.path)).run(X)
    wanted = reference(mlp(), X, tmp_path / "ort")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-5)


def test_any_number_of_rows(tmp_path):
    target = make_target("tvm-cpu")
    session = target.load(compiled(mlp(rows="n"), target, tmp_path / "tvm"))
    for rows in (1, 2, 13, 40):
        feed = {"x": np.random.default_rng(rows).normal(size=(rows, 24)).astype(np.float32)}
        (found,) = session.run(feed).values()
        (wanted,) = reference(mlp(rows="n"), feed, tmp_path / "ort").values()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_state_is_carried_saved_and_shared_by_no_two_streams(tmp_path):
    target = make_target("tvm-cpu")
    session = target.load(compiled(adder(), target, tmp_path / "tvm"))
    ones = {"x": np.ones((3, 24), np.float32)}
    other = session.stream()
    (first,), (second,) = (list(session.run(ones).values()) for _ in range(2))
    assert first[0, 0] == 1
    assert second[0, 0] == 2
    assert next(iter(other.run(ones).values()))[0, 0] == 1
    session.save_state(tmp_path / "state")
    session.reset()
    assert next(iter(session.run(ones).values()))[0, 0] == 1
    session.load_state(tmp_path / "state")
    assert next(iter(session.run(ones).values()))[0, 0] == 3
    with pytest.raises(DataError, match="'x' has shape"):
        session.run({"x": np.ones((2, 24), np.float32)})
    assert next(iter(session.run(ones).values()))[0, 0] == 4


def test_the_artifact_says_what_runs(artifact):
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["parameters"] == ["x"]
    assert manifest["triple"] == "x86_64-linux-gnu"
    assert [row.executed_as for row in artifact.audit.rows] == ["Gemm", "Gemm"]
    assert [row.op_type for row in artifact.audit.rows] == ["Gemm", "MatMul"]
    assert all(entry["offset"] % 64 == 0 for entry in manifest["weights"])


def test_an_existing_artifact_is_replaced_and_nothing_else(artifact, tmp_path):
    target = make_target("tvm-cpu")
    place = tmp_path / "out"
    first = compiled(mlp(), target, place)
    assert compiled(adder(), target, place).manifest["files"] != first.manifest["files"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    (place / "mine.txt").write_text("keep")
    with pytest.raises(CompileError, match="not an artifact"):
        compiled(mlp(), target, place)


def test_an_artifact_that_took_the_place_of_a_loaded_one_is_loaded(tmp_path):
    target = make_target("tvm-cpu")
    first = target.load(compiled(mlp(), target, tmp_path / "out"))
    second = target.load(compiled(adder(), target, tmp_path / "out"))
    assert next(iter(second.run({"x": np.ones((3, 24), np.float32)}).values())).shape == (3, 24)
    assert next(iter(first.run(X).values())).shape == (3, 7)


@pytest.mark.parametrize("name", ["model.so", "weights.bin"])
def test_a_damaged_artifact_is_refused(tmp_path, name):
    target = make_target("tvm-cpu")
    artifact = compiled(mlp(), target, tmp_path / "out")
    with (artifact.path / name).open("ab") as file:
        file.write(b"x")
    with pytest.raises(TargetError, match=f"{name} was changed"):
        target.open(artifact.path)


def test_an_artifact_for_another_cpu_is_compiled_but_not_run_here(tmp_path):
    target = make_target("tvm-aarch64")
    artifact = compiled(mlp(), target, tmp_path / "arm")
    assert artifact.manifest["cpu"] == "cortex-a76"
    with pytest.raises(DeviceError, match="onnxcomp profile ARTIFACT --device NAME"):
        target.load(artifact)


def test_profile_names_kernels_and_tells_memory(artifact):
    found = api.profile(artifact.path, target="tvm-cpu", repeat=5)
    assert {t.op_type for t in found.node_times} >= {"Gemm"}
    assert found.peak_memory is not None
    assert 1 << 20 < found.peak_memory < 1 << 28


def test_an_artifact_is_profiled_on_its_own_target(artifact, tmp_path):
    assert api.profile(artifact.path, repeat=2).target == "tvm-cpu"
    arm = compiled(mlp(), make_target("tvm-aarch64"), tmp_path / "arm")
    with pytest.raises(DeviceError, match="for aarch64"):
        api.profile(arm.path)
    manifest = arm.path / "manifest.json"
    manifest.write_text("[]", encoding="utf-8")
    with pytest.raises(TargetError, match="names no target"):
        api.profile(arm.path)


def test_types_that_arrays_have_not_are_refused(tmp_path):
    b = Builder()
    b.input("x", [2], TensorProto.BFLOAT16)
    model = b.output(b.op("Relu", "x"), TensorProto.BFLOAT16).model()
    with pytest.raises(CompileError, match=r"bfloat16.*insert a Cast"):
        compiled(model, make_target("tvm-cpu"), tmp_path / "out")
