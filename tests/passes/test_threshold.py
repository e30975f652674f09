"""Thresholds drop what they should, by the scores of the papers, in every form of block; checked against numpy."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, gelu, weight
from builder import Builder

from onnxcomp.errors import CalibrationError, PassError
from onnxcomp.model import all_nodes
from onnxcomp.passes.threshold import Threshold
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

TOKENS = 64
DATA = feeds(8, TOKENS)


def edits(report, action: str) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == action and e.node}


def op_types(model: ir.Model) -> dict[str, str]:
    return {n.name or "": n.op_type for n in model.graph}


def inner(model: ir.Model) -> dict[str, np.ndarray]:
    """Values of a gated block over all calibration tokens, and its weights."""
    names = {"a": "act_out", "u": "up_out", "h": "product_out", "y": "down_out"}
    run = reference_runner(model, list(names.values()))
    found = [run(feed) for feed in DATA]
    weights = {n.name: n.inputs[1].const_value.numpy() for n in model.graph if n.name in ("gate", "up", "down")}
    rows = {k: np.concatenate([f[v][0] for f in found]) for k, v in names.items()}
    return {"x": np.concatenate([f["x"][0] for f in DATA]), **rows, **weights}


def dropped(x: np.ndarray, score: np.ndarray, share: float) -> np.ndarray:
    return np.where(score <= np.quantile(score, share), np.float32(0), x)


def expected(v: dict[str, np.ndarray], method: str, share: float, norms: bool) -> np.ndarray:
    """Output of the block by the definition of a method."""
    a, u, h, x = (v[k] for k in "auhx")
    row = lambda w: np.linalg.norm(w, axis=1)  # noqa: E731
    column = row(v["down"]) if norms else 1.0
    if method == "cats":
        return (dropped(a, np.abs(a) * column, share) * u) @ v["down"]
    if method == "chess":
        return (dropped(a, np.abs(a) * np.abs(u).mean(axis=0) * column, share) * u) @ v["down"]
    if method == "cett":
        return dropped(h, np.abs(h) * row(v["down"]), share) @ v["down"]
    if method == "topk":
        least = np.sort(np.abs(h), axis=1)[:, -round((1 - share) * HIDDEN)]
        return np.where(np.abs(h) >= least[:, None], h, 0) @ v["down"]
    score = lambda z, w: np.abs(z) * (row(w) if norms or method == "wina" else 1.0)  # noqa: E731
    gate = dropped(x, score(x, v["gate"]), share) @ v["gate"]
    h = gate / (1 + np.exp(-gate)) * (dropped(x, score(x, v["up"]), share) @ v["up"])
    # The threshold of the last product was calibrated on what it read before the others had theirs.
    level = np.quantile(score(v["h"], v["down"]), share)
    return np.where(score(h, v["down"]) <= level, 0, h) @ v["down"]


def error(v: dict[str, np.ndarray], y: np.ndarray) -> float:
    return float(np.linalg.norm(y - v["y"]) / np.linalg.norm(v["y"]))


CASES = [(m, n) for m in ("cats", "chess", "teal") for n in (False, True)] + [
    (m, False) for m in ("cett", "topk", "wina")
]


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize(("method", "norms"), CASES)
def test_numpy(method, norms, share, b, run_passes):
    model = blocks.gated(b, tokens=TOKENS)
    values = inner(model)
    report = run_passes(model, Threshold(method=method, sparsity=share, column_norms=norms), data=DATA)
    assert f"{share:.1%} of its values dropped" in edits(report, "applied")["down"]
    run = reference_runner(model, ["down_out"])
    found = np.concatenate([run(feed)["down_out"][0] for feed in DATA])
    want = expected(values, method, share, norms)
    # A threshold is interpolated within a bin of 1/128 of its value, so that a few values of thousands lie elsewhere.
    assert np.linalg.norm(found - want) < 0.02 * np.linalg.norm(want)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_better_scores_err_less(share, b):
    """CATS errs most, then CHESS, then CHESS with column norms; least does who knows what the gate multiplies."""
    v = inner(blocks.gated(b, tokens=TOKENS))
    oracle = dropped(v["h"], np.abs(v["h"]) * np.linalg.norm(v["down"], axis=1), share) @ v["down"]
    errors = [error(v, expected(v, *case)) for case in (("cats", share, False), ("chess", share, False))]
    errors += [error(v, expected(v, "chess", share, True)), error(v, oracle)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("share", [0.4, 0.6])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_wina_beats_teal_where_norms_differ(spread, share, b, run_passes, outputs):
    """By half where the norms of rows are log-normal; where all are the same, so are the two methods."""
    norms = np.exp(spread * b.rng.normal(size=512))
    w = b.rng.normal(size=(512, 256))
    w *= (norms / np.linalg.norm(w, axis=1))[:, None]
    hidden = b.op("Tanh", b.op("MatMul", b.input("x", [256, 512]), b.const(np.eye(512, dtype=np.float32)), name="fc1"))
    model = b.output(b.op("MatMul", hidden, b.const(w.astype(np.float32)), name="fc2")).model(opset=18)
    data = [{"x": b.rng.normal(size=(256, 512)).astype(np.float32)}]
    want, errors = outputs(model, data[0])[0], []
    for method in ("teal", "wina"):
        changed = model.clone()
        run_passes(changed, Threshold(method=method, sparsity=share, where=Select(name=("fc2",))), data=data)
        errors.append(np.linalg.norm(outputs(changed, data[0])[0] - want) / np.linalg.norm(want))
    ratio = errors[1] / errors[0]
    assert ratio < 0.6 if spread else 0.95 < ratio < 1.05


def test_forms_of_a_block(b, run_passes):
    """One op where it can be; a mask where the layer that is multiplied has a bias."""
    model = blocks.gated(b, tokens=TOKENS)
    run_passes(model, Threshold(method="cats"), data=DATA)
    assert op_types(model)["down"] == "GatedMLP"
    assert not {"up", "product"} & op_types(model).keys()
    c = Builder()
    x = c.input("x", [1, TOKENS, WIDTH])
    up = c.op("Add", c.op("MatMul", x, weight(c, WIDTH, HIDDEN), name="up"), c.floats(HIDDEN))
    gate = gelu(c, c.op("MatMul", x, weight(c, WIDTH, HIDDEN), name="gate"))
    y = c.op("MatMul", c.op("Mul", gate, up, name="product"), weight(c, HIDDEN, WIDTH), name="down")
    for method, mask in (("cats", "Shrink"), ("chess", "Where")):
        model = c.output(y).model(opset=18) if method == "cats" else c.model(opset=18)
        assert mask in edits(run_passes(model, Threshold(method=method), data=DATA), "applied")["down"]
        assert op_types(model)["down"] == "ThresholdMatMul"
        assert mask in op_types(model).values()


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_in_one(bias, b, run_passes, outputs):
    """The product is taken apart, so that the part that is multiplied is computed for open gates only."""
    x = b.input("x", [1, TOKENS, WIDTH])
    both = b.op("MatMul", x, weight(b, WIDTH, 2 * HIDDEN), name="both")
    first, second = (b.floats(HIDDEN), b.floats(HIDDEN)) if bias else ("", "")
    parts = b.op("Split", both, name="split", axis=-1, num_outputs=2)
    b.nodes[-1].output.append("second")
    gate = b.op("Add", parts, first) if bias else parts
    up = b.op("Add", "second", second) if bias else "second"
    y = b.op("MatMul", b.op("Mul", blocks.silu(b, gate), up), weight(b, HIDDEN, WIDTH), name="down")
    model = b.output(y).model(opset=18)
    before = outputs(model, DATA[0])[0]
    report = run_passes(model, Threshold(method="cats", value=0.0), data=DATA)
    if bias:
        assert "no feed-forward block" in edits(report, "refused")["down"]
        return
    assert op_types(model)["down"] == "GatedMLP"
    assert "both" not in op_types(model)
    np.testing.assert_allclose(outputs(model, DATA[0])[0], before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("method", ["cats", "chess", "teal", "topk", "cett"])
def test_without_a_gate(method, b, run_passes, outputs):
    """Gemm with transposed weight and bias, whose threshold op needs an Add; at no sparsity nothing changes."""
    x = b.input("x", [TOKENS, WIDTH])
    y = gelu(b, b.op("Gemm", x, weight(b, HIDDEN, WIDTH), b.floats(HIDDEN), name="fc1", transB=1))
    y = b.op("Gemm", y, weight(b, WIDTH, HIDDEN), b.floats(WIDTH), name="fc2", transB=1)
    model = b.output(y).model(opset=18)
    data = [{"x": feed["x"][0]} for feed in DATA]
    before = outputs(model, data[0])[0]
    run_passes(model, Threshold(method=method, sparsity=0.0), data=data)
    assert op_types(model)["fc2"] == ("TopKMatMul" if method == "topk" else "ThresholdMatMul")
    assert op_types(model)["fc1"] == ("ThresholdMatMul" if method == "teal" else "Gemm")
    np.testing.assert_allclose(outputs(model, data[0])[0], before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("method", ["cats", "chess", "teal", "wina", "topk"])
@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_quantized_weights_keep_their_products(method, form, b, run_passes, outputs):
    """Masks go before products whose weights are quantized; they drop as much as the ops do before float weights."""
    model = blocks.gated(b, tokens=TOKENS)
    run_passes(model, WeightOnly(bits=8, block_size=16, min_weights=1, form=form))
    reference = blocks.gated(Builder(), tokens=TOKENS)
    run_passes(reference, Threshold(method=method), data=DATA)
    report = run_passes(model, Threshold(method=method), data=DATA)
    assert "no kernel" in edits(report, "applied")["down"]
    assert {"MatMulNBits", "MatMul"} & {op_types(model)["down"]}
    found, want = outputs(model, DATA[0])[0], outputs(reference, DATA[0])[0]
    assert np.linalg.norm(found - want) < 0.08 * np.linalg.norm(want), "8 bits, and values close to the thresholds"
    again = run_passes(model, Threshold(method=method), data=DATA)
    assert not edits(again, "applied")


def test_selective_attention(b, run_passes):
    x = b.input("x", [1, TOKENS, WIDTH])
    q, k, v = (b.op("MatMul", x, weight(b, WIDTH, WIDTH), name=name) for name in "qkv")
    scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
    y = b.op("MatMul", b.op("MatMul", scores, v), weight(b, WIDTH, WIDTH), name="o")
    model = b.output(y).model(opset=18)
    run_passes(model, Threshold(method="chess", attention=True), data=DATA)
    assert {n: op_types(model)[n] for n in "qkvo"} == {
        "q": "ThresholdMatMul", "k": "MatMul", "v": "MatMul", "o": "ThresholdMatMul"
    }  # fmt: skip


def test_keys_and_values_in_one_product_stay_exact(attention_example, run_passes):
    model, feed = attention_example
    report = run_passes(model, Threshold(method="chess", attention=True), data=[feed])
    assert "keys or values" in edits(report, "refused")["qkv"]
    assert set(edits(report, "applied")) == {"proj", "fc2"}


def test_fatrelu(b, run_passes):
    model = blocks.gated(b, act=lambda b, x: b.op("Relu", x, name="act"), tokens=TOKENS)
    natural = float((inner(model)["a"] == 0).mean())
    report = run_passes(model, Threshold(method="fatrelu", value=0.01), data=DATA)
    share = float(edits(report, "applied")["down"].split("fatrelu, ")[1].split("%")[0]) / 100
    assert natural < share < natural + 0.05
    smooth = blocks.gated(Builder(), tokens=TOKENS)
    assert "relufy" in edits(run_passes(smooth, Threshold(method="fatrelu"), data=DATA), "refused")["down"]


def test_tail_error(b, run_passes):
    """The share that is dropped is the largest whose relative tail error is the one wanted."""
    model = blocks.gated(b, tokens=TOKENS)
    values = inner(model)
    run_passes(model, Threshold(method="cett", cett=0.2, rows=4096), data=DATA)
    run = reference_runner(model, ["down_out"])
    found = np.concatenate([run(feed)["down_out"][0] for feed in DATA])
    tail = np.linalg.norm(found - values["y"], axis=1) / np.linalg.norm(values["y"], axis=1)
    assert 0.19 < tail.mean() < 0.205


def test_shares_by_name(b, run_passes):
    model = blocks.gated(b, tokens=TOKENS)
    config = Threshold(method="teal", sparsity={"dow*": 0.75, "u*": 0.25})
    report = run_passes(model, config, data=DATA)
    found = edits(report, "applied")
    assert "75.0%" in found["down"]
    assert "25.0%" in found["up"]
    assert "no pattern" in edits(report, "refused")["gate"]


def test_greedy(b, run_passes):
    """The mean is what was asked for, and the sum of the errors of layers not larger than with equal shares."""
    model = blocks.gated(b, tokens=TOKENS)
    report = run_passes(model, Threshold(method="wina", sparsity=0.5, allocate="greedy"), data=DATA)
    shares = [float(t.split("wina, ")[1].split("%")[0]) for t in edits(report, "applied").values()]
    assert abs(np.mean(shares) - 50) < 2.6
    assert max(shares) - min(shares) > 4
    model = blocks.gated(Builder(), tokens=TOKENS)
    report = run_passes(model, Threshold(method="wina", allocate="greedy", max_error=1e-3), data=DATA)
    few = [float(t.split("wina, ")[1].split("%")[0]) for t in edits(report, "applied").values()]
    assert 0 < np.mean(few) < np.mean(shares)


def test_half_precision(b, run_passes, outputs):
    model = blocks.gated(b, tokens=TOKENS)
    from onnxcomp.passes.float16 import Float16

    run_passes(model, Float16())
    before = outputs(model, DATA[0])[0]
    run_passes(model, Threshold(method="chess", sparsity=0.1), data=DATA)
    assert any(n.op_type == "ThresholdMatMul" or n.op_type == "GatedMLP" for n in all_nodes(model))
    after = outputs(model, DATA[0])[0]
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"method": "cats", "cett": 0.1}, "cett is a target"),
        ({"method": "cett", "cett": 0.1, "value": 1.0}, "give one of them"),
        ({"max_error": 0.1}, "needs allocate"),
        ({"allocate": "greedy", "sparsity": {"a": 0.5}}, "one number"),
        ({"method": "topk", "value": 1.0}, "keeps a number"),
    ],
)
def test_contradictions(config, reason, b, run_passes):
    with pytest.raises(PassError, match=reason):
        run_passes(blocks.gated(b), Threshold(**config), data=feeds())


def test_no_data(b, run_passes):
    with pytest.raises(CalibrationError, match="--data"):
        run_passes(blocks.gated(b), Threshold())


@pytest.mark.parametrize("method", ["cats", "chess", "teal", "wina", "topk", "cett", "fatrelu"])
def test_contract(method, b, capabilities, attention_example):
    for model, data in ((blocks.gated(b), feeds()), (attention_example[0], [attention_example[1]])):
        check_pass(Threshold(method=method), model, capabilities=capabilities, runner=reference_runner, data=data)


def test_where(b, run_passes):
    model = blocks.gated(b, tokens=TOKENS)
    report = run_passes(model, Threshold(method="teal", where=Select(name=("up",))), data=DATA)
    assert {e.node for e in report.edits if e.node} == {"up"}
