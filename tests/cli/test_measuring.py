"""Verbs that run models: compile, profile, compare, compress."""

import json


def test_compile_and_profile(cli, as_json, tmp_path, quantized, model_path):
    artifact = tmp_path / "artifact"
    found = as_json("compile", quantized, "-o", artifact)
    assert found["path"] == str(artifact)
    assert found["manifest"]["target"] == "ort-cpu"
    code, out, _ = cli("compile", quantized, "-o", artifact, "--input", "x=1x8")
    assert code == 0
    assert "100.0% of MACs run on integers" in out
    options = ["--repeat", "7", "--seconds", "5"]
    found = as_json("profile", artifact, "--baseline", model_path, *options)
    assert found["threads"] == 1
    assert {k: v["samples"] for k, v in found["latency"].items()} == {"model": 7, "baseline": 7}
    assert found["ratio"]["rounds"] == 7
    code, out, err = cli("profile", model_path, *options)
    assert (code, err) == (0, "")
    assert "1 thread(s) on ort-cpu" in out


def test_compare(cli, as_json, model_path, quantized, data_path):
    found = as_json("compare", model_path, quantized, "--data", data_path)
    assert found["samples"] == 32
    assert 20 < found["outputs"][0]["sqnr"] < 100
    assert {layer["node"] for layer in found["layers"]} == {"/fc1/Gemm", "/fc2/Gemm"}
    assert as_json("compare", model_path, model_path, "--data", data_path)["outputs"][0]["max_error"] == 0.0
    code, out, err = cli("compare", model_path, quantized, "--data", data_path, "--samples", 5)
    assert (code, err) == (0, "")
    assert "5 samples of" in out


def test_compress(cli, as_json, tmp_path, model_path, data_path, recipe_path):
    out = tmp_path / "out"
    arguments = ["compress", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path]
    arguments += ["--repeat", "6", "--seconds", "5"]
    code, text, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert "SQNR, worst output" in text
    assert f"report: {out / 'report.html'}" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "artifact", "model.onnx", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    found = as_json(*arguments)
    assert found == json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert found["fidelity"]["samples"] == 16
    assert found["calibration_samples"] == 16
