"""Gates: limits on what a comparison finds, and exit code 3 where they do not hold."""

import sys

import numpy as np
import onnx
import pytest
from builder import Builder
from onnx import helper

from onnxcomp.model import save


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


@pytest.fixture
def tailed(tmp_path, mlp):
    """Makes the model with one more node before its output, which is of the given rank."""

    def make(op_type, rank, kind=onnx.TensorProto.FLOAT, **attributes):
        model = mlp()
        model.graph.node.append(helper.make_node(op_type, ["y"], ["tail"], name="tail", **attributes))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("tail", kind, [None] * rank))
        onnx.save(model, tmp_path / "tailed.onnx")
        return tmp_path / "tailed.onnx"

    return make


@pytest.fixture
def idle(monkeypatch):
    """Fails the test when a model is rewritten or compiled."""
    from onnxcomp.rewrite import Pipeline
    from onnxcomp.targets.ort import OrtCpu

    def never(*_, **__):
        pytest.fail("long work has begun")

    monkeypatch.setattr(Pipeline, "run", never)
    monkeypatch.setattr(OrtCpu, "compile", never)


@pytest.mark.parametrize(
    ("op_type", "rank", "attributes"), [("ReduceSum", 0, {"keepdims": 0}), ("ReduceSum", 2, {"keepdims": 1})]
)
@pytest.mark.usefixtures("idle")
def test_a_drop_of_nothing(fails, tailed, tmp_path, data_path, recipe_path, op_type, rank, attributes):
    """Neither a metric nor classes: said at once, not after hours, and never passed in silence."""
    model = tailed(op_type, rank, **attributes)
    gate = ["--data", data_path, "--max-drop", "0.1"]
    shape = "x".join(["1"] * rank) or "scalar"
    for message in (
        fails("compress", model, "-o", tmp_path / "out", "--recipe", recipe_path, *gate),
        fails("compare", model, model, *gate),
    ):
        assert "--max-drop needs --metric, or an output with class scores; use --min-sqnr instead" in message
        assert f"the outputs are tail {shape}" in message


def test_a_drop_of_something(cli, tailed, data_path, metric):
    """Outputs that are integers, or a metric, or any output under `--min-sqnr`."""
    model = tailed("ArgMax", 1, onnx.TensorProto.INT64, axis=1, keepdims=0)
    assert cli("compare", model, model, "--data", data_path, "--max-drop", "0.1")[0] == 0
    model = tailed("Softmax", 2)
    assert cli("compare", model, model, "--data", data_path, "--max-drop", "0.1")[0] == 0
    model = tailed("ReduceSum", 0, keepdims=0)
    assert cli("compare", model, model, "--data", data_path, "--min-sqnr", "10")[0] == 0
    code, _, err = cli("compare", model, model, "--data", data_path, "--max-drop", "0.1", "--metric", metric)
    assert code == 2
    assert "KeyError: 'y'" in err, "the metric was asked, and looks for another output"


def test_an_output_without_elements_may_have_some_later(cli, tmp_path):
    """The first feed finds nothing, as a detector may; that says nothing about the others."""
    b = Builder()
    y = b.op("NonZero", b.op("Greater", b.input("x", [1, 8]), b.const(np.float32(0))))
    save(b.output(y, onnx.TensorProto.INT64).model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=np.stack([np.zeros(8, np.float32), np.ones(8, np.float32)]))
    arguments = ["compare", tmp_path / "m.onnx", tmp_path / "m.onnx", "--data", tmp_path / "d.npz", "--max-drop", "0.1"]
    assert cli(*arguments)[0] == 0
    assert "--max-drop needs --metric" in cli(*arguments, "--samples", "1")[2], "nothing else came"
