"""Refitting weights to quantized inputs: against least squares, and what it gains on unseen data."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.passes._integers import Problem
from onnxcomp.passes.gptq import Gptq
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.reconstruct import Reconstruct, refit
from onnxcomp.qdq import read_weight
from onnxcomp.quant import activation_grid
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass


def rows(count: int, columns: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Inputs that depend on each other, and what a coarse quantizer makes of them."""
    rng = np.random.default_rng(2)
    mix = np.random.default_rng(3).normal(size=(4, columns))
    x = rng.normal(size=(count, 4)) @ mix + 0.1 * rng.normal(size=(count, columns))
    grid = activation_grid(float(x.min()), float(x.max()), 3)
    return x, grid.round_trip(x).astype(np.float64)


def moments(x: np.ndarray, quantized: np.ndarray) -> np.ndarray:
    both = np.concatenate([quantized, x - quantized], axis=1)
    return both.T @ both / len(x)


def test_refit_is_ridge_regression():
    x, quantized = rows(200)
    weight = np.random.default_rng(0).normal(size=(5, 12))
    gram = moments(x, quantized)
    change = refit(weight[None], gram[None, :12, :12], gram[None, 12:, :12], 0.3)[0]
    ridge = 0.3 * np.diagonal(gram)[:12].mean()
    # The same as least squares with a row for every weight that should not change.
    known = np.concatenate([quantized / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(12)])
    wanted = np.concatenate([(x - quantized) @ weight.T / np.sqrt(len(x)), np.zeros((12, 5))])
    np.testing.assert_allclose(change, np.linalg.lstsq(known, wanted, rcond=None)[0].T, rtol=1e-8, atol=1e-10)
    before = np.square(x @ weight.T - quantized @ weight.T).mean()
    assert np.square(x @ weight.T - quantized @ (weight + change).T).mean() < 0.8 * before


def layer(count: int) -> tuple[Problem, np.ndarray, np.ndarray]:
    """A problem with as many rows to fit as given, and rows that are held out with what the quantizer made of them."""
    x, quantized = rows(count + 300)
    weight = np.random.default_rng(0).normal(size=(1, 5, 12))
    gram, judge = (moments(x[s], quantized[s])[None] for s in (slice(count), slice(count, None)))
    problem = Problem(weight=weight, scale=np.full((1, 5, 1), 0.2), top=7, gram=gram, judge=judge)
    return problem, x[count:], quantized[count:]


def test_error_is_that_of_the_outputs():
    problem, x, quantized = layer(100)
    values = problem.nearest(problem.weight) * 0.2
    expected = np.square(x @ problem.weight[0].T - quantized @ values[0].T).mean(axis=0)
    np.testing.assert_allclose(problem.held_out_errors(values)[0], expected, rtol=1e-8)


def test_rounding_to_nearest():
    problem, _, _ = layer(200)
    found = Reconstruct(rounding="nearest", ridge=0.1)._solve(problem)
    change = refit(problem.weight, problem.gram[:, :12, :12], problem.gram[:, 12:, :12], 0.1)
    np.testing.assert_array_equal(found, np.clip(np.rint((problem.weight + change) / 0.2), -7, 7))
    by_gptq = Reconstruct(rounding="gptq", ridge=0.1)._solve(problem)
    nearest_error, gptq_error = (problem.held_out_errors(i * 0.2).sum() for i in (found, by_gptq))
    assert gptq_error < nearest_error


def linear(kind: str) -> ir.Model:
    b = Builder()
    if kind == "conv":
        y = b.op("Conv", b.input("x", [1, 8, 9, 9]), b.floats(6, 8, 3, 3), b.floats(6), name="linear")
    elif kind == "depthwise":
        y = b.op("Conv", b.input("x", [1, 8, 9, 9]), b.floats(8, 1, 3, 3), b.floats(8), name="linear", group=8)
    elif kind == "gemm":
        y = b.op("Gemm", b.input("x", [64, 8]), b.floats(6, 8), b.floats(6), name="linear", transB=1)
    else:
        y = b.op("MatMul", b.input("x", [2, 32, 8]), b.floats(8, 6), name="linear")
        y = b.op("Add", y, b.floats(6)) if kind == "matmul and add" else y
    return b.output(y).model()


def feeds(model: ir.Model, count: int) -> list[dict[str, np.ndarray]]:
    """Eight channels that follow three, so that they tell of each other's rounding errors."""
    rng = np.random.default_rng(0)
    mix = np.random.default_rng(1).normal(size=(3, 8))
    value = model.graph.inputs[0]
    assert value.shape is not None
    shape = tuple(value.shape.numpy())
    axis = 1 if len(shape) == 4 else len(shape) - 1
    found = []
    for _ in range(count):
        x = rng.normal(0.5, 1.0, [n for i, n in enumerate(shape) if i != axis] + [3]) @ mix
        x = np.moveaxis(x, -1, axis)
        if len(shape) == 4:  # smooth pictures, whose neighbours tell of each other
            x = np.mean([np.roll(x, (i, j), axis=(2, 3)) for i in range(5) for j in range(5)], axis=0) * 3
        found.append({"x": x.astype(np.float32)})
    return found


def values(model: ir.Model, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    name = model.graph.outputs[0].name
    run = reference_runner(model, [name])
    return np.stack([run(f)[name] for f in data])


@pytest.mark.parametrize("kind", ["conv", "depthwise", "gemm", "matmul and add", "matmul"])
def test_makes_up_for_coarse_inputs(kind, run_passes):
    found = {}
    for name, steps in (("plain", []), ("gptq", [Gptq()]), ("reconstruct", [Reconstruct()])):
        model = linear(kind)
        data = feeds(model, 24)
        report = run_passes(model, Quantize(activation_bits=4, weight_bits=6), *steps, data=data[:16])
        found[name] = float(np.square(values(model, data[16:]) - values(linear(kind), data[16:])).mean())
        assert all(e.action == "applied" for e in report.edits)
    assert found["reconstruct"] < 0.97 * min(found["plain"], found["gptq"])


def test_contract_and_what_another_pass_chose(run_passes, capabilities):
    model = linear("gemm")
    data = feeds(model, 8)
    run_passes(model, Quantize(activation_bits=4), data=data)
    edits = check_pass(Reconstruct(), model, runner=reference_runner, capabilities=capabilities, data=data)
    assert [e.action for e in edits] == ["applied"]
    report = run_passes(model, Gptq(), Reconstruct(), data=data)
    assert [e.detail for e in report.edits] == ["gptq chose its integers already"]


def test_mean_of_the_rounding_error_goes_into_the_bias(run_passes, outputs):
    """Inputs all of which are rounded up."""
    model = linear("gemm")
    x = np.random.default_rng(0).choice([0.0, 0.4, 1.4, 2.4, 15.0], (64, 8)).astype(np.float32)
    data = [{"x": x}] * 8
    run_passes(model, Quantize(activation_bits=4, range="minmax"), Reconstruct(ridge=1e6), data=data)
    error = outputs(model, data[0])[0] - outputs(linear("gemm"), data[0])[0]
    assert np.abs(error.mean(axis=0)).max() < 0.05 * error.std()
    assert read_weight(next(n for n in model.graph if n.name == "linear").inputs[1]) is not None
