"""Where the noise goes, and that folding it changes nothing but the rounding."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.noise import Noise
from onnxcomp.passes.noisy_bias import NoisyBias
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_activation
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner


@pytest.fixture
def fixed_noise(monkeypatch):
    """Replaces the search by a noise of a third of a step, of changing sign."""

    def find(rows, weight, grid, method, seed=0):
        vector = (grid.scale / 3 * np.where(np.arange(rows.shape[1]) % 2, 1, -1)).astype(np.float32)
        return Noise(vector=vector, method=method, ratio=0.5)

    monkeypatch.setattr("onnxcomp.passes.noisy_bias.find_noise", find)


def places(report) -> dict[str, str]:
    return {e.node: e.detail.split(" in ")[1].split(";")[0] for e in report.edits if e.action == "applied"}


def test_folds_are_found(attention_example, run_passes, fixed_noise):
    model, feed = attention_example
    run_passes(model, Quantize(), data=[feed])
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert places(report) == {
        "qkv": "LayerNorm beta", "proj": "V bias", "fc1": "LayerNorm beta", "fc2": "explicit Add"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["qkv", "proj"])
def test_fold_shifts_the_input_by_the_noise_and_nothing_else(name, attention_example, run_passes, fixed_noise):
    """The input of the layer with the fold is what it was plus the noise: what is before it computes as before."""
    model, feed = attention_example
    run_passes(model, Quantize(), data=[feed])
    layer = next(n for n in model.graph if n.name == name)
    tensor = read_activation(layer.inputs[0])
    before = reference_runner(model, [tensor.value.name])(feed)[tensor.value.name]
    run_passes(model, NoisyBias(rows=32, where=Select(name=(name,))), data=[feed])
    after = reference_runner(model, [tensor.value.name])(feed)[tensor.value.name]
    noise = np.where(np.arange(16) % 2, 1, -1) * tensor.grid.scale / 3
    np.testing.assert_allclose(
        after - before, np.broadcast_to(noise, before.shape), atol=2e-6 if name == "qkv" else 1e-3
    )
    if name == "proj":  # rounding of the int32 bias only: far below the noise
        assert np.abs(after - before - noise).max() < tensor.grid.scale / 20


@pytest.mark.parametrize("bits", [6, 8])
def test_output_stays_near_the_original(bits, attention_example, run_passes, outputs, fixed_noise):
    from onnxcomp.metrics import sqnr

    model, feed = attention_example
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(activation_bits=bits), data=[feed])
    plain = sqnr(expected, outputs(model, feed)[0])
    run_passes(model, NoisyBias(rows=32), data=[feed])
    assert sqnr(expected, outputs(model, feed)[0]) > plain - 3.0


def test_gemm_without_bias_gets_one(b, run_passes, outputs, fixed_noise):
    y = b.op("Gemm", b.input("x", [8, 4]), b.floats(4, 3), name="gemm")
    z = b.op("MatMul", y, b.floats(3, 2), name="matmul")
    model = b.output(z).model()
    feed = {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(), data=[feed])
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert set(places(report)) == {"gemm", "matmul"}
    assert [v.name for v in model.graph.outputs] == [z]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, atol=0.05 * np.abs(expected).max())


def test_structural_zeros_and_convs_are_refused(b, run_passes, fixed_noise):
    y = b.op("Relu", b.op("Gemm", b.input("x", [8, 4]), b.floats(4, 6), name="first"), name="relu")
    model = b.output(b.op("Gemm", y, b.floats(6, 3), name="second")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)}
    # The ReLU would be folded into the quantizer; kept, its zeros reach the quantizer.
    run_passes(model, Quantize(), data=[feed])
    report = run_passes(model, NoisyBias(rows=32), data=[{"x": np.zeros((8, 4), np.float32)}])
    refused = {e.node: e.detail for e in report.edits if e.action == "refused"}
    assert "exact zeros" in refused["first"]


def test_shared_bias_of_two_layers_takes_the_noise_once_each(b, run_passes, outputs, fixed_noise):
    x = b.input("x", [1, 6, 4])
    norm = b.op("LayerNormalization", x, b.floats(4), b.floats(4), name="norm")
    bias = b.floats(4)
    left = b.op("Add", b.op("MatMul", norm, b.floats(4, 4), name="left"), bias)
    right = b.op("Add", b.op("MatMul", norm, b.floats(4, 4), name="right"), bias)
    model = b.output(left).output(right).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)}
    expected = outputs(model, feed)
    run_passes(model, Quantize(), data=[feed])
    run_passes(model, NoisyBias(rows=32), data=[feed])
    for found, want in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_allclose(found, want, atol=0.03 * np.abs(want).max())
