"""The ONNX Runtime target: artifacts, sessions, state, times and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import native
from onnxcomp.errors import CompileError, DataError, DeviceError, RecipeError, TargetError, UnsupportedError
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.profiling import summarize


@pytest.fixture
def artifact(small_model, tmp_path):
    return OrtCpu().compile(small_model, tmp_path / "artifact")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_compile_open_load_run(artifact, feed):
    target = OrtCpu()
    opened = target.open(artifact.path)
    assert opened == artifact
    session = target.load(opened)
    assert [(s.name, s.shape) for s in session.inputs] == [("x", (1, 8, 16, 16))]
    (y,) = session.run(feed).values()
    assert y.shape == (1, 4)
    assert np.isfinite(y).all()
    assert sorted(p.name for p in artifact.path.iterdir()) == ["manifest.json", "model.onnx"]
    assert os.listdir(artifact.path.parent) == ["artifact"]


def test_compile_leaves_the_model_alone(small_model, tmp_path):
    before = ir.to_proto(small_model).SerializeToString(deterministic=True)
    OrtCpu().compile(small_model, tmp_path / "a")
    assert ir.to_proto(small_model).SerializeToString(deterministic=True) == before


def test_large_weights_go_beside_the_model(small_model, tmp_path, feed, monkeypatch):
    expected = OrtCpu().load(OrtCpu().compile(small_model, tmp_path / "a")).run(feed)
    monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 1000)
    artifact = OrtCpu().compile(small_model, tmp_path / "b")
    assert (artifact.path / "model.onnx.data").stat().st_size > 1000
    found = OrtCpu().load(OrtCpu().open(artifact.path)).run(feed)
    np.testing.assert_array_equal(found["classify_out"], expected["classify_out"])
    (artifact.path / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(TargetError, match=r"model.onnx.data was changed or truncated"):
        OrtCpu().open(artifact.path)


def test_an_artifact_is_replaced(artifact, streaming_model):
    OrtCpu().compile(streaming_model, artifact.path)
    assert [i["name"] for i in OrtCpu().open(artifact.path).manifest["inputs"]] == ["x"]
    assert OrtCpu().open(artifact.path).manifest["state"]
    assert os.listdir(artifact.path.parent) == ["artifact"]


def test_a_failed_compilation_keeps_the_old_artifact(artifact, b):
    before = snapshot(artifact.path)
    b.op("NoSuchOp", b.input("x", [1]), name="strange")
    with pytest.raises(CompileError, match="NoSuchOp"):
        OrtCpu().compile(b.output("strange_out").model(), artifact.path)
    assert snapshot(artifact.path) == before
    assert os.listdir(artifact.path.parent) == ["artifact"]


def test_a_failed_move_puts_the_old_artifact_back(artifact, small_model, monkeypatch):
    before = snapshot(artifact.path)
    replace = os.replace

    def fail(source, destination):
        if Path(source).name == "artifact" and Path(destination) == artifact.path:
            raise OSError("disk on fire")
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(TargetError, match="disk on fire"):
        OrtCpu().compile(small_model, artifact.path)
    assert snapshot(artifact.path) == before


def test_foreign_folders_are_left_alone(small_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CompileError, match="not an artifact of onnxcomp"):
        OrtCpu().compile(small_model, tmp_path)
    with pytest.raises(CompileError, match="is a file"):
        OrtCpu().compile(small_model, tmp_path / "thesis.txt")
    with pytest.raises(CompileError, match="create it first"):
        OrtCpu().compile(small_model, tmp_path / "no" / "such")
    (tmp_path / "empty").mkdir()
    OrtCpu().compile(small_model, tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "JSON object"),
        ('{"manifest_version": 99}', "manifest version 99"),
        ('{"manifest_version": 1, "target": "other"}', "for target 'other'"),
        ('{"manifest_version": 1, "target": "ort-cpu"}', "versions: Field required"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_bad_manifests(artifact, text, match):
    (artifact.path / "manifest.json").write_text(text)
    with pytest.raises(TargetError, match=match):
        OrtCpu().open(artifact.path)


def test_manifest_types_are_strict(artifact):
    path = artifact.path / "manifest.json"
    data = json.loads(path.read_text())
    data["audit"][0]["macs"] = "many"
    path.write_text(json.dumps(data))
    with pytest.raises(TargetError, match=r"audit\.0\.macs"):
        OrtCpu().open(artifact.path)


def test_damaged_or_missing_model(artifact, tmp_path):
    with pytest.raises(TargetError, match=r"has no manifest\.json"):
        OrtCpu().open(tmp_path)
    model = artifact.path / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(TargetError, match="changed or truncated"):
        OrtCpu().open(artifact.path)
    model.unlink()
    with pytest.raises(TargetError, match="is missing"):
        OrtCpu().open(artifact.path)


def test_too_new_opset(small_model, tmp_path):
    small_model.graph.opset_imports[""] = 99
    with pytest.raises(CompileError, match=r"opset 99.*kernels up to"):
        OrtCpu().compile(small_model, tmp_path / "a")


def test_op_without_kernel_names_the_node(b, tmp_path):
    x = b.input("x", [2], onnx.TensorProto.INT16)
    b.op("Sin", b.op("Cast", x, to=onnx.TensorProto.BFLOAT16), name="wave")
    with pytest.raises(UnsupportedError, match="'wave'"):
        OrtCpu().compile(b.output("wave_out", onnx.TensorProto.BFLOAT16).model(opset=22), tmp_path / "a")


def test_native_ops_without_the_library(small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    small_model.graph.opset_imports[native.DOMAIN] = 1
    with pytest.raises(UnsupportedError, match="without its native library"):
        OrtCpu().compile(small_model, tmp_path / "a")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_native_library_is_registered_for_every_session(small_model, tmp_path, feed):
    small_model.graph.opset_imports[native.DOMAIN] = 1
    target = OrtCpu()
    artifact = target.compile(small_model, tmp_path / "a")
    for _ in range(2):
        target.load(artifact).run(feed)
    assert target.node_times(artifact, feed, repeat=1)
    assert target.peak_memory(artifact, feed) > 0


def test_functions_that_cannot_be_inlined(tmp_path):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "onnxcomp" : 1]>
        g (float[2] x) => (float[2] y) { y = onnxcomp.Twice(x) }
        <domain: "onnxcomp", opset_import: ["" : 17, "onnxcomp" : 1]> Twice (u) => (o) { o = onnxcomp.Twice(u) }""")
    with pytest.raises(CompileError, match=r"Twice.*cannot be inlined"):
        OrtCpu().compile(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda f: f.clear(), r"lacks input 'x'; the model expects 'x': float32\[1, 8, 16, 16\]"),
        (lambda f: f.update(z=np.zeros(1)), "unknown name 'z'"),
        (lambda f: f.update(x=f["x"].astype(np.float64)), "dtype float64"),
        (lambda f: f.update(x=f["x"][0]), r"shape \[8, 16, 16\]"),
        (lambda f: f.update(x=f["x"][:, :, 1:]), r"shape \[1, 8, 15, 16\]"),
        (lambda f: f.update(x=[1.0]), "is a list"),
    ],
)
def test_feeds_that_do_not_fit(artifact, feed, change, match):
    change(feed)
    with pytest.raises(DataError, match=match):
        OrtCpu().load(artifact).run(feed)


def test_nan_is_allowed(artifact, feed):
    feed["x"][0, 0, 0, 0] = np.nan
    OrtCpu().load(artifact).run(feed)


def test_failure_while_running(b, tmp_path):
    y = b.op("Reshape", b.input("x", ["n"]), b.const(np.array([2, 2], np.int64)), name="square")
    session = OrtCpu().load(OrtCpu().compile(b.output(y).model(), tmp_path / "a"))
    with pytest.raises(DeviceError, match=r"square.*float32\[n\]"):
        session.run({"x": np.zeros(3, np.float32)})


def test_state_is_carried_and_reset(streaming_model, tmp_path):
    session = OrtCpu().load(OrtCpu().compile(streaming_model, tmp_path / "a"))
    assert [s.name for s in session.inputs] == ["x"]
    assert [s.name for s in session.outputs] == ["total_out"]
    one = {"x": np.ones(3, np.float32)}
    assert [session.run(one)["total_out"][0] for _ in range(3)] == [1.0, 2.0, 3.0]
    with pytest.raises(DataError):
        session.run({})
    assert session.run(one)["total_out"][0] == 4.0
    session.reset()
    assert session.run(one)["total_out"][0] == 1.0


@pytest.mark.parametrize(
    "state",
    [
        "{",
        '{"input": "before"}',
        '[{"input": "before", "output": "after_out", "shape": [3]}]',
        '[{"input": "nowhere", "output": "after_out", "shape": [3], "dtype": "float32"}]',
        '[{"input": "before", "output": "after_out", "shape": [-3], "dtype": "float32"}]',
        '[{"input": "before", "output": "after_out", "shape": [999999, 999999], "dtype": "float32"}]',
        '[{"input": "before", "output": "after_out", "shape": [3], "dtype": "object"}]',
        '[{"input": "before", "output": "after_out", "shape": [3], "dtype": "what"}]',
    ],
)
def test_malformed_state(streaming_model, tmp_path, state):
    streaming_model.metadata_props["onnxcomp.state"] = state
    with pytest.raises(CompileError, match="state"):
        OrtCpu().compile(streaming_model, tmp_path / "a")


def test_node_times_are_plausible(artifact, feed):
    times = OrtCpu().node_times(artifact, feed, repeat=20)
    counts = {op: sum(t.op_type == op for t in times) for op in artifact.audit.executed_ops}
    assert counts == dict(artifact.audit.executed_ops)
    assert [t.op_type for t in times].index("QuantizeLinear") < [t.op_type for t in times].index("QGemm")
    assert all(t.microseconds >= 0 for t in times)
    assert 0 < sum(t.microseconds for t in times) < 1e6
    with pytest.raises(RecipeError):
        OrtCpu().node_times(artifact, feed, repeat=0)
    with pytest.raises(DataError):
        OrtCpu().node_times(artifact, {}, repeat=1)


def test_summary_skips_warmup_and_charges_bodies_once():
    def event(name, op_type, start, duration):
        return {
            "cat": "Node",
            "name": f"{name}_kernel_time",
            "ts": start,
            "dur": duration,
            "args": {"op_name": op_type},
        }

    events = [{"cat": "Session", "name": "model_run", "ts": t, "dur": 90} for t in (0, 100, 200)]
    for t, longer in ((0, 50), (100, 10), (200, 20)):
        events += [event("loop", "Loop", t, 30 + longer), event("inner", "MatMul", t + 1, longer)]
    found = {t.node: t.microseconds for t in summarize(events, repeat=2)}
    assert found == {"loop": 30.0, "inner": 15.0}


def test_peak_memory_counts_the_model_and_not_us(artifact, feed, streaming_model, tmp_path):
    peak = OrtCpu().peak_memory(artifact, feed)
    assert 20e6 < peak < 400e6
    ballast = bytearray(os.urandom(1 << 20)) * 600  # would show if the child inherited our peak
    again = OrtCpu().peak_memory(artifact, feed)
    assert abs(again - peak) < 50e6, len(ballast)
    streaming = OrtCpu().compile(streaming_model, tmp_path / "s")
    assert OrtCpu().peak_memory(streaming, {"x": np.ones(3, np.float32)}) > 0


def test_peak_memory_refuses_what_a_session_refuses(artifact):
    with pytest.raises(DataError, match="lacks input"):
        OrtCpu().peak_memory(artifact, {})


def test_onnxruntime_is_imported_late():
    code = "import sys, onnxcomp.targets.ort; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
