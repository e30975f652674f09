"""Grids against ONNX's own QuantizeLinear, and ranges against the error that they are meant to keep low."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxcomp.errors import CalibrationError
from onnxcomp.histogram import Histogram
from onnxcomp.quant import Grid, activation_grid, observed_range, weight_grid

TINY = float(np.finfo(np.float32).tiny)


def in_onnx(grid: Grid, x: np.ndarray, run) -> tuple[np.ndarray, np.ndarray]:
    """Integers and floats that onnxruntime makes of `x` on the grid's container."""
    kind = helper.np_dtype_to_tensor_dtype(grid.dtype)
    attributes = {} if grid.axis is None else {"axis": grid.axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("q", kind, None), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(grid.scale, "s"), onnx.numpy_helper.from_array(grid.zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    q, y = run(model.SerializeToString(), {"x": x})
    reference = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(q, reference[0])
    return q, y


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 6.0), (-0.17, 4.0), (-2.0, 0.0)])
def test_activations_round_as_onnx_does(low, high, symmetric, run):
    grid = activation_grid(low, high, 8, symmetric=symmetric)
    x = np.random.default_rng(0).normal(0, 3, (64, 7)).astype(np.float32)
    q, y = in_onnx(grid, x, run)
    np.testing.assert_array_equal(grid.quantize(x), q)
    np.testing.assert_array_equal(grid.round_trip(x), y)
    assert {int(q.min()), int(q.max())} & {0, 255}, "the case is meant to saturate"


@pytest.mark.parametrize("zero", [0, 3])
def test_halves_round_to_even(zero, run):
    grid = Grid(
        scale=np.float32(0.5).reshape(()), zero_point=np.asarray(zero, np.uint8), qmin=0, qmax=255, dtype=np.dtype("u1")
    )
    x = np.array([0.25, 0.75, 1.25, 1.75, 2.25, 126.25], np.float32)  # a half, one and a half, ... steps
    q, y = in_onnx(grid, x, run)
    assert (q.astype(int) - zero).tolist() == [0, 2, 2, 4, 4, 252]
    np.testing.assert_array_equal(grid.quantize(x), q)
    np.testing.assert_array_equal(grid.round_trip(x), y)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_weights_round_as_onnx_does(axis, run):
    weight = np.random.default_rng(0).normal(0, [[0.1], [1.0], [5.0]], (3, 40)).astype(np.float32)
    grid = weight_grid(weight, 8, axis)
    q, y = in_onnx(grid, weight, run)
    np.testing.assert_array_equal(grid.quantize(weight), np.clip(q, -127, 127))
    np.testing.assert_array_equal(grid.dequantize(q), y)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_levels_of_an_activation_grid(bits, symmetric):
    grid = activation_grid(-1.0, 2.0, bits, symmetric=symmetric)
    q = grid.quantize(np.linspace(-3, 5, 4001, dtype=np.float32))
    assert sorted(set(q.tolist())) == list(range(2**bits))
    assert grid.narrow is (bits < 8)
    assert (grid.qmin, grid.qmax) == (0, 2**bits - 1)
    if symmetric:
        assert grid.zero_point == 2 ** (bits - 1)
    # Both ends are covered to within the half step that the zero point is rounded by.
    assert float(grid.low) <= -1.0 + float(grid.scale) / 2 + 1e-6
    assert float(grid.high) >= 2.0 - float(grid.scale) / 2 - 1e-6


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1e6, 1e6, width=32),
    st.integers(2, 8),
    st.booleans(),
)
def test_zero_is_exact_and_inside_errors_are_half_a_step(one, two, bits, symmetric):
    grid = activation_grid(min(one, two), max(one, two), bits, symmetric=symmetric)
    assert grid.round_trip(np.zeros(3, np.float32)).tolist() == [0.0, 0.0, 0.0]
    assert float(grid.scale) >= TINY
    x = np.linspace(float(grid.low), float(grid.high), 101, dtype=np.float32)
    np.testing.assert_allclose(grid.round_trip(x), x, rtol=1e-5, atol=float(grid.scale) * 0.5001)


def test_a_grid_without_a_range_is_all_zero():
    grid = activation_grid(0.0, 0.0, 8)
    assert not grid.round_trip(np.zeros(4, np.float32)).any()
    assert np.isfinite(np.float32(1.0) / grid.scale)


# --- ranges of activations


def observed(x: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def error(x: np.ndarray, bounds: tuple[float, float], bits: int) -> float:
    return float(((activation_grid(*bounds, bits).round_trip(x) - x) ** 2).mean())


def samples(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    x = random.normal(0, 1, 20_000)
    made = {
        "normal": x,
        "relu": np.maximum(x, 0),
        "gelu": x * (1 + np.tanh(0.79788 * (x + 0.044715 * x**3))) / 2,
        "laplace": random.laplace(size=20_000),
        "student": random.standard_t(3, 20_000),
        "uniform": random.uniform(-2, 1, 20_000),
        "outlier": np.append(x, 80.0),
    }
    return made[kind].astype(np.float32)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "gelu", "laplace", "student", "uniform", "outlier"])
def test_mse_is_no_worse_than_minmax_on_its_own_data(kind, bits):
    x = samples(kind)
    histogram = observed(x)
    found = error(x, observed_range(histogram, "mse", bits), bits)
    # 1 %: the histogram knows a value to within a bin only.
    assert found <= 1.01 * error(x, observed_range(histogram, "minmax", bits), bits)


@pytest.mark.parametrize(("kind", "bits"), [("normal", 4), ("laplace", 4), ("student", 6), ("gelu", 4), ("gelu", 8)])
def test_mse_is_near_the_best_range_of_an_exhaustive_search(kind, bits):
    x = samples(kind)
    low, high = float(x.min()), float(x.max())
    steps = np.linspace(0.05, 1.0, 40)
    best = min(error(x, (low * a, high * b), bits) for a in steps for b in steps)
    assert error(x, observed_range(observed(x), "mse", bits), bits) <= 1.05 * best


def test_mse_clips_what_is_rare():
    x = samples("outlier")
    low, high = observed_range(observed(x), "mse", 4)
    assert high < 20
    assert error(x[:-1], (low, high), 4) < 0.1 * error(x[:-1], (float(x.min()), 80.0), 4)


def test_minmax_and_percentile():
    x = np.linspace(-1.0, 3.0, 10_001, dtype=np.float32)
    histogram = observed(x)
    assert observed_range(histogram, "minmax", 8) == (-1.0, 3.0)
    low, high = observed_range(histogram, "percentile", 8, percentile=90.0)
    assert low == pytest.approx(-0.8, rel=0, abs=2 * histogram.width)
    assert high == pytest.approx(2.8, rel=0, abs=2 * histogram.width)


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (-2.0, -1.0)])
def test_every_range_holds_zero(method, low, high):
    found = observed_range(observed(np.linspace(low, high, 1000, dtype=np.float32)), method, 8)
    assert found[0] <= 0.0 <= found[1]
    assert found[0] < found[1]


def test_a_range_needs_data():
    with pytest.raises(CalibrationError, match="no data was observed"):
        observed_range(Histogram(), "mse", 8)


# --- weights


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_grid_is_symmetric(bits, method):
    weight = np.random.default_rng(0).normal(size=(6, 5, 3, 3)).astype(np.float32)
    grid = weight_grid(weight, bits, 0, method)
    qmax = 2 ** (bits - 1) - 1
    assert (grid.qmin, grid.qmax, grid.scale.shape, grid.axis) == (-qmax, qmax, (6,), 0)
    assert not grid.zero_point.any()
    q = grid.quantize(weight)
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max() == qmax
    np.testing.assert_array_equal(grid.round_trip(-weight), -grid.round_trip(weight))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_mse_is_no_worse_than_absmax_in_any_channel(bits):
    weight = np.random.default_rng(0).standard_t(3, (16, 200)).astype(np.float32)
    errors = {
        method: ((weight_grid(weight, bits, 0, method).round_trip(weight) - weight) ** 2).sum(axis=1)
        for method in ("mse", "minmax")
    }
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert errors["mse"].sum() < errors["minmax"].sum()


def test_minmax_reaches_the_largest_weight_of_each_channel():
    weight = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
    for axis in (0, 1, -1):
        grid = weight_grid(weight, 8, axis, "minmax")
        top = np.abs(np.moveaxis(weight, axis, 0)).reshape(weight.shape[axis], -1).max(axis=1)
        np.testing.assert_allclose(grid.high, top, rtol=1e-6, atol=0)
    assert weight_grid(weight, 8, None, "minmax").high == pytest.approx(np.abs(weight).max(), rel=1e-6)


def test_a_channel_of_zeros_stays_zero():
    weight = np.zeros((2, 4), np.float32)
    weight[1] = [1, -2, 3, 4]
    grid = weight_grid(weight, 8, 0)
    assert not grid.round_trip(weight)[0].any()
    assert np.isfinite(np.float32(1) / grid.scale).all()
