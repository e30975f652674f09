"""The verbs `sparsity` and `perplexity`."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, weight
from builder import Builder
from onnx import TensorProto

from onnxcomp import api
from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.model import load, save
from onnxcomp.verbs.sparsity import PerplexityPoint, one_percent

VOCABULARY = 64


def decoder(*, length: int | str = "T", cache: bool = True) -> ir.Model:
    """Sums of embeddings so far, a SwiGLU block, and scores by the same table; an input for a cache, which is added."""
    b = Builder()
    table = b.const(b.rng.normal(size=(VOCABULARY, WIDTH)).astype(np.float32), "table")
    ids = b.input("input_ids", [1, length], TensorProto.INT64)
    x = b.op("CumSum", b.op("Gather", table, ids, name="embed"), b.const(np.int64(1)))
    x = b.op("Mul", x, b.const(np.float32(0.2)), name="context")
    b.input("attention_mask", [1, length], TensorProto.INT64)
    if cache:
        past = b.input("past_key", [1, 2, "P", 4])
        b.output(b.op("Concat", past, b.op("Reshape", x, b.const(np.array([1, 2, -1, 4]))), axis=2, name="present"))
    gate = blocks.silu(b, b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="gate"))
    up = b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="up")
    y = b.op("MatMul", b.op("Mul", gate, up), weight(b, HIDDEN, WIDTH), name="down")
    y = b.op("Mul", b.op("Add", x, y), b.const(np.float32(0.02)))
    return b.output(b.op("MatMul", y, b.op("Transpose", table, perm=[1, 0]), name="head")).model(opset=18)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, 200)


@pytest.fixture
def files(tmp_path, tokens):
    """A decoder and tokens as files."""
    save(decoder(), tmp_path / "decoder.onnx")
    np.save(tmp_path / "tokens.npy", tokens)
    return tmp_path / "decoder.onnx", tmp_path / "tokens.npy"


def expected(model: ir.Model, tokens: np.ndarray, window: int, stride: int) -> float:
    """Perplexity in numpy: every token but the first once, in the first window that reaches it."""
    named = {n.name: n for n in model.graph}
    table = model.graph.initializers["table"].const_value.numpy().astype(np.float64)
    gate, up, down = (named[n].inputs[1].const_value.numpy() for n in ("gate", "up", "down"))
    losses: dict[int, float] = {}
    for start in range(0, len(tokens) - 1, stride):
        x = 0.2 * np.cumsum(table[tokens[start : start + window]], axis=0)
        g = x @ gate
        scores = 0.02 * (x + (g / (1 + np.exp(-g)) * (x @ up)) @ down) @ table.T
        chances = scores - np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1, keepdims=True))
        chances -= scores.max(1, keepdims=True)
        for place in range(len(x)):
            if start + place + 1 < len(tokens):
                losses.setdefault(start + place + 1, -chances[place, tokens[start + place + 1]])
    assert len(losses) == len(tokens) - 1
    return float(np.exp(np.mean(list(losses.values()))))


@pytest.mark.parametrize(("window", "stride"), [(16, 16), (16, 5), (300, 300)])
@pytest.mark.parametrize("cache", [False, True])
def test_perplexity(window, stride, cache, tokens):
    model = decoder(cache=cache)
    found = api.perplexity(model, tokens=tokens, window=window, stride=stride)
    assert found.perplexity == pytest.approx(expected(model, tokens, window, stride), rel=1e-4)
    assert (found.tokens, found.baseline, found.rise) == (199, None, None)


def test_a_fixed_number_of_tokens(tokens):
    found = api.perplexity(decoder(length=16, cache=False), tokens=tokens, window=16)
    assert found.perplexity == pytest.approx(expected(decoder(cache=False), tokens, 16, 16), rel=1e-4)
    with pytest.raises(DataError, match="--window 16"):
        api.perplexity(decoder(length=16, cache=False), tokens=tokens, window=32)


@pytest.mark.parametrize("form", ["npy", "npz", "txt"])
def test_forms_of_tokens(form, tokens, tmp_path, cli, files):
    path = tmp_path / f"ids.{form}"
    if form == "txt":
        path.write_text(" ".join(map(str, tokens)), encoding="utf-8")
    elif form == "npz":
        np.savez(path, ids=tokens.reshape(10, 20).astype(np.int32))
    else:
        np.save(path, tokens.astype(np.uint16))
    code, out, err = cli("perplexity", files[0], "--tokens", path, "--window", 32)
    assert (code, err) == (0, "")
    assert float(out.split()[1]) == pytest.approx(expected(decoder(), tokens, 32, 32), rel=1e-4)


def test_gate(cli, files, as_json, tmp_path):
    worse = tmp_path / "worse.onnx"
    recipe = tmp_path / "cats.toml"
    steps = 'version = 1\n[[passes]]\npass = "threshold"\nmethod = "cats"\nsparsity = 0.9\n'
    recipe.write_text(steps, encoding="utf-8")
    data = tmp_path / "data"
    np.savez(data, input_ids=np.arange(60)[None, None], attention_mask=np.ones((1, 1, 60), np.int64),
             past_key=np.zeros((1, 1, 2, 0, 4), np.float32))  # fmt: skip
    code, _, err = cli("rewrite", files[0], "-o", worse, "--recipe", recipe, "--data", f"{data}.npz")
    assert code == 0, err
    options = ("--tokens", files[1], "--baseline", files[0])
    found = as_json("perplexity", worse, *options)
    assert abs(found["rise"]) > 0.001
    code, _, err = cli("perplexity", worse, *options, "--max-rise", found["rise"] - 1e-3)
    assert (code, "more than --max-rise" in err) == (3, True)
    assert cli("perplexity", worse, *options, "--max-rise", found["rise"] + 1e-3)[0] == 0


def test_bad_tokens(fails, files, tmp_path, model_path):
    def told(content, *options, model=files[0]):
        path = tmp_path / "bad.txt"
        path.write_text(content, encoding="utf-8")
        return fails("perplexity", model, "--tokens", path, *options)

    assert "there are no tokens at" in fails("perplexity", files[0], "--tokens", tmp_path / "none.npy")
    assert "cannot be read as token numbers" in told("one two")
    assert "at least two tokens" in told("1")
    assert f"knows {VOCABULARY} tokens" in told("1 2 999")
    assert "stride has to be" in told("1 2 3", "--window", 2, "--stride", 3)
    assert "no input that looks up tokens" in told("1 2 3", model=model_path)
    assert "--baseline" in told("1 2 3", "--max-rise", 0.1)


def test_table(cli, files):
    code, out, err = cli("sparsity", files[0], "--tokens", files[1], "--window", 20)
    assert (code, err) == (0, "")
    assert "down" in out
    assert "silu" in out
    assert "CETT" in out
    assert "chess" in out or "will not pay" in out


def test_sparsity_of_a_decoder(as_json, files):
    found = as_json("sparsity", files[0], "--tokens", files[1], "--window", 20)
    assert found == as_json("sparsity", files[0], "--tokens", files[1], "--window", 20), "it is deterministic"
    (layer,) = found["layers"]
    assert (layer["neurons"], layer["dead"], layer["gated"]) == (HIDDEN, 0, True)
    assert layer["natural"]["mean"] == 1.0
    assert 0.0 < layer["effective"]["p5"] <= layer["effective"]["mean"] <= layer["effective"]["p95"] < 1.0
    assert sum(layer["effective"]["firing"]) == HIDDEN
    assert layer["tail_errors"] == sorted(layer["tail_errors"])
    assert found["tokens"] == 100, "half of the samples; the others are for perplexities"
    points = found["perplexity"]
    assert [p["cett"] for p in points] == sorted(p["cett"] for p in points)
    assert [p["sparsity"] for p in points] == sorted(p["sparsity"] for p in points)
    dense = api.perplexity(load(files[0]), tokens=np.load(files[1])[100:120], window=20)
    assert points[0]["cett"] == 0.0
    assert dense.perplexity > 1.0


def test_dead_neurons(as_json, model_path, data_path):
    """An MLP with ReLU on plain data: densities are those that numpy counts."""
    found = as_json("sparsity", model_path, "--data", data_path, "--samples", 64)
    model = load(model_path)
    weights = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()}
    fires = np.load(data_path)["x"] @ weights["w1"] + weights["b1"] > 0
    (layer,) = found["layers"]
    assert layer["natural"]["mean"] == pytest.approx(fires.mean())
    assert layer["dead"] == int((~fires.any(axis=0)).sum())
    assert any("fatrelu" in line for line in found["advice"])
    assert any("prune_dead" in line for line in found["advice"]) == bool(layer["dead"])
    assert found["perplexity"] == []
    assert found["one_percent"] is None


def test_refusals(fails, model_path, data_path, files, cnn_path):
    assert "either sample data or tokens" in fails("sparsity", model_path)
    assert "no input that looks up tokens" in fails("sparsity", model_path, "--tokens", files[1])
    assert "do not fill a window" in fails("sparsity", files[0], "--tokens", files[1], "--window", 1000)
    with pytest.raises(OnnxcompError, match="no feed-forward block"):
        api.sparsity(cnn_path, data="random")


@pytest.fixture
def cnn_path() -> ir.Model:
    b = Builder()
    return b.output(b.conv(b.image())).model()


def test_one_percent():
    measured = ((0, 0, 10), (0.1, 0.2, 10.05), (0.2, 0.4, 10.15))
    points = [PerplexityPoint(cett=c, sparsity=s, perplexity=p) for c, s, p in measured]
    assert one_percent(points) == pytest.approx(0.3)
    assert one_percent(points[:2]) is None
    assert one_percent(()) is None
