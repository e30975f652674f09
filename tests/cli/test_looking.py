"""Verbs that only look: list, inspect, doctor."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp import doctor


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("passes", "quantize"),
        ("targets", "ort-cpu"),
        ("targets", "ort-cuda"),
        ("targets", "ort-tensorrt"),
        ("recipes", "int8"),
        ("ops", "onnxcomp::ThresholdMatMul"),
        ("ops", "onnxcomp::NMMatMulInt8"),
    ],
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


def test_doctor_tells_which_targets_only_compile_here(as_json):
    found = {c["name"]: c for c in as_json("doctor")}
    providers = found["execution providers"]["value"]
    for target, provider in (("ort-cuda", "CUDAExecutionProvider"), ("ort-tensorrt", "TensorrtExecutionProvider")):
        state = ("ok", False) if provider in providers else ("missing", True)
        assert (found[target]["state"], "onnxruntime-gpu" in found[target]["fix"]) == state


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


def _grouped(shape, kept, size, dtype=np.float32, zero=0):
    """A weight with so many nonzeros in each group along any axis."""
    weight = np.random.default_rng(0).integers(1, 100, shape).astype(dtype)
    places = np.indices(shape).sum(axis=0)
    return np.where(places % size < kept, weight, dtype(zero)) if size else weight


def _patterns_model(path, *, zeros=True):
    kept = (
        {"a": (2, 4), "b": (2, 4), "c": (1, 8), "d": (1, 4), "e": (2, 4)} if zeros else dict.fromkeys("abcde", (0, 0))
    )
    weights = {
        "a": _grouped((64, 64), *kept["a"]),
        "b": _grouped((96, 64), *kept["b"]),
        "c": _grouped((64, 64), *kept["c"], np.uint8, 131),
        "d": _grouped((8, 64, 3, 3), *kept["d"]),
        "e": _grouped((64, 32), *kept["e"], np.float16),
        "f": np.ones((64, 64), np.float32),
        "scale": np.float32(0.1),
        "zero": np.uint8(131),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["ya"], name="a"),
        helper.make_node("Gemm", ["ya", "b"], ["yb"], name="b", transB=1),
        helper.make_node("DequantizeLinear", ["c", "scale", "zero"], ["cf"]),
        helper.make_node("MatMul", ["ya", "cf"], ["yc"], name="c"),
        helper.make_node("MatMul", ["yc", "cf"], ["again"], name="c2"),
        helper.make_node("Conv", ["image", "d"], ["yd"], name="d"),
        helper.make_node("MatMul", ["half", "e"], ["ye"], name="e"),
        helper.make_node("MatMul", ["x", "f"], ["yf"], name="f"),
    ]
    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        nodes,
        "patterns",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64]),
            helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 64, 8, 8]),
            helper.make_tensor_value_info("half", half, [1, 64]),
        ],
        [
            helper.make_tensor_value_info(n, half if n == "ye" else TensorProto.FLOAT, None)
            for n in ("yb", "again", "yd", "ye", "yf")
        ],
        [numpy_helper.from_array(np.asarray(w), name) for name, w in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_patterns_of_zeros(cli, as_json, tmp_path):
    """Each weight counts once, with what it takes now, packed, and packed in int8 with a scale an output."""
    path = _patterns_model(tmp_path / "m.onnx")
    found = {(p["pattern"], p["kind"]): p for p in as_json("inspect", path)["patterns"]}
    keys = ("weights", "stored_bytes", "packed_bytes", "int8_bytes")
    floats, half = 64 * 64 + 96 * 64, 64 * 32
    assert {key: tuple(p[k] for k in keys) for key, p in found.items()} == {
        ("2:4", "matrix"): (
            3,
            4 * floats + 2 * half,
            floats * 34 // 16 + half * 18 // 16,
            (floats + half) * 10 // 16 + 4 * (64 + 96 + 32),
        ),
        ("1:8", "matrix"): (1, 64 * 64, 64 * 64 * 11 // 64, 64 * 64 * 11 // 64 + 4 * 64),
        ("1:4", "convolution"): (1, 4 * 4608, 4608 * 34 // 32, 4608 * 10 // 32 + 4 * 8),
    }
    code, out, _ = cli("inspect", path)
    assert code == 0
    for text in ("2:4  3 matrices", "1:8  1 matrix", "1:4  1 convolution", "nothing packs convolutions"):
        assert " ".join(text.split()) in " ".join(out.split())


def test_no_patterns_are_not_mentioned(cli, as_json, tmp_path, model_path):
    for path in (model_path, _patterns_model(tmp_path / "m.onnx", zeros=False)):
        assert as_json("inspect", path)["patterns"] == []
        assert "zeros" not in cli("inspect", path)[1]


def test_patterns_in_external_weights(as_json, tmp_path):
    path = _patterns_model(tmp_path / "m.onnx")
    found = as_json("inspect", path)["patterns"]
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert as_json("inspect", path)["patterns"] == found


def test_only_samples_of_dense_weights_are_read(monkeypatch, tmp_path, as_json):
    from onnxcomp.verbs import patterns

    looked = []
    monkeypatch.setattr(patterns, "smallest_pattern", lambda weight, *_: looked.append(weight.shape))
    as_json("inspect", _patterns_model(tmp_path / "m.onnx"))
    assert sorted(looked) == [(64, 32), (64, 64), (64, 64), (64, 72), (64, 96)]
