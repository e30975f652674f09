"""Neurons that never fire go; outputs on the calibration data stay what they were."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, weight
from builder import Builder

from onnxcomp.errors import CalibrationError
from onnxcomp.passes.prune_dead import PruneDead
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

DEAD = 11


def details(report, action: str) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == action}


def relu_mlp(b: Builder, form: str) -> ir.Model:
    """The first neurons have a bias so low that they cannot fire."""
    x = b.input("x", [1, 12, WIDTH])
    bias = b.const(np.where(np.arange(HIDDEN) < DEAD, -1000, b.rng.normal(size=HIDDEN)).astype(np.float32))
    if form == "Gemm":
        flat = b.op("Reshape", x, b.const(np.array([12, WIDTH])))
        y = b.op("Relu", b.op("Gemm", flat, weight(b, HIDDEN, WIDTH), bias, name="fc1", transB=1))
        return b.output(b.op("Gemm", y, weight(b, HIDDEN, WIDTH), b.floats(WIDTH), name="fc2")).model()
    hidden = b.op("Add", b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="fc1"), bias)
    y = b.op("Relu", hidden)
    if form == "gate":
        y = b.op("Mul", y, b.op("MatMul", x, weight(b, WIDTH, HIDDEN), name="up"))
    return b.output(b.op("MatMul", y, weight(b, HIDDEN, WIDTH), name="fc2")).model()


def sizes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    names = {"fc1", "fc2", "up"}
    return {n.name: tuple(n.inputs[1].const_value.shape.numpy()) for n in model.graph if n.name in names}


@pytest.mark.parametrize("form", ["Gemm", "MatMul", "gate"])
def test_dead_neurons_go(form, b, run_passes, outputs):
    model, data = relu_mlp(b, form), feeds()
    before = [outputs(model, feed)[0] for feed in data]
    report = run_passes(model, PruneDead(), data=data)
    gone = int(details(report, "applied")["fc2"].split(f" of {HIDDEN} neurons removed")[0])
    assert DEAD <= gone < DEAD + 4, "a few more may never fire for some 70 tokens"
    alive = HIDDEN - gone
    assert all(alive in shape for shape in sizes(model).values())
    for feed, want in zip(data, before, strict=True):
        np.testing.assert_allclose(outputs(model, feed)[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    again = run_passes(model, PruneDead(), data=data)
    assert "none can go" in details(again, "refused")["fc2"]


def test_rare_neurons_and_multiples(b, run_passes):
    model, data = relu_mlp(b, "MatMul"), feeds()
    run_passes(model, PruneDead(multiple=16), data=data)
    assert sizes(model)["fc1"] == (WIDTH, HIDDEN), "37 neurons are alive, which is 48 rounded up"
    run_passes(model, PruneDead(multiple=4), data=data)
    assert sizes(model)["fc1"] == (WIDTH, 40)
    run_passes(model, PruneDead(max_rate=0.4), data=data)
    assert 0 < sizes(model)["fc1"][1] < HIDDEN - DEAD


def test_smooth_activations_have_none(b, run_passes):
    report = run_passes(blocks.gated(b), PruneDead(), data=feeds())
    assert f"{HIDDEN} of its {HIDDEN} neurons fire" in details(report, "refused")["down"]


def test_refusals(b, run_passes):
    model = relu_mlp(b, "gate")
    model.graph.outputs.append(next(n for n in model.graph if n.op_type == "Relu").outputs[0])
    assert "outside the block" in details(run_passes(model, PruneDead(), data=feeds()), "refused")["fc2"]
    model = relu_mlp(Builder(), "MatMul")
    run_passes(model, WeightOnly(bits=8, block_size=16, min_weights=1))
    assert "quantized" in details(run_passes(model, PruneDead(), data=feeds()), "refused")["fc2"]
    b = Builder()
    y = b.op("Relu", b.op("MatMul", b.input("x", [1, 12, WIDTH]), weight(b, WIDTH, HIDDEN), name="fc1"))
    y = b.op("Mul", y, b.floats(HIDDEN))
    model = b.output(b.op("MatMul", y, weight(b, HIDDEN, WIDTH), name="fc2")).model()
    assert "constant for each neuron" in details(run_passes(model, PruneDead(), data=feeds()), "refused")["fc2"]


def test_shared_weight(b, run_passes):
    model = relu_mlp(b, "MatMul")
    first = next(n for n in model.graph if n.name == "fc1")
    extra = ir.node("MatMul", [model.graph.inputs[0], first.inputs[1]], name="other")
    model.graph.append(extra)
    extra.outputs[0].name = "other_out"
    model.graph.outputs.append(extra.outputs[0])
    assert "shared" in details(run_passes(model, PruneDead(), data=feeds()), "refused")["fc2"]


def test_no_data(b, run_passes):
    with pytest.raises(CalibrationError, match="--data"):
        run_passes(relu_mlp(b, "MatMul"), PruneDead())


@pytest.mark.parametrize("form", ["Gemm", "MatMul", "gate"])
def test_contract(form, b, capabilities):
    model = relu_mlp(b, form)
    check_pass(PruneDead(), model, capabilities=capabilities, runner=reference_runner, data=feeds())
