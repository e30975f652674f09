"""Verbs that write a model: rewrite and export."""

import sys

import numpy as np
import onnx
import pytest


def test_rewrite(cli, tmp_path, model_path, data_path, recipe_path, run, x):
    out = tmp_path / "int8.onnx"
    code, text, err = cli("rewrite", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path)
    assert (code, err) == (0, "")
    assert f"wrote {out}" in text
    assert "/fc1/Gemm" in text
    expected, found = run(model_path, {"x": x})[0], run(out, {"x": x})[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["plain", "external", "external, saved externally"])
def test_rewrite_over_the_input(cli, monkeypatch, model_path, external_path, data_path, recipe_path, run, x, kind):
    path = model_path if kind == "plain" else external_path
    if "saved" in kind:
        monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 100)
    expected = run(path, {"x": x})[0]
    names = {p.name for p in path.parent.iterdir()}
    code, _, err = cli("rewrite", path, "-o", path, "--data", data_path, "--recipe", recipe_path)
    assert code == 0, err
    found = run(path, {"x": x})[0]
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert {n.op_type for n in onnx.load(path).graph.node} > {"QuantizeLinear"}
    assert {p.name for p in path.parent.iterdir()} == names | ({"mlp.onnx.data"} if "saved" in kind else set())


@pytest.mark.parametrize("verb", ["rewrite", "compress"])
def test_dry_run(cli, as_json, tmp_path, model_path, data_path, snapshot, verb):
    recipe = tmp_path / "part.toml"
    recipe.write_text(
        'version = 1\n[[passes]]\npass = "quantize"\nrange = "minmax"\n[passes.where]\nskip = "mlp.fc2"\n'
        '[[passes]]\npass = "noisy_bias"\nmin_gain = 1.0\nrows = 32\n'
    )
    before = snapshot(tmp_path)
    arguments = [verb, model_path, "-o", tmp_path / "out", "--data", data_path, "--recipe", recipe, "--dry-run"]
    code, out, err = cli(*arguments)
    assert (code, err) == (0, "")
    assert "dry run: nothing was written" in out
    passes = {p["name"]: p["edits"] for p in as_json(*arguments)["passes"]}
    assert ("applied", "/fc1/Gemm") in [(e["action"], e["node"]) for e in passes["quantize"]]
    assert not [e for e in passes["quantize"] if e["action"] == "applied" and e["node"] == "/fc2/Gemm"]
    (refusal,) = (e for e in passes["noisy_bias"] if e["node"] == "/fc1/Gemm")
    assert (refusal["action"], refusal["node"]) == ("refused", "/fc1/Gemm")
    assert "no noise lowers the held-out output error by 100%" in refusal["detail"]
    assert refusal["detail"] in out
    assert snapshot(tmp_path) == before


def test_random_data_is_warned_of(cli, tmp_path, model_path, recipe_path):
    _, out, err = cli("rewrite", model_path, "-o", tmp_path / "m.onnx", "--data", "random", "--recipe", recipe_path)
    assert err == "warning: random data: ranges and fidelity say nothing about real inputs\n"
    assert "wrote" in out


def test_a_data_function_that_prints(as_json, tmp_path, monkeypatch, model_path, recipe_path):
    (tmp_path / "loud.py").write_text(
        "import numpy as np\ndef get():\n    print('reading')\n    yield {'x': np.ones((1, 8), np.float32)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    as_json("rewrite", model_path, "-o", "m.onnx", "--data", "loud:get", "--recipe", recipe_path)


@pytest.mark.torch
def test_export(cli, as_json, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="needs PyTorch")
    (tmp_path / "nets_1.py").write_text(
        "import torch\ndef net():\n    print('making')\n"
        "    return torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()), (torch.zeros(1, 8),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = as_json("export", "nets_1:net", "-o", "net.onnx", "--opset", "18", "--dynamic-batch")
    assert (found["path"], found["opset"]) == ("net.onnx", 18)
    assert found["max_error"] < 1e-5
    selected = as_json("inspect", "net.onnx", "--select", "module=0")["selected"]
    assert [(op, module) for _, op, module in selected] == [("Gemm", "0")]
    code, _, err = cli("export", "nets_1:none", "-o", "other.onnx")
    assert code == 2
    assert "has no function 'none'" in err
    code, _, err = cli("export", "nets_1:net", "-o", "none/net.onnx")
    assert code == 2
    assert "there is no folder none" in err
