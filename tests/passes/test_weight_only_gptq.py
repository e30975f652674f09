"""GPTQ for matrices in blocks: outputs on held-out data in onnxruntime, the grid it keeps to, and what it needs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.blockwise import quantize_blocks
from onnxcomp.edit import constant
from onnxcomp.errors import CalibrationError
from onnxcomp.passes._block_rounding import InputMoments, Rounder, round_blocks
from onnxcomp.passes._gram import Gram
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

EXACT = {"accuracy_level": 0, "min_weights": 0}
MIXING = np.random.default_rng(11).normal(size=(12, 96)) * np.random.default_rng(12).uniform(0.2, 3, 96)
ROUNDER = Rounder(damp=0.01, act_order=True, positions=1000, memory=1 << 30)


def feeds(count: int = 8, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Samples of 40 rows whose 96 channels depend on each other and differ in size."""
    random = np.random.default_rng(seed)
    noise = 0.1 * random.normal(size=(count, 1, 40, 96))
    return [{"x": x.astype(np.float32)} for x in random.normal(size=(count, 1, 40, 12)) @ MIXING + noise]


def layer(b, columns: int = 96) -> ir.Model:
    return b.output(b.op("MatMul", b.input("x", [1, "t", columns]), b.floats(columns, 24), name="layer")).model()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_output_error_on_other_data(form, act_order, symmetric, b, run_passes):
    model, test = layer(b), feeds(seed=1)
    unoptimized = lambda m, f: reference_runner(m, [m.graph.outputs[0].name], optimize=False)(f)  # noqa: E731
    expected = [unoptimized(model, feed) for feed in test]
    errors = {}
    for method in ("rtn", "mse", "gptq"):
        copy = model.clone()
        config = {"method": method, "form": form, "act_order": act_order, "symmetric": symmetric}
        run_passes(copy, WeightOnly(**config, **EXACT), data=feeds())
        found = [unoptimized(copy, feed) for feed in test]
        errors[method] = np.mean(
            [relative(f["layer_out"], e["layer_out"]) for f, e in zip(found, expected, strict=True)]
        )
    assert errors["gptq"] < 0.6 * min(errors["mse"], errors["rtn"])


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest():
    """So the grid is that of each block of columns as they stand, though they are rounded in another order."""
    weight = np.random.default_rng(0).normal(size=(7, 80)).astype(np.float32)
    sizes = np.random.default_rng(1).uniform(0.1, 4.0, 80)
    gram = Gram(None, None, errors=False, positions=1000)
    gram.update(np.repeat(np.diag(sizes)[None], 4, axis=0))
    found, ratio = round_blocks(weight, 4, 32, InputMoments([gram]), ROUNDER, symmetric=False)
    importance = sizes**2 / (sizes**2).mean()
    plain = quantize_blocks(weight, 4, 32, symmetric=False, method="mse", importance=importance.astype(np.float32))
    np.testing.assert_array_equal(found.codes, plain.codes)
    np.testing.assert_allclose(found.scale, plain.scale, rtol=1e-6)
    assert ratio == pytest.approx(1.0)


def test_scales_are_those_of_least_weighted_error():
    """No multiple of a scale serves the columns better, counted by the size of their inputs."""
    weight = np.random.default_rng(0).normal(size=(9, 64)).astype(np.float32)
    importance = np.random.default_rng(1).uniform(0.01, 5.0, 64).astype(np.float32)

    def error(blocks) -> np.ndarray:
        return ((blocks.dequantize() - weight) ** 2 * importance).sum(axis=1)

    counted = quantize_blocks(weight, 4, 32, symmetric=False, method="mse", importance=importance)
    alike = quantize_blocks(weight, 4, 32, symmetric=False, method="mse")
    assert error(counted).sum() < 0.98 * error(alike).sum()
    integers = counted.integers().reshape(9, 2, 32) - counted.zero_point[..., None].astype(np.float32)
    products, squares = (
        (a * integers * importance.reshape(2, 32)).sum(-1) for a in (weight.reshape(9, 2, 32), integers)
    )
    best = np.abs(counted.scale / (products / squares) - 1)
    assert np.median(best) < 0.02


def test_report_says_what_it_brought(b, run_passes):
    report = run_passes(layer(b), WeightOnly(method="gptq", **EXACT), data=feeds())
    (edit,) = report.edits
    ratio = float(edit.detail.split("held-out output error x ")[1].split(";")[0])
    assert 0.0 < ratio < 0.6


def tied(b) -> ir.Model:
    table = b.floats(50, 64)
    rows = b.op("Gather", table, b.input("ids", [1, "t"], TensorProto.INT64), name="embed")
    x = b.op("MatMul", rows, b.floats(64, 64), name="inner")
    x = b.op("Reshape", b.op("Tanh", x), b.const(np.array([-1, 64])))
    return b.output(rows).output(b.op("Gemm", x, table, name="head", transB=1)).model()


IDS = [{"ids": np.random.default_rng(i).integers(0, 50, (1, 30))} for i in range(6)]


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_a_tied_table_stays_tied(form, b, run_passes, outputs):
    model = tied(b)
    table = constant(model.graph.initializers["c0"])
    report = run_passes(model, WeightOnly(method="gptq", form=form, **EXACT), data=IDS)
    done = {e.node: e.detail for e in report.edits if e.action == "applied" and e.op_type != "model"}
    assert set(done) == {"embed", "inner", "head"}
    assert all("gptq" in detail for detail in done.values())
    sizes = [v.const_value.size for v in model.graph.initializers.values() if v.const_value.size >= 1500]
    assert len(sizes) == 2
    rows, _ = outputs(model, IDS[0])
    assert relative(rows, table[IDS[0]["ids"]]) < 0.2


def test_without_data(b, run_passes):
    model = layer(b)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(CalibrationError, match="needs calibration data; give some with --data"):
        run_passes(model, WeightOnly(method="gptq", **EXACT))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_one_sample_is_too_few(b, run_passes):
    with pytest.raises(CalibrationError, match="two samples"):
        run_passes(layer(b), WeightOnly(method="gptq", **EXACT), data=feeds(1))


def test_nothing_to_do_needs_no_data(b, run_passes):
    model = b.output(b.op("Relu", b.input("x", [1, 4]))).model()
    assert not run_passes(model, WeightOnly(method="gptq")).edits


def test_moments_beyond_memory_take_more_runs_or_are_done_without(b, capabilities):
    """Three inputs of 250 columns take 1 MB each; one of 300 does not fit into 1 MiB."""
    x = b.input("x", [1, "t", 250])
    for i in range(3):
        x = b.op("MatMul", x, b.floats(250, 250), name=f"small{i}")
    model = b.output(b.op("MatMul", b.op("MatMul", x, b.floats(250, 300), name="wide"), b.floats(300, 9), name="large"))
    model = model.model()
    data = [{"x": f["x"][..., :1].repeat(250, axis=-1) + f["x"].mean()} for f in feeds(4)]
    runs: list[Counter] = []

    def counted(probe, names):
        runs.append(Counter(node.op_type for node in probe.graph))
        return reference_runner(probe, names)

    step = WeightOnly(method="gptq", memory_mb=1, **EXACT)
    (report,) = Pipeline(passes=[step], capabilities=capabilities, runner=counted).run(model, data)
    details = {e.node: e.detail for e in report.edits}
    assert "mse since second moments of its inputs take 1 MiB; raise memory_mb" in details["large"]
    assert all("gptq" in details[name] for name in ("small0", "small1", "small2", "wide"))
    # The first input is one of the model, for which nothing has to run; the last matrix needs no data.
    assert [run["MatMulNBits"] for run in runs] == [2, 3, 4], "later runs see what was quantized before"


def test_a_weight_in_a_branch_is_done_without(run_passes):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 2] x, bool c) => (float[2, 3] y) {
            y = If (c) <
                then_branch = t () => (float[2, 3] p) <float[2, 3] w = {1,2,3,4,5,6}> { p = MatMul(x, w) },
                else_branch = e () => (float[2, 3] q) { q = Constant<value = float[2, 3] {6,5,4,3,2,1}>() }>
        }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    (edit,) = run_passes(model, WeightOnly(method="gptq", **EXACT)).edits
    assert "mse since no product in the main graph reads it" in edit.detail


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_contract(form, b, capabilities):
    step = WeightOnly(method="gptq", form=form, min_weights=0)
    edits = check_pass(step, layer(b), capabilities=capabilities, runner=reference_runner, data=feeds())
    assert edits[-1].action == "applied"


def test_contract_of_a_tied_table(b, capabilities):
    step = WeightOnly(method="gptq", min_weights=0)
    edits = check_pass(step, tied(b), capabilities=capabilities, runner=reference_runner, data=IDS)
    assert [e.action for e in edits] == ["applied"] * 3
