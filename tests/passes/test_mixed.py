"""Which ops stay in float, by measured error and by (made up) times."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.errors import CalibrationError
from onnxcomp.metrics import sqnr
from onnxcomp.passes.mixed import Mixed
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_weight
from onnxcomp.recipe import parse_recipe
from onnxcomp.rewrite import Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu, reference_runner


def model() -> ir.Model:
    """Five layers; the third tells values apart that lie close together, which 8 bits cannot."""
    b = Builder()
    y = b.input("x", [1, 8, 12, 12])
    for index in range(5):
        weight = b.rng.normal(size=(8, 8, 1, 1)).astype(np.float32) / 3
        if index == 2:
            weight = np.zeros((8, 8, 1, 1), np.float32)
            weight[np.arange(8), np.arange(8)] = 1.0
            weight[:4] *= 40.0
            weight[np.arange(4), (np.arange(4) + 1) % 8] = -40.0
        y = b.op("Relu", b.op("Conv", y, b.const(weight), b.floats(8), name=f"conv{index}"), name=f"relu{index}")
    return b.output(y).model()


def feeds(first: int, count: int) -> list[dict[str, np.ndarray]]:
    randoms = [np.random.default_rng(i) for i in range(first, first + count)]
    return [{"x": r.normal(size=(1, 8, 12, 12)).astype(np.float32)} for r in randoms]


def run(graph, step, capabilities, timer=None):
    pipeline = Pipeline(passes=[step], capabilities=capabilities, runner=reference_runner, timer=timer)
    return pipeline.run(graph, feeds(0, 8))[-1]


def in_float(graph) -> list[str]:
    return [n.name for n in graph.graph if n.op_type == "Conv" and read_weight(n.inputs[1]) is None]


def fidelity(graph, outputs) -> float:
    data = feeds(100, 8)
    pairs = [(outputs(model(), f)[0], outputs(graph, f)[0]) for f in data]
    return sqnr(np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs]))


def test_float_where_int8_costs_most(capabilities, outputs):
    plain = model()
    run(plain, Quantize(), capabilities)
    wanted = fidelity(plain, outputs) + 3.0
    graph = model()
    report = run(graph, Mixed(min_sqnr=wanted), capabilities)
    assert "conv2" in in_float(graph)
    assert 1 <= len(in_float(graph)) <= 3, in_float(graph)
    assert fidelity(graph, outputs) > wanted - 1.0  # unseen data
    assert "alone it costs the outputs" in next(e.detail for e in report.edits if e.node == "conv2")
    assert report.edits[-1].detail.startswith(f"{5 - len(in_float(graph))} of 5 linear ops quantized; SQNR ")


def test_everything_quantized_if_that_is_good_enough(capabilities):
    graph = model()
    run(graph, Mixed(min_sqnr=5.0), capabilities)
    assert in_float(graph) == []


def test_what_cannot_be_reached_is_said(capabilities):
    """Inputs of an elementwise op that is not linear are rounded whatever stays in float; here nothing is left."""
    graph = model()
    report = run(graph, Mixed(min_sqnr=120.0), capabilities)
    assert len(in_float(graph)) == 5
    assert report.edits[-1].detail.startswith("0 of 5 linear ops quantized")


def times(graph: ir.Model, slow: str = "", conversion: float = 1.0) -> dict[str, float]:
    """Float 10 us a Conv; int8 4 us, or 11 us for `slow`; each conversion `conversion` us."""
    found = {}
    for node in graph.graph:
        if node.op_type == "Conv":
            integer = read_weight(node.inputs[1]) is not None
            found[node.name] = (11.0 if node.name == slow else 4.0) if integer else 10.0
    conversions = sum(n.op_type == "QuantizeLinear" for n in graph.graph)
    return {**found, "": sum(found.values()) + conversion * conversions}


def test_float_where_int8_is_no_faster(capabilities):
    graph = model()
    report = run(graph, Mixed(min_sqnr=1.0), capabilities, timer=lambda m, _: times(m, "conv0", conversion=0.0))
    assert in_float(graph) == ["conv0"]
    assert (
        next(e.detail for e in report.edits if e.node == "conv0") == "left in float: 10 us in float, 11 us on integers"
    )


def test_int8_all_the_same_if_converting_takes_what_was_gained(capabilities):
    def timer(graph, _):
        table = times(graph, "conv2", conversion=0.0)
        return {**table, "": table[""] + 5.0 * len(in_float(graph))}

    graph = model()
    run(graph, Mixed(min_sqnr=1.0), capabilities, timer=timer)
    assert in_float(graph) == []


def test_time_goes_before_fidelity(capabilities):
    graph = model()
    report = run(graph, Mixed(min_sqnr=100.0, max_time=0.6), capabilities, timer=lambda m, _: times(m, conversion=0.0))
    assert times(graph, conversion=0.0)[""] <= 0.6 * 50.0
    assert "short of 100 dB within max_time" in report.edits[-1].detail


def test_selector_and_second_application(capabilities):
    graph = model()
    run(graph, Mixed(min_sqnr=1.0, where=Select(skip=("conv1",))), capabilities)
    assert in_float(graph) == ["conv1"]
    before = [n.name for n in graph.graph]
    report = run(graph, Mixed(min_sqnr=1.0, where=Select(skip=("conv1",))), capabilities)
    assert [n.name for n in graph.graph] == before
    assert all(e.action == "refused" for e in report.edits)


def test_data_is_needed(capabilities):
    with pytest.raises(CalibrationError, match="--data"):
        Pipeline(passes=[Mixed()], capabilities=capabilities).run(model())


def test_settings_of_quantize_in_a_recipe():
    text = 'version = 1\n[[passes]]\npass = "mixed"\nmin_sqnr = 20.0\n[passes.quantize]\nweight_bits = 7\n'
    (step,) = parse_recipe(text).passes
    assert isinstance(step, Mixed)
    assert step.quantize.weight_bits == 7


@pytest.mark.parametrize("op", ["Conv", "Gemm"])
def test_onnxruntime_leaves_float_ops_between_int8_ops_alone(op, capabilities, tmp_path):
    """It would round their weights to int8 per tensor by itself."""
    b = Builder()
    if op == "Conv":
        y, shape = b.input("x", [1, 4, 6, 6]), (1, 4, 6, 6)
        for index in range(3):
            weight = b.const((b.rng.normal(size=(4, 4, 1, 1)) * 10.0 ** -np.arange(4).reshape(4, 1, 1, 1)).astype("f4"))
            y = b.op("Relu", b.op("Conv", y, weight, b.floats(4), name=f"layer{index}"))
    else:
        y, shape = b.input("x", [6, 4]), (6, 4)
        for index in range(3):
            y = b.op("Relu", b.op("Gemm", y, b.floats(4, 4), b.floats(4), name=f"layer{index}"))
    graph = b.output(y).model()
    data = [{"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)}]
    pipeline = Pipeline(
        passes=[Quantize(where=Select(skip=("layer1",)))], capabilities=capabilities, runner=reference_runner
    )
    pipeline.run(graph, data)
    rows = {r.node: r for r in OrtCpu().compile(graph, tmp_path / "artifact").audit.rows}
    assert [rows[f"layer{i}"].integer for i in range(3)] == [True, False, True]
