"""Thresholded products with weights in integers: as they were, or quantized by the pass."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, weight
from builder import Builder

from onnxcomp.passes._feed_forward import find_feed_forward
from onnxcomp.passes.threshold import Threshold
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

WIDTH, TOKENS = 32, 16


def feeds() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(4)]


def gated(b: Builder, *, hidden: int = 64, quantized: bool = False) -> ir.Model:
    """A gated block, its weights float or int8 with a scale a column."""
    x = b.input("x", [1, TOKENS, WIDTH])
    w = (lambda *shape: b.weight(shape, 1)) if quantized else (lambda *shape: weight(b, *shape))
    gate = b.op("MatMul", x, w(WIDTH, hidden), name="gate")
    up = b.op("MatMul", x, w(WIDTH, hidden), name="up")
    y = b.op("MatMul", b.op("Mul", blocks.silu(b, gate), up, name="product"), w(hidden, WIDTH), name="down")
    return b.output(y).model(opset=18)


def types(model: ir.Model) -> dict[str, str]:
    return {n.name or "": n.op_type for n in model.graph}


@pytest.mark.parametrize(("storage", "error"), [("int8", 0.02), ("int4", 0.2)])
@pytest.mark.parametrize("method", ["cats", "wina", "topk"])
def test_quantized_by_the_pass(method, storage, error, b, run_passes, outputs):
    suffix = storage.title()
    plain, model = gated(b), gated(Builder())
    run_passes(plain, Threshold(method=method, sparsity=0.3), data=feeds())
    run_passes(model, Threshold(method=method, sparsity=0.3, weights=storage), data=feeds())
    op = {"cats": "GatedMLP", "wina": "ThresholdMatMul", "topk": "TopKMatMul"}[method]
    assert types(model)["down"] == op + suffix
    want, found = outputs(plain, feeds()[0])[0], outputs(model, feeds()[0])[0]
    assert 0 < np.linalg.norm(found - want) < error * np.linalg.norm(want)
    used = {value for node in model.graph for value in node.inputs}
    assert all(value in used for value in model.graph.initializers.values()), "float weights are gone"


@pytest.mark.parametrize("method", ["cats", "wina"])
def test_integers_are_kept(method, b, run_passes, outputs):
    """One scale a column is what an op takes: the integers stay, and no threshold leaves the function as it was."""
    model = gated(b, quantized=True)
    (block,) = find_feed_forward(model).blocks
    x, gate, up, down = feeds()[0]["x"], *(d.matrix() for d in (block.gate.dense, block.up.dense, block.down))
    a = x @ gate
    want = (a / (1 + np.exp(-a)) * (x @ up)) @ down
    codes = model.graph.node("down").inputs[1].producer().inputs[0]
    run_passes(model, Threshold(method=method, value=0.0), data=feeds())
    assert types(model)["down"].endswith("Int8")
    assert codes in model.graph.node("down").inputs
    # onnxruntime rounds the inputs of a MatMul with a dequantized weight, here the gate, to 8 bits.
    error = 0.02 if method == "cats" else 1e-5
    assert np.linalg.norm(outputs(model, feeds()[0])[0] - want) < error * np.linalg.norm(want)


def test_block_wise_integers_are_quantized_anew_on_request(b, run_passes):
    model = gated(b)
    run_passes(model, WeightOnly(bits=4, block_size=32, min_weights=1, form="matmulnbits"))
    changed = model.clone()
    run_passes(model, Threshold(method="cats"), data=feeds())
    assert types(model)["down"] == "MatMulNBits"
    run_passes(changed, Threshold(method="cats", weights="int4"), data=feeds())
    assert types(changed)["down"] == "GatedMLPInt4"


def test_odd_sizes_get_masks(b, run_passes, outputs):
    """Groups of 32 do not fit 48 neurons, so that no op takes the layer before; masks drop the same."""
    plain, model = gated(b, hidden=HIDDEN), gated(Builder(), hidden=HIDDEN)
    run_passes(plain, Threshold(method="teal", sparsity=0.5), data=feeds())
    report = run_passes(model, Threshold(method="teal", sparsity=0.5, weights="int4"), data=feeds())
    assert types(model)["up"] == "MatMul"
    assert types(model)["down"] == "ThresholdMatMulInt4"
    assert any("no kernel" in e.detail for e in report.edits if e.node == "up")
    want, found = outputs(plain, feeds()[0])[0], outputs(model, feeds()[0])[0]
    assert np.linalg.norm(found - want) < 0.12 * np.linalg.norm(want)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_contract(storage, capabilities):
    for method in ("chess", "wina"):
        step = Threshold(method=method, weights=storage)
        check_pass(step, gated(Builder()), capabilities=capabilities, runner=reference_runner, data=feeds())
