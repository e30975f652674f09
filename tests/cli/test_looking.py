"""Verbs that only look: list, inspect, doctor."""

import sys

import onnx
import pytest

from onnxcomp import doctor


@pytest.mark.parametrize(
    ("what", "name"),
    [("passes", "quantize"), ("targets", "ort-cpu"), ("recipes", "int8"), ("ops", "onnxcomp::ThresholdMatMul")],
)
def test_list(cli, as_json, what, name):
    assert as_json("list", what)[name]
    code, out, _ = cli("list", what)
    assert code == 0
    assert any(line.startswith(name) for line in out.splitlines())


def test_inspect(cli, as_json, model_path):
    found = as_json("inspect", model_path)
    assert found["opset"] == 17
    assert found["size"]["ops"] == {"Gemm": 2, "Relu": 1}
    assert found["dynamic"] == {"x": [0]}
    assert found["file_bytes"] == model_path.stat().st_size
    assert found["selected"] is None
    code, out, err = cli("inspect", model_path)
    assert (code, err) == (0, "")
    for text in ("opset", "FLOAT [batch,8]", "FLOAT [batch,4]", "x axis 0", "Gemm 2, Relu 1"):
        assert text in out


def test_inspect_with_fixed_shapes(as_json, model_path):
    found = as_json("inspect", model_path, "--input", "x=3x8")
    assert found["size"]["macs"] == 3 * (8 * 32 + 32 * 4)
    assert found["dynamic"] == {}


@pytest.mark.parametrize(
    ("selectors", "names"),
    [
        (["op=Gemm"], ["/fc1/Gemm", "/fc2/Gemm"]),
        (["op=Gemm", "op=Relu", "skip=/fc1/*"], ["/act/Relu", "/fc2/Gemm"]),
        (["module=mlp.fc2"], ["/fc2/Gemm"]),
        (["module=mlp.f*", "name=re:.*1/.*"], ["/fc1/Gemm"]),
        (["name=none"], []),
    ],
)
def test_preview_of_a_selector(cli, as_json, model_path, selectors, names):
    options = [part for s in selectors for part in ("--select", s)]
    assert [name for name, _, _ in as_json("inspect", model_path, *options)["selected"]] == names
    _, out, _ = cli("inspect", model_path, *options)
    assert f"{len(names)} of 3 nodes selected" in out
    assert all(name in out for name in names)


def test_long_names_are_not_broken_in_a_pipe(cli, tmp_path, mlp):
    model = mlp()
    model.graph.node[0].name = "/blocks" * 60
    onnx.save(model, tmp_path / "m.onnx")
    _, out, _ = cli("inspect", tmp_path / "m.onnx", "--select", "op=Gemm")
    assert any(line.startswith("/blocks" * 60) for line in out.splitlines())


def test_doctor(cli, as_json):
    found = {c["name"]: c for c in as_json("doctor")}
    for name in ("onnxcomp", "python", "onnx", "onnx-ir", "onnxscript", "numpy", "ONNX Runtime", "CPU features"):
        assert found[name]["state"] == "ok", found[name]
    assert {"torch", "apache-tvm", "matplotlib", "C++ compiler", "native kernels"} <= set(found)
    assert "CPUExecutionProvider" in found["execution providers"]["value"]
    for check in found.values():
        assert bool(check["fix"]) == (check["state"] != "ok")
    code, out, _ = cli("doctor")
    assert code == 0
    assert "execution providers" in out


@pytest.mark.parametrize(
    ("versions", "broken", "fix"),
    [
        ({"onnxruntime": "1", "onnxruntime-gpu": "1"}, "ONNX Runtime", "they overwrite each other"),
        ({"onnxruntime": "", "onnxruntime-gpu": ""}, "ONNX Runtime", "pip install onnxruntime"),
        ({"onnx": ""}, "onnx", "pip install onnx"),
    ],
)
def test_doctor_finds_what_is_broken(monkeypatch, as_json, versions, broken, fix):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    found = {c["name"]: c for c in as_json("doctor", code=2)}
    assert found[broken]["state"] == "broken"
    assert fix in found[broken]["fix"]


def test_doctor_survives_half_a_runtime(monkeypatch, as_json):
    """Uninstalling one of the two packages takes files of the other along; what is left imports and has nothing."""
    monkeypatch.setitem(sys.modules, "onnxruntime", type(sys)("onnxruntime"))
    found = {c["name"]: c for c in as_json("doctor", code=2)}
    assert found["execution providers"]["state"] == "broken"
    assert "--force-reinstall" in found["execution providers"]["fix"]


def test_doctor_does_not_mind_what_is_optional(monkeypatch, as_json):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "" if name == "torch" else real(name))
    found = {c["name"]: c for c in as_json("doctor")}
    assert (found["torch"]["state"], found["torch"]["fix"]) == ("missing", "pip install 'onnxcomp[export]'")
