"""The contract on models with functions, untyped values, BatchNorm, shared weights, and on quantized ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.model import name_nodes
from onnxcomp.registry import PASSES, load_pass, names
from onnxcomp.rewrite import Pipeline
from onnxcomp.state import model_state
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

Example = tuple[ir.Model, dict[str, np.ndarray]]


def feed(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}


def batch_norm() -> Example:
    """Conv, BatchNormalization, ReLU6, and the same weight in two Convs."""
    b = Builder()
    shared = b.floats(4, 4, 3, 3)
    y = b.op("Conv", b.input("x", ["n", 4, 8, 8]), shared, name="first", pads=[1, 1, 1, 1])
    statistics = [b.const(b.rng.uniform(0.5, 2, 4).astype(np.float32)) for _ in range(4)]
    y = b.op("BatchNormalization", y, *statistics, name="norm")
    y = b.op("Clip", y, b.const(np.float32(0)), b.const(np.float32(6)), name="relu6")
    y = b.op("Conv", y, shared, name="second", pads=[1, 1, 1, 1])
    return b.output(b.op("Relu", y, name="last")).model(), feed(2, 4, 8, 8)


def function() -> Example:
    """A linear layer inside a local function, one outside."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[n, 4] x) => (float[n, 2] y)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}, float[4, 2] v = {1,-2,3,-4,5,-6,7,-8}> {
            a = local.Layer(x, w)
            y = MatMul(a, v)
        }
        <domain: "local", opset_import: ["" : 17]> Layer (p, q) => (s) { r = MatMul(p, q)  s = Relu(r) }""")
    name_nodes(model)
    return model, feed(3, 4)


def untyped() -> Example:
    """No value but the inputs has a type or a shape; the output neither."""
    b = Builder()
    y = b.op("Gemm", b.input("x", ["n", 4]), b.floats(4, 6), b.floats(6), name="first")
    y = b.op("Gemm", b.op("Sigmoid", y), b.floats(6, 3), name="second")
    model = b.output(y).model()
    for node in model.graph:
        for value in node.outputs:
            value.shape, value.type = None, None
    return model, feed(5, 4)


def gelu_mlp() -> Example:
    b = Builder()
    x = b.op("LayerNormalization", b.input("x", ["n", 8]), b.floats(8), b.floats(8), name="norm")
    y = b.op("Add", b.op("MatMul", x, b.floats(8, 16), name="fc1"), b.floats(16))
    erf = b.op("Erf", b.op("Div", y, b.const(np.float32(2**0.5))))
    y = b.op("Mul", b.op("Mul", y, b.const(np.float32(0.5))), b.op("Add", erf, b.const(np.float32(1))), name="gelu")
    return b.output(b.op("MatMul", y, b.floats(16, 3), name="fc2")).model(), feed(64, 8)


def nothing() -> Example:
    """No op that any pass is interested in."""
    b = Builder()
    return b.output(b.op("Neg", b.op("Exp", b.input("x", [2, 2])))).model(), feed(2, 2)


MODELS: dict[str, Callable[[], Example]] = {f.__name__: f for f in (batch_norm, function, untyped, gelu_mlp, nothing)}


@pytest.fixture(params=sorted(MODELS))
def odd_example(request) -> Example:
    return MODELS[request.param]()


@pytest.fixture
def check(capabilities):
    def run(name: str, model: ir.Model, sample: dict[str, np.ndarray], **config: Any):
        step = load_pass(name)(**config)
        return check_pass(step, model, capabilities=capabilities, runner=reference_runner, data=[sample, sample])

    return run


@pytest.mark.parametrize("name", names(PASSES))
def test_contract(name, odd_example, check):
    check(name, *odd_example)


@pytest.mark.parametrize("name", [n for n in names(PASSES) if n != "noisy_bias"])
@pytest.mark.parametrize("bits", [4, 8])
def test_contract_on_a_quantized_model(name, bits, odd_example, check, capabilities):
    model, sample = odd_example
    step = load_pass("quantize")(activation_bits=bits)
    Pipeline(passes=[step], capabilities=capabilities, runner=reference_runner).run(model, [sample])
    check(name, model, sample)


@pytest.mark.parametrize("bits", [4, 6])
def test_noise_is_added_once(bits, check, capabilities):
    model, sample = gelu_mlp()
    step = load_pass("quantize")(activation_bits=bits)
    Pipeline(passes=[step], capabilities=capabilities, runner=reference_runner).run(model, [sample])
    edits = check("noisy_bias", model, sample)
    assert any(e.action == "applied" for e in edits), "the case is meant to have noise"


@pytest.mark.parametrize("seed", range(2))
def test_noise_is_added_once_in_a_transformer(seed, attention_example, capabilities):
    model, _ = attention_example
    random = np.random.default_rng(seed)
    data = [{"x": random.normal(size=(1, 12, 16)).astype(np.float32)} for _ in range(6)]
    step = load_pass("quantize")(activation_bits=4)
    Pipeline(passes=[step], capabilities=capabilities, runner=reference_runner).run(model, data)
    check_pass(load_pass("noisy_bias")(), model, capabilities=capabilities, runner=reference_runner, data=data)


@pytest.mark.parametrize("name", names(PASSES))
def test_no_match_changes_nothing(name, check):
    model, sample = nothing()
    before = ir.to_onnx_text(model)
    assert list(check(name, model, sample)) == []
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize("name", [n for n in names(PASSES) if n not in ("delta", "nm_mask", "relufy", "threshold")])
def test_function_of_the_model_is_kept(name, odd_example, capabilities):
    """Outputs stay what they were, to within the rounding of 8 bits."""
    model, sample = odd_example
    outputs = [v.name for v in model.graph.outputs]
    expected = reference_runner(model, outputs)(sample)
    pipeline = Pipeline(passes=[load_pass(name)()], capabilities=capabilities, runner=reference_runner)
    pipeline.run(model, [sample, sample])
    states = {s.output for s in model_state(model)}
    assert [v.name for v in model.graph.outputs if v.name not in states] == outputs
    found = reference_runner(model, outputs)(sample)
    for output in outputs:
        scale = np.abs(expected[output]).max()
        np.testing.assert_allclose(found[output], expected[output], rtol=0, atol=0.06 * scale)
