"""AWQ's scales change no output in float, and lower what rounding of the weights costs on other data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.errors import CalibrationError
from onnxcomp.passes._awq_search import Trial
from onnxcomp.passes.awq import Awq
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

CHANNELS = 64
LARGE = np.where(np.arange(CHANNELS) % 9 == 4, 20.0, 1.0).astype(np.float32)
EXACT = {"accuracy_level": 0, "min_weights": 0}


def feeds(count: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return [{"x": random.normal(size=(1, 50, CHANNELS)).astype(np.float32)} for _ in range(count)]


def block(b: Builder) -> ir.Model:
    """A norm with large channels that two layers read, gated, and a layer behind the gate."""
    x = b.input("x", [1, "t", CHANNELS])
    gain = b.const(LARGE * b.rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32))
    y = b.op("LayerNormalization", x, gain, b.floats(CHANNELS), name="norm")
    small = lambda *shape: b.const((b.rng.normal(size=shape) / 8).astype(np.float32))  # noqa: E731
    gate = b.op("Sigmoid", b.op("MatMul", y, small(CHANNELS, 96), name="gate"))
    sizes = np.geomspace(0.01, 3, 96)[b.rng.permutation(96)] / 8
    weight = b.const((sizes * b.rng.normal(size=(CHANNELS, 96))).astype(np.float32))
    up = b.op("MatMul", y, weight, name="up")
    return b.output(b.op("MatMul", b.op("Mul", gate, up), small(96, CHANNELS), name="down")).model()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def test_float_function_stays_and_every_layer_is_scaled(b, run_passes, outputs):
    model, feed = block(b), feeds(1, seed=3)[0]
    before = outputs(model, feed)[0]
    nodes = [node.op_type for node in model.graph]
    weights = {name: v.const_value.numpy().copy() for name, v in model.graph.initializers.items()}
    report = run_passes(model, Awq(rows=100), data=feeds())
    done = {e.node: e.detail for e in report.edits if e.action == "applied"}
    assert set(done) == {"gate", "up", "down"}
    assert "LayerNormalization gamma" in done["gate"]
    assert "columns of up" in done["down"]
    np.testing.assert_allclose(outputs(model, feed)[0], before, rtol=0, atol=1e-5 * np.abs(before).max())
    assert [node.op_type for node in model.graph] == nodes
    assert not set(weights) & set(model.graph.initializers), "every weight was changed"


def test_attention(attention_example, run_passes, outputs):
    """Through the value projection of an attention, and past a GELU that takes no scale."""
    model, feed = attention_example
    before = outputs(model, feed)[0]
    data = [{"x": np.random.default_rng(i).normal(size=(1, 12, 16)).astype(np.float32)} for i in range(20)]
    report = run_passes(model, Awq(rows=200, block_size=16, min_gain=0.0), data=data)
    assert any(e.action == "applied" for e in report.edits)
    assert next(e for e in report.edits if e.node == "fc2").action == "refused"
    np.testing.assert_allclose(outputs(model, feed)[0], before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_output_error_on_other_data(method, b, run_passes, outputs):
    model, test = block(b), feeds(seed=9)
    expected = [outputs(model, feed)[0] for feed in test]
    errors = []
    for passes in ([], [Awq(rows=100)]):
        copy = model.clone()
        run_passes(copy, *passes, WeightOnly(method=method, **EXACT), data=feeds())
        errors.append(np.mean([relative(outputs(copy, f)[0], e) for f, e in zip(test, expected, strict=True)]))
    assert errors[1] < (0.85 if method == "rtn" else 1.0) * errors[0]


def rounded(weight: np.ndarray) -> np.ndarray:
    """4 bits in blocks of 32 along the rows of (N, K), from the extremes of a block, zero included."""
    blocks = weight.reshape(len(weight), -1, 32)
    low, high = np.minimum(blocks.min(-1, keepdims=True), 0), np.maximum(blocks.max(-1, keepdims=True), 0)
    step = (high - low) / 15
    zero = np.rint(-low / step)
    return ((np.clip(np.rint(blocks / step) + zero, 0, 15) - zero) * step).reshape(weight.shape)


def test_exponent_is_the_best_of_all():
    random = np.random.default_rng(0)
    rows = random.normal(size=(80, CHANNELS)) * LARGE
    weight = random.normal(size=(CHANNELS, 40))
    trial = Trial(rows, weight, bits=4, block_size=32, symmetric=False, groups=None, seed=0)
    errors = {}
    for i in range(21):
        scale = np.abs(rows).mean(axis=0) ** (i / 20)
        scale = scale / np.sqrt(scale.max() * scale.min())
        change = rounded(weight.T * scale) / scale - weight.T
        errors[i / 20] = [float(((part @ change.T) ** 2).sum()) for part in (rows[::2], rows[1::2])]
    best = min(errors, key=lambda alpha: errors[alpha][0])
    alpha, ratio = trial.best()
    assert alpha == best > 0
    assert ratio == pytest.approx(errors[best][1] / errors[0.0][1], rel=1e-3)
    assert ratio < 0.7


def test_channels_that_share_a_scale():
    groups = np.arange(CHANNELS) % 16
    rows = np.random.default_rng(0).normal(size=(80, CHANNELS)) * LARGE
    trial = Trial(rows, np.ones((CHANNELS, 4)), bits=4, block_size=32, symmetric=False, groups=groups, seed=0)
    scale = trial.scale(0.5).reshape(4, 16)
    np.testing.assert_array_equal(scale, np.broadcast_to(scale[0], scale.shape))


def test_without_data(b, run_passes):
    with pytest.raises(CalibrationError, match="needs calibration data; give some with --data"):
        run_passes(block(b), Awq())


def test_what_cannot_be_scaled(b, run_passes):
    x = b.input("x", [1, "t", CHANNELS])
    y = b.op("MatMul", x, b.floats(CHANNELS, 32), name="first")
    model = b.output(b.op("MatMul", b.op("Tanh", y), b.floats(32, 8), name="second")).model()
    reasons = {e.node: e.detail for e in run_passes(model, Awq(), data=feeds()).edits}
    assert "input of the graph" in reasons["first"]
    assert "Tanh" in reasons["second"]


def test_contract(b, capabilities):
    edits = check_pass(Awq(rows=100), block(b), capabilities=capabilities, runner=reference_runner, data=feeds())
    assert sum(e.action == "applied" for e in edits) == 3
