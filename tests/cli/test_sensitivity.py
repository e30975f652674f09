"""The verb `sensitivity`."""

from __future__ import annotations

import pytest

from onnxcomp import api
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import load


def test_table(cli, as_json, model_path, data_path):
    code, out, err = cli("sensitivity", model_path, "--data", data_path, "--no-measure")
    assert (code, err) == (0, "")
    assert "/fc1/Gemm" in out
    assert "together: SQNR" in out
    found = as_json("sensitivity", model_path, "--data", data_path)
    layers = found["layers"]
    assert {x["node"] for x in layers} == {"/fc1/Gemm", "/fc2/Gemm"}
    assert [x["sqnr"] for x in layers] == sorted(x["sqnr"] for x in layers)
    assert all(x["float_microseconds"] > 0 and x["integer_microseconds"] > 0 for x in layers)
    assert found["sqnr"] < min(x["sqnr"] for x in layers) + 3.0
    assert 10.0 < found["sqnr"] < 80.0


def test_nothing_to_quantize(cli, model_path, data_path, tmp_path):
    rewritten = tmp_path / "int8.onnx"
    assert cli("rewrite", model_path, "-o", rewritten, "--data", data_path, "--recipe", "int8")[0] == 0
    code, out, err = cli("sensitivity", rewritten, "--data", data_path)
    assert (code, out) == (2, "")
    assert "no linear op that can be quantized (it is quantized already)" in err


def test_a_model_in_memory_stays_as_it_is(model_path, data_path):
    model = load(model_path)
    before = [n.op_type for n in model.graph]
    api.sensitivity(model, data=str(data_path), measure=False)
    assert [n.op_type for n in model.graph] == before
    with pytest.raises(OnnxcompError, match="no such file"):
        api.sensitivity("missing.onnx", data="random")
