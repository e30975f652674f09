"""Folding noise is the same as adding it: by the outputs of the whole graph, and by the values at the quantizer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.metrics import sqnr
from onnxcomp.noise import Noise
from onnxcomp.passes.noisy_bias import NoisyBias
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_activation
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner


@pytest.fixture(autouse=True)
def fixed_noise(monkeypatch):
    """Replaces the search by a noise that differs from channel to channel, within a third of a step."""

    def find(rows, weight, grid, method, seed=0):
        draw = np.random.default_rng(7).uniform(-1 / 3, 1 / 3, rows.shape[1])
        return Noise(vector=(grid.scale * draw).astype(np.float32), method=method, ratio=0.5)

    monkeypatch.setattr("onnxcomp.passes.noisy_bias.find_noise", find)


def place(report, name: str) -> str:
    return next(e.detail for e in report.edits if e.node == name and e.action == "applied")


def at_quantizer(model: ir.Model, name: str, feed: dict[str, np.ndarray]):
    """What stands in front of the quantizer of a layer's input, and its grid."""
    tensor = read_activation(next(n for n in model.graph if n.name == name).inputs[0])
    assert tensor is not None
    return reference_runner(model, [tensor.value.name])(feed)[tensor.value.name], tensor.grid


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("layer", ["qkv", "fc1"])
def test_layer_norm_beta_equals_an_explicit_add(layer, bits, run_passes, outputs, monkeypatch, attention_example):
    found = {}
    for how in ("LayerNorm beta", "explicit Add"):
        if how == "explicit Add":
            monkeypatch.setattr("onnxcomp.passes.noisy_bias.direct_fold", lambda tensor: None)
        model, feed = attention_example[0].clone(), attention_example[1]
        run_passes(model, Quantize(activation_bits=bits, where=Select(name=(layer,))), data=[feed])
        plain = outputs(model, feed)[0]
        report = run_passes(model, NoisyBias(rows=32), data=[feed])
        assert how in place(report, layer)
        found[how] = outputs(model, feed)[0]
        assert not np.allclose(found[how], plain, rtol=0, atol=1e-4), "the noise is meant to change the rounding"
    scale = np.abs(found["explicit Add"]).max()
    np.testing.assert_allclose(found["LayerNorm beta"], found["explicit Add"], rtol=0, atol=3e-6 * scale)


def test_value_bias_shifts_the_attention_by_the_noise_in_float(attention_example, run_passes):
    """Rows of the softmax sum to one. Only `proj` is quantized, so the bias of the values is float."""
    model, feed = attention_example
    run_passes(model, Quantize(where=Select(name=("proj",))), data=[feed])
    before, grid = at_quantizer(model, "proj", feed)
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert "V bias" in place(report, "proj")
    after, _ = at_quantizer(model, "proj", feed)
    noise = grid.scale * np.random.default_rng(7).uniform(-1 / 3, 1 / 3, 16)
    assert np.abs(noise).max() > 1e-3, "far above the tolerance"
    np.testing.assert_allclose(
        after - before, np.broadcast_to(noise, after.shape), rtol=0, atol=1e-6 * np.abs(after).max()
    )


@pytest.mark.parametrize("bits", [6, 8])
def test_output_moves_by_no_more_than_rounding_does(bits, attention_example, run_passes, outputs):
    model, feed = attention_example
    expected = outputs(model, feed)[0]
    run_passes(model, Quantize(activation_bits=bits, weight_bits=8), data=[feed])
    plain = sqnr(expected, outputs(model, feed)[0])
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert sum(e.action == "applied" for e in report.edits) == 4
    assert sqnr(expected, outputs(model, feed)[0]) > plain - 3.0  # a wrong sign or channel costs far more


def attention_of(b: Builder, *, axis: int = -1, keys_are_values: bool = False, spy: bool = False) -> ir.Model:
    """Softmax(q k) v with separate projections and an output projection `proj`."""
    x = b.input("x", [1, 6, 8])

    def project(name: str) -> str:
        weight = b.const((b.rng.normal(size=(8, 8)) * 0.4).astype(np.float32))
        return b.op("Add", b.op("MatMul", x, weight, name=name), b.floats(8), name=f"{name}_bias")

    q, v = project("q"), project("v")
    k = v if keys_are_values else project("k")
    scores = b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1]), name="scores")
    y = b.op("MatMul", b.op("Softmax", scores, axis=axis, name="softmax"), v, name="weighted")
    out = b.op("Add", b.op("MatMul", y, b.floats(8, 4), name="proj"), b.floats(4), name="proj_bias")
    b.output(out)
    return (b.output(v) if spy else b).model()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "V bias"),
        ({"axis": 1}, "explicit Add"),
        # Would be exact, since a softmax does not see what is added to all scores of a query.
        ({"keys_are_values": True}, "explicit Add"),
        pytest.param(
            {"spy": True},
            "explicit Add",
        ),
    ],
    ids=["plain", "softmax over queries", "keys are values", "values are an output"],
)
def test_values_take_the_noise_only_where_that_is_exact(b, options, expected, run_passes):
    model = attention_of(b, **options)
    feed = {"x": np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)}
    run_passes(model, Quantize(where=Select(name=("proj",))), data=[feed])
    names = [v.name for v in model.graph.outputs]
    before = reference_runner(model, names)(feed)
    at_first, grid = at_quantizer(model, "proj", feed)
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert expected in place(report, "proj")
    at_last, _ = at_quantizer(model, "proj", feed)
    noise = grid.scale * np.random.default_rng(7).uniform(-1 / 3, 1 / 3, 8)
    np.testing.assert_allclose(at_last - at_first, np.broadcast_to(noise, at_last.shape), rtol=0, atol=2e-6)
    after = reference_runner(model, names)(feed)
    for name in names[1:]:  # what else comes out of the graph is what it was
        np.testing.assert_array_equal(after[name], before[name])


def test_a_shared_layer_norm_is_not_shifted(b, run_passes):
    """The norm is read by an op outside as well, which must not see the noise."""
    norm = b.op("LayerNormalization", b.input("x", [1, 6, 4]), b.floats(4), b.floats(4), name="norm")
    model = b.output(b.op("MatMul", norm, b.floats(4, 4), name="fc")).output(b.op("Neg", norm, name="other")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)}
    run_passes(model, Quantize(), data=[feed])
    other = model.graph.outputs[1].name
    before = reference_runner(model, [other])(feed)[other]
    report = run_passes(model, NoisyBias(rows=32), data=[feed])
    assert "explicit Add" in place(report, "fc")
    np.testing.assert_array_equal(reference_runner(model, [other])(feed)[other], before)


def test_without_explicit_adds_only_folds_are_made(attention_example, run_passes):
    model, feed = attention_example
    run_passes(model, Quantize(), data=[feed])
    adds = sum(n.op_type == "Add" for n in model.graph)
    report = run_passes(model, NoisyBias(rows=32, explicit=False), data=[feed])
    assert {e.node: e.action for e in report.edits} == {
        "qkv": "applied", "proj": "applied", "fc1": "applied", "fc2": "refused"
    }  # fmt: skip
    assert next(e.detail for e in report.edits if e.node == "fc2") == "the noise cannot be folded, and explicit = false"
    assert sum(n.op_type == "Add" for n in model.graph) == adds
