"""The mean error that rounding the weights causes is taken off the bias."""

from __future__ import annotations

import numpy as np
import pytest
from builder import Builder

from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_weight

CONV = {"dense": ((6, 8, 3, 3), 1), "depthwise": ((8, 1, 3, 3), 8), "grouped": ((6, 4, 1, 1), 2)}


def positive(seed: int, *shape: int) -> np.ndarray:
    return np.abs(np.random.default_rng(seed).normal(1.0, 0.5, shape)).astype(np.float32)


def mean_error(model, reference, outputs, feeds, axis: int) -> float:
    """RMS over channels of the mean output error on `feeds`."""
    errors = [outputs(model, f)[0] - outputs(reference, f)[0] for f in feeds]
    error = np.moveaxis(np.concatenate(errors), axis, 0)
    return float(np.sqrt((error.reshape(len(error), -1).mean(axis=1) ** 2).mean()))


def corrected(build, run_passes, outputs, shape, axis) -> tuple[float, float]:
    """Mean error on unseen data without and with the correction, weights at 4 bits."""
    feeds = [{"x": positive(seed, *shape)} for seed in range(8)]
    found = []
    for correction in (False, True):
        model = build()
        run_passes(model, Quantize(weight_bits=4, bias_correction=correction), data=feeds[:4])
        found.append(mean_error(model, build(), outputs, feeds[4:], axis))
    return found[0], found[1]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", CONV)
def test_conv(kind, with_bias, run_passes, outputs):
    weight, group = CONV[kind]

    def build():
        b = Builder()
        extra = [b.floats(weight[0])] if with_bias else []
        return b.output(b.op("Conv", b.input("x", [1, 8, 9, 9]), b.floats(*weight), *extra, group=group)).model()

    without, with_ = corrected(build, run_passes, outputs, (1, 8, 9, 9), 1)
    assert with_ < 0.2 * without


@pytest.mark.parametrize("form", ["Gemm", "Gemm transposed", "Gemm without bias", "MatMul and Add"])
def test_matrix(form, run_passes, outputs):
    def build():
        b = Builder()
        x = b.input("x", [32, 24])
        if form == "MatMul and Add":
            y = b.op("Add", b.op("MatMul", x, b.floats(24, 7)), b.floats(7))
        elif form == "Gemm transposed":
            y = b.op("Gemm", x, b.floats(7, 24), b.floats(7), transB=1)
        else:
            y = b.op("Gemm", x, b.floats(24, 7), *([b.floats(7)] if form == "Gemm" else []))
        return b.output(y).model()

    without, with_ = corrected(build, run_passes, outputs, (32, 24), 1)
    assert with_ < 0.2 * without


def test_matmul_without_bias_stays_one_op(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", [4, 8]), b.floats(8, 3), name="linear")).model()
    run_passes(model, Quantize(), data=[{"x": positive(0, 4, 8)}])
    assert [n.op_type for n in model.graph if n.op_type == "Add"] == []


def test_bias_is_the_old_one_plus_the_mean_of_what_rounding_took(b, run_passes):
    weight, bias, x = b.rng.normal(size=(5, 6)).astype(np.float32), np.ones(5, np.float32), positive(0, 40, 6)
    model = b.output(b.op("Gemm", b.input("x", [40, 6]), b.const(weight), b.const(bias), name="g", transB=1)).model()
    run_passes(model, Quantize(weight_bits=3), data=[{"x": x}])
    gemm = next(n for n in model.graph if n.name == "g")
    stored, added = read_weight(gemm.inputs[1]), read_weight(gemm.inputs[2])
    assert stored is not None
    assert added is not None
    lost = weight - stored[0] * stored[1][:, None]
    expected = bias + lost.astype(np.float64) @ x.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(added[0] * added[1].astype(np.float64), expected, rtol=0, atol=float(added[1].max()))
    assert np.abs(expected - bias).max() > 0.01


def test_inputs_behind_moved_values_are_corrected_too(run_passes, outputs):
    """The range comes from the tensor before the Transpose, the mean of the channels from behind it."""

    def build():
        b = Builder()
        y = b.op("Conv", b.input("x", [1, 3, 4, 4]), b.floats(6, 3, 1, 1), b.const(np.full(6, 4, np.float32)))
        y = b.op("Transpose", b.op("Relu", y), perm=[0, 2, 3, 1])
        return b.output(b.op("Add", b.op("MatMul", y, b.floats(6, 5)), b.floats(5))).model()

    without, with_ = corrected(build, run_passes, outputs, (1, 3, 4, 4), 3)
    assert with_ < 0.5 * without
