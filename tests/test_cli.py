"""The command line: what it prints, where, and with which exit code. Bad inputs are in `test_errors.py`."""

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest

from onnxcomp import __version__, doctor


@pytest.fixture
def as_json(cli):
    """Runs the command line with `--json`; stdout has to be JSON and nothing else."""

    def call(*arguments, code=0):
        found, out, err = cli(*arguments, "--json")
        assert found == code, err
        return json.loads(out)

    return call


@pytest.fixture
def quantized(cli, tmp_path, model_path, data_path, recipe_path):
    out = tmp_path / "int8.onnx"
    code, _, err = cli("rewrite", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path)
    assert code == 0, err
    return out


def test_version(cli):
    assert cli("--version") == (0, f"onnxcomp {__version__}\n", "")


def test_help(cli):
    for arguments in ([], ["--help"]):
        _, out, err = cli(*arguments)
        for verb in ("export", "inspect", "rewrite", "compile", "profile", "compare", "compress", "list", "doctor"):
            assert verb in out + err


def test_module():
    done = subprocess.run([sys.executable, "-m", "onnxcomp", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxcomp {__version__}\n"


@pytest.mark.parametrize("module", ["onnxcomp", "onnxcomp.cli"])
def test_import_loads_no_framework(module):
    code = f"import {module}, sys; print(*{{'torch', 'tvm', 'onnxruntime', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_import_is_quick():
    code = "import sys; before = set(sys.modules); import onnxcomp; print(len(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60, "it loads next to nothing; a number is steadier than a time"


# --- looking


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


# --- rewriting


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
    (refusal,) = passes["noisy_bias"]
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


# --- measuring


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


@pytest.mark.parametrize(
    ("gate", "code", "message"),
    [
        (["--min-sqnr", "10"], 0, ""),
        (["--min-sqnr", "150"], 3, "gate failed: SQNR is "),
        (["--max-drop", "0.5"], 0, ""),
        (["--max-drop", "-0.1"], 3, "gate failed: top-1 agreement"),
        (["--max-drop", "0.5", "--min-sqnr", "150"], 3, "gate failed: SQNR is "),
    ],
)
def test_gates(cli, tmp_path, model_path, quantized, data_path, recipe_path, gate, code, message):
    found, out, err = cli("compare", model_path, quantized, "--data", data_path, *gate)
    assert found == code, err
    assert err.startswith(message)
    assert "SQNR" in out, "the figures are printed all the same"
    out = tmp_path / "out"
    arguments = ["--data", data_path, "--recipe", recipe_path, "--no-measure", *gate]
    found, _, err = cli("compress", model_path, "-o", out, *arguments)
    assert found == code, err
    assert err.startswith(message)
    assert (out / "report.html").is_file(), "the report says why"


@pytest.fixture
def metric(tmp_path, monkeypatch, x):
    """A task metric on which a model with another weight does worse."""
    np.save(tmp_path / "x.npy", x)
    (tmp_path / "metrics_2.py").write_text(
        "import numpy as np\nx = np.load('x.npy')\ncalls = []\n"
        "def score(run):\n    calls.append(1)\n    assert run({'x': x})['y'].shape == (32, 4)\n"
        "    return {'accuracy': 0.9 if len(calls) == 1 else 0.7}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    sys.modules.pop("metrics_2", None)
    return "metrics_2:score"


@pytest.mark.parametrize(("limit", "code"), [("0.3", 0), ("0.1", 3)])
def test_metric(cli, model_path, quantized, data_path, metric, limit, code):
    arguments = ["--data", data_path, "--metric", metric, "--max-drop", limit]
    found, out, err = cli("compare", model_path, quantized, *arguments)
    assert found == code
    assert "accuracy: 0.9000 -> 0.7000" in out
    assert err == ("" if code == 0 else "gate failed: the metric fell by 0.2000, more than --max-drop 0.1\n")


def test_a_drop_of_nothing(cli, tmp_path, mlp, data_path, recipe_path):
    """Neither a metric nor classes: a gate on it must not pass in silence."""
    model = mlp()
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["y"], ["sum"], name="sum", keepdims=0))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("sum", 1, []))
    onnx.save(model, tmp_path / "m.onnx")
    arguments = ["--data", data_path, "--recipe", recipe_path, "--no-measure", "--max-drop", "0.1"]
    code, _, err = cli("compress", tmp_path / "m.onnx", "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert "--max-drop needs --metric, or an output with class scores; use --min-sqnr instead" in err


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


# --- terminals and pipes


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_progress_goes_to_a_terminal_only(tmp_path, model_path, data_path, recipe_path):
    import pty

    arguments = ["rewrite", model_path, "-o", tmp_path / "m.onnx", "--data", data_path, "--recipe", recipe_path]
    command = [sys.executable, "-m", "onnxcomp", *map(str, arguments), "--json"]
    environment = {**os.environ, "TERM": "xterm", "FORCE_COLOR": "1"}
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert piped.stderr == ""
    master, slave = pty.openpty()
    try:
        shown = subprocess.run(command, stdout=subprocess.PIPE, stderr=slave, check=True, env=environment)
        text = os.read(master, 1 << 16).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert json.loads(shown.stdout)["path"] == json.loads(piped.stdout)["path"]
    assert "\x1b[" in text


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves(options):
    command = [sys.executable, "-m", "onnxcomp", "list", "passes", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=30) in (0, 1)


# --- export


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
