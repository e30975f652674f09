"""Models as other tools write them run on integers afterwards, and compute the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from foreign import TOOLS, Example

from onnxcomp.edit import constant, users
from onnxcomp.errors import CalibrationError, PassError
from onnxcomp.metrics import sqnr
from onnxcomp.model import model_size
from onnxcomp.passes.legalize import Legalize
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.testing import check_pass


@pytest.fixture(params=sorted(TOOLS))
def foreign(request) -> Example:
    return TOOLS[request.param]()


def as_written(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    """The first output as the operators' definitions give it: nothing fused, floats between the roundings."""
    return next(iter(reference_runner(model, [model.graph.outputs[0].name], optimize=False)(feed).values()))


def executed(model: ir.Model, tmp_path) -> Counter[str]:
    return Counter(OrtCpu().compile(model, tmp_path / "a").audit.executed_ops)


def test_runs_on_integers(foreign, run_passes, tmp_path):
    model, _ = foreign
    run_passes(model, Legalize())
    ops = executed(model, tmp_path)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "Clip", "Relu"} & set(ops)
    audit = OrtCpu().compile(model, tmp_path / "b").audit
    assert all(row.integer for row in audit.rows)
    assert not audit.fallbacks


def test_computes_the_same(foreign, run_passes):
    """Within the noise of 8 bits: a tensor may differ by half a step where a rounding is dropped or added."""
    model, feed = foreign
    expected = as_written(model, feed)
    run_passes(model, Legalize())
    assert sqnr(expected, as_written(model, feed)) > 24


def test_exact_keeps_every_integer(foreign, run_passes):
    """Only a float bias is rounded, to a step of the accumulator (1e-4 here); a tie may then fall on the other side."""
    model, feed = foreign
    expected = as_written(model, feed)
    report = run_passes(model, Legalize(exact=True))
    assert report.applied
    found = as_written(model, feed)
    assert np.mean(np.abs(found - expected) > 1e-3 * np.abs(expected).max()) < 0.02
    assert sqnr(expected, found) > 40


def test_contract(foreign, capabilities):
    model, feed = foreign
    for subject in (Legalize(), Legalize(exact=True), Legalize(calibrate=True)):
        edits = check_pass(subject, model, capabilities=capabilities, runner=reference_runner, data=[feed])
        assert any(e.action == "applied" for e in edits)


def test_float_weights_are_stored_as_integers(run_passes):
    model, _ = TOOLS["modelopt"]()
    before = model_size(model).weight_bytes
    run_passes(model, Legalize())
    assert model_size(model).weight_bytes < 0.6 * before


def test_of_two_roundings_the_second_is_left(run_passes):
    model, _ = TOOLS["ort_linear_only"]()
    run_passes(model, Legalize())
    for name in ("stem", "depthwise"):
        (quantize,) = users(next(n for n in model.graph if n.name == name).outputs[0])
        assert constant(quantize.inputs[1]) == np.float32(6 / 255)
        assert constant(quantize.inputs[2]) == 0


def test_our_own_models_are_left_alone(cnn_example, run_passes):
    model, feed = cnn_example
    run_passes(model, Quantize(), data=[feed])
    before = ir.to_onnx_text(model)
    report = run_passes(model, Legalize())
    assert report.edits == ()
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize("bits", [3, 6])
def test_narrow_values_stay_narrow(bits, cnn_example, run_passes):
    model, feed = cnn_example
    run_passes(model, Quantize(activation_bits=bits), data=[feed])
    assert run_passes(model, Legalize()).edits == ()


def test_float_model_is_left_alone(cnn_example, run_passes):
    model, _ = cnn_example
    assert run_passes(model, Legalize()).edits == ()


def test_selector_limits_the_edits(run_passes):
    model, _ = TOOLS["quark"]()
    report = run_passes(model, Legalize(where=Select(skip=("QuantizeLinear", "DequantizeLinear"))))
    assert not any(e.op_type.endswith("quantizeLinear") for e in report.edits)


def test_calibration_needs_data(b, run_passes):
    y = b.op("Conv", b.image(), b.weight((4, 8, 3, 3), 0), name="conv")
    y = b.qdq(b.op("Mul", y, b.op("Sigmoid", y), name="silu"))
    model = b.output(b.op("Conv", y, b.weight((4, 4, 1, 1), 0), name="last")).model()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        run_passes(model, Legalize(calibrate=True))


def test_missing_ranges_are_observed(b, run_passes, tmp_path):
    y = b.op("Conv", b.image(), b.weight((4, 8, 3, 3), 0), name="conv")
    y = b.qdq(b.op("Mul", y, b.op("Sigmoid", y, name="gate"), name="silu"))
    model = b.output(b.qdq(b.op("Conv", y, b.weight((4, 4, 1, 1), 0), name="last"))).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 8, 16, 16)).astype(np.float32)}
    expected = as_written(model, feed)
    refusals = {e.node: e.detail for e in run_passes(model.clone(), Legalize()).edits if e.action == "refused"}
    assert "set `calibrate`" in refusals["conv"]
    run_passes(model, Legalize(calibrate=True), data=[feed])
    ops = executed(model, tmp_path)
    assert ops["QLinearConv"] == 2
    assert ops["QLinearSigmoid"] == ops["QLinearMul"] == 1
    assert sqnr(expected, as_written(model, feed)) > 20


def test_target_without_integer_kernels(cnn_example, capabilities):
    with pytest.raises(PassError, match="no integer kernels"):
        Pipeline(passes=[Legalize()], capabilities=replace(capabilities, placements={})).run(cnn_example[0])
