"""The verb `sensitivity`."""

from __future__ import annotations

import numpy as np
import pytest
from builder import Builder

from onnxcomp import api
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import load, save


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
    # Errors of 8 bits are nearly independent, so that both ways to tell them agree.
    assert all(abs(x["weighted_sqnr"] - x["sqnr"]) < 6.0 for x in layers)
    assert all(0.0 <= x["flips"] <= 1.0 for x in layers)
    assert found["groups"] == []  # each layer is a block of its own


def test_blocks(as_json, tmp_path):
    """Two blocks of two layers each; the second is the one in whose inputs rare values are large."""
    b = Builder()
    y = b.input("x", ["N", 16])
    for block in range(2):
        for layer in ("fc1", "fc2"):
            weight = (b.rng.normal(size=(16, 16)) / 4).astype(np.float32)
            if (block, layer) == (0, "fc2"):
                weight[:, 0] *= 200.0
            if (block, layer) == (1, "fc1"):
                weight[0] /= 200.0
            y = b.op("MatMul", y, b.const(weight), name=f"/blocks.{block}/{layer}/MatMul")
            y = b.op("Add", y, b.floats(16), name=f"/blocks.{block}/{layer}/Add")
    path = tmp_path / "blocks.onnx"
    save(b.output(y).model(), path)
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32))
    found = as_json("sensitivity", path, "--data", tmp_path / "x.npz")
    groups = {g["name"]: g for g in found["groups"]}
    assert set(groups) == {"blocks.0", "blocks.1"}
    assert [g["layers"] for g in groups.values()] == [2, 2]
    assert groups["blocks.1"]["sqnr"] < groups["blocks.0"]["sqnr"] - 10.0
    assert groups["blocks.1"]["weighted_sqnr"] < groups["blocks.0"]["weighted_sqnr"] - 10.0
    for group in groups.values():
        layers = [x for x in found["layers"] if x["node"].startswith(f"/{group['name']}/")]
        assert group["sqnr"] < min(x["sqnr"] for x in layers) + 3.0
        assert group["float_microseconds"] == pytest.approx(sum(x["float_microseconds"] for x in layers))


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
