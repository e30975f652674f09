"""Rotations leave the float function alone, whatever form the graph has, and take outliers away."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from rotated import NORMS, SIZE, TOKENS, VOCABULARY, WIDTH, feed, fused, rms_pow, simplified, transformer

from onnxcomp.passes.dynamic_quantize import DynamicQuantize
from onnxcomp.passes.rotate import Rotate
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass


def parts(edits, action="applied"):
    return {(e.node, e.detail.split(" of ")[0]) for e in edits if e.action == action}


def weights(model: ir.Model, op_type: str = "MatMul") -> dict[str, np.ndarray]:
    nodes = (n for n in model.graph if n.op_type == op_type)
    return {n.name: n.inputs[1].const_value.numpy() for n in nodes if n.inputs[1].const_value is not None}


def counts(model: ir.Model) -> dict[str, int]:
    kinds = [n.op_type for n in model.graph]
    return {k: kinds.count(k) for k in kinds}


def same(model: ir.Model, changed: ir.Model, outputs, tolerance: float = 2e-5) -> None:
    for seed in range(2):
        expected, found = outputs(model, feed(seed))[0], outputs(changed, feed(seed))[0]
        assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_function_stays(norm, bias, capabilities, run_passes, outputs):
    model = transformer(NORMS[norm], bias=bias)
    edits = check_pass(Rotate(), model, capabilities=capabilities)
    sides = {"q": "input", "k": "input", "v": "input", "o": "output", "gate": "input", "up": "input", "down": "output"}
    details = {(e.node, e.detail.split(", ")[-1].split(" ")[0]) for e in edits if "stream" in e.detail}
    assert details >= {*sides.items(), ("head", "input")}
    assert {("v", "values"), ("o", "values")} <= parts(edits)
    assert not parts(edits, "refused")
    changed = model.clone()
    run_passes(changed, Rotate())
    same(model, changed, outputs)
    before, after = weights(model), weights(changed)
    assert all(np.abs(after[n] - before[n]).max() > 0.1 for n in ("q", "k", "v", "o", "gate", "up", "down", "head"))
    missing = {"Add": 6 if not bias else 1} if norm.startswith("layer") else {}  # a bias for each beta
    assert {k: v - counts(model).get(k, 0) for k, v in counts(changed).items() if v != counts(model).get(k)} == missing


@pytest.mark.parametrize("norm", ["rms_pow", "layer_op"])
def test_layer_scale_goes_into_the_layer(norm, run_passes, outputs):
    model = transformer(NORMS[norm], bias=True, scale=True)
    changed = model.clone()
    run_passes(changed, Rotate())
    same(model, changed, outputs)
    assert counts(changed)["Mul"] == counts(model)["Mul"] - 1


def test_grouped_queries(run_passes, outputs):
    model = transformer(groups=2)
    changed = model.clone()
    edits = run_passes(changed, Rotate(stream=False)).edits
    assert parts(edits) == {("v", "values"), ("o", "values")}
    assert f"values of {SIZE} channels" in edits[0].detail
    same(model, changed, outputs)


def test_tied_head_still_shares_the_table(run_passes, outputs):
    model = transformer(tied=True)
    changed = model.clone()
    edits = run_passes(changed, Rotate()).edits
    assert any("added MatMul" in e.detail for e in edits)
    same(model, changed, outputs)
    tables = [v for v in changed.graph.initializers.values() if v.const_value.shape == (VOCABULARY, WIDTH)]
    assert len(tables) == 1
    assert {n.op_type for n, _ in tables[0].uses()} == {"Gather", "Transpose"}


def test_tied_head_without_gain_needs_nothing_more(run_passes, outputs):
    model = transformer(tied=True)
    for node in model.graph:
        for value in node.inputs[1:]:
            if value is not None and value.const_value is not None and value.const_value.shape == (WIDTH,):
                value.const_value = ir.tensor(np.ones(WIDTH, np.float32), name=value.name)
    changed = model.clone()
    run_passes(changed, Rotate())
    same(model, changed, outputs)
    assert counts(changed) == counts(model)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_types_stay(dtype, run_passes):
    model = transformer()
    for value in model.graph.initializers.values():
        array = value.const_value.numpy()
        if array.dtype == np.float32:
            value.const_value = ir.tensor(array.astype(dtype), name=value.name)
            value.dtype = ir.DataType.from_numpy(np.dtype(dtype))
    edits = run_passes(model, Rotate(), check="none").edits
    assert parts(edits)
    assert all(w.dtype == dtype for w in weights(model).values())


def test_turned_at_run_time(capabilities, run_passes, outputs):
    model = transformer()
    check_pass(Rotate(online=True), model, capabilities=capabilities)
    changed = model.clone()
    edits = run_passes(changed, Rotate(online=True, online_block=16)).edits
    assert [e.node for e in edits if "run time" in e.detail] == ["down"]
    same(model, changed, outputs)
    down = next(n for n in changed.graph if n.name == "down")
    assert [n.op_type for n in (down.inputs[0].producer(), down.inputs[0].producer().inputs[0].producer())] == [
        "Reshape", "MatMul",
    ]  # fmt: skip


def test_outliers_go(run_passes):
    """The channel that is 30 times as large as the others widens the range of the stream; turned, it does not."""
    model = transformer()
    changed = model.clone()
    run_passes(changed, Rotate())

    def peak(of: ir.Model) -> float:
        stream = next(n for n in of.graph if n.name == "embed").outputs[0].name
        found = reference_runner(of, [stream])(feed())[stream]
        return float(np.abs(found).max() / np.sqrt((found**2).mean()))

    assert peak(model) > 1.8 * peak(changed)


def test_integers_gain(run_passes, outputs):
    """Dynamic 8 bit ranges of the whole tensor: noise falls once outliers are spread."""
    b_outlier = transformer(outlier_norm)
    expected = outputs(b_outlier, feed())[0]
    errors = []
    for passes in ((DynamicQuantize(min_weights=0),), (Rotate(), DynamicQuantize(min_weights=0))):
        model = b_outlier.clone()
        run_passes(model, *passes)
        errors.append(np.linalg.norm(outputs(model, feed())[0] - expected))
    assert errors[1] < 0.6 * errors[0]


def outlier_norm(b, x):
    """RMSNorm whose gamma keeps the outlier channel large."""
    y = rms_pow(b, x)
    factors = np.ones(WIDTH, np.float32)
    factors[3] = 10
    return b.op("Mul", y, b.const(factors))


def test_selector_takes_all_or_nothing(run_passes):
    model = transformer()
    edits = run_passes(model, Rotate(heads=False, where=Select(skip=("gate",)))).edits
    assert not parts(edits)
    assert "'gate' is not selected" in edits[0].detail


@pytest.mark.parametrize("norm", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_norms_that_add(norm, run_passes, outputs):
    model = fused(norm)
    changed = model.clone()
    edits = run_passes(changed, Rotate(), check="none").edits
    assert {n for n, d in parts(edits) if d == "stream"} >= {"q", "k", "v", "o", "up", "down", "head"}
    same(model, changed, outputs)


def test_simplified_norm(run_passes, outputs):
    model = transformer(simplified)
    changed = model.clone()
    assert len(parts(run_passes(changed, Rotate(), check="none").edits)) == 10
    same(model, changed, outputs)


def test_cache_turns_only_when_told(run_passes):
    """The values in the cache turn; fed back, they give the logits that there were."""
    model = fused(cached=True)
    kept = model.clone()
    edits = run_passes(kept, Rotate(), check="none").edits
    assert "of the graph" in next(e.detail for e in edits if e.action == "refused")
    changed = model.clone()
    edits = run_passes(changed, Rotate(cache=True), check="none").edits
    assert {("v", "values"), ("o", "values")} <= parts(edits)
    original, turned = (decode(m) for m in (model, changed))
    np.testing.assert_allclose(turned["logits"], original["logits"], atol=1e-4)
    np.testing.assert_allclose(turned["present_key"], original["present_key"], atol=1e-5)
    assert np.abs(turned["present_value"] - original["present_value"]).max() > 0.1


def decode(model: ir.Model) -> dict[str, np.ndarray]:
    """Two runs of one sequence, the second with the cache of the first."""
    names = [v.name for v in model.graph.outputs]
    run = reference_runner(model, names)
    cache = np.zeros((1, 1, 0, SIZE), np.float32)
    state = {"past_key": cache, "past_value": cache}
    found: dict[str, np.ndarray] = {}
    for step in (1, 2):
        total = step * TOKENS
        lengths = {"lengths": np.array([total - 1], np.int32), "total": np.array([total], np.int32)}
        found = run({"ids": feed(step)["ids"][:1], **state, **lengths})
        state = {k.replace("present", "past"): v for k, v in found.items() if k != names[0]}
    return {"logits" if k == names[0] else k: v for k, v in found.items()}
