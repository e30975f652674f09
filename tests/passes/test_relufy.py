"""Smooth activations become ReLU in every form, and nothing else changes."""

from __future__ import annotations

import blocks
import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, gelu, gelu_tanh, silu, weight

from onnxcomp.passes.relufy import Relufy
from onnxcomp.passes.threshold import Threshold
from onnxcomp.testing import check_pass


def types(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph]


@pytest.mark.parametrize("act", [silu, gelu, gelu_tanh, lambda b, x: b.op("Gelu", x, name="act")])
@pytest.mark.parametrize("threshold", [0.0, 0.25])
def test_gate(act, threshold, b, run_passes, outputs):
    model = blocks.gated(b, act=act)
    model.graph.opset_imports[""] = 20
    x = feeds()[0]
    gate, up, down = (n.inputs[1].const_value.numpy() for n in model.graph if n.name in ("gate", "up", "down"))
    report = run_passes(model, Relufy(threshold=threshold), data=None)
    assert "train" in report.edits[-1].detail
    assert ("ThresholdedRelu" if threshold else "Relu") in types(model)
    assert not {"Sigmoid", "Erf", "Tanh", "Gelu"} & set(types(model)), "the old activation is gone"
    a = x["x"] @ gate
    want = x["x"] + (np.where(a > threshold, a, 0) * (x["x"] @ up)) @ down
    np.testing.assert_allclose(outputs(model, x)[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert not run_passes(model, Relufy(threshold=threshold)).applied
    assert run_passes(model, Threshold(method="fatrelu", value=0.01), data=feeds()).applied


def test_without_a_gate(b, run_passes, outputs):
    x = b.input("x", [4, WIDTH])
    y = gelu(b, b.op("Gemm", x, weight(b, WIDTH, HIDDEN), b.floats(HIDDEN), name="fc1"))
    model = b.output(b.op("Gemm", y, weight(b, HIDDEN, WIDTH), name="fc2")).model()
    run_passes(model, Relufy())
    assert types(model) == ["Gemm", "Relu", "Gemm"]


def test_what_stays(b, run_passes):
    """What is no activation of a block, is not among those asked for, or holds a bias."""
    model = blocks.gated(b, act=lambda b, x: b.op("Tanh", x, name="act"))
    (edit,) = [e for e in run_passes(model, Relufy()).edits if e.node == "down"]
    assert (edit.action, "tanh" in edit.detail) == ("refused", True)
    x = b.input("x2", [4, WIDTH])
    hidden = b.op("MatMul", x, weight(b, WIDTH, HIDDEN))
    y = b.op("BiasGelu", hidden, b.floats(HIDDEN), domain="com.microsoft")
    model = b.output(b.op("MatMul", y, weight(b, HIDDEN, WIDTH), name="last")).model(opset=18)
    (edit,) = [e for e in run_passes(model, Relufy()).edits if e.node == "last"]
    assert (edit.action, "adds a bias" in edit.detail) == ("refused", True)
    model = blocks.gated(type(b)())
    assert not run_passes(model, Relufy(activations=("gelu",))).applied


def test_contract(b, capabilities, attention_example):
    for model in (blocks.gated(b), attention_example[0]):
        check_pass(Relufy(), model, capabilities=capabilities)
