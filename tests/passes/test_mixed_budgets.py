"""Limits on class decisions, time and size, and times that cannot be trusted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.model import model_size
from onnxcomp.passes._sensitivity import Trials
from onnxcomp.passes._timings import Timer, Timing
from onnxcomp.passes.mixed import Mixed
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_weight
from onnxcomp.recipe import parse_recipe
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import reference_runner

SAMPLES = np.random.default_rng(5).normal(size=(32, 64)).astype(np.float32)
LAYERS = 4


def model() -> ir.Model:
    """A classifier of four layers; in the input of the third, one channel is large and of little weight."""
    b = Builder()
    y = b.input("x", ["N", 64])
    for index in range(LAYERS):
        weight = (b.rng.normal(size=(64, 64 if index < LAYERS - 1 else 10)) / 8).astype(np.float32)
        if index == 1:
            weight[:, 0] *= 300.0
        if index == 2:
            weight[0] /= 300.0
        y = b.op("MatMul", y, b.const(weight), name=f"layer{index}")
        y = b.op("Add", y, b.floats(weight.shape[1]), name=f"bias{index}")
    return b.output(y).model()


def run(graph, step, capabilities, timer=None):
    pipeline = Pipeline(passes=[step], capabilities=capabilities, runner=reference_runner, timer=timer)
    return pipeline.run(graph, [{"x": x[None]} for x in SAMPLES])[-1]


def in_float(graph) -> list[str]:
    return [n.name for n in graph.graph if n.op_type == "MatMul" and read_weight(n.inputs[1]) is None]


def in_four_bits(graph) -> int:
    return sum(n.op_type == "MatMulNBits" for n in graph.graph)


def flips(graph, outputs) -> float:
    want, got = (np.concatenate([outputs(m, {"x": x[None]})[0] for x in SAMPLES]) for m in (model(), graph))
    return float((want.argmax(axis=1) != got.argmax(axis=1)).mean())


def test_layers_in_float_until_no_decision_changes(capabilities, outputs):
    plain = model()
    run(plain, Quantize(), capabilities)
    assert flips(plain, outputs) > 0.0
    graph = model()
    report = run(graph, Mixed(max_drop=0.0, samples=32), capabilities)
    assert flips(graph, outputs) == 0.0
    assert 1 <= len(in_float(graph)) < LAYERS
    assert "layer2" in in_float(graph)
    assert "largest element moved in 0.0% on 32 calibration feeds" in report.edits[-1].detail


def test_a_second_application_leaves_float_ops_alone(capabilities):
    graph = model()
    run(graph, Mixed(min_sqnr=30.0), capabilities)
    floats = in_float(graph)
    assert 1 <= len(floats) < LAYERS
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    report = run(graph, Mixed(min_sqnr=1.0), capabilities)
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before
    assert all(e.action == "refused" for e in report.edits)
    assert {e.node for e in report.edits if e.detail == "an earlier run of mixed left it in float"} == set(floats)


def test_weights_of_four_bits_where_eight_are_too_large(capabilities, outputs):
    plain, graph = model(), model()
    run(plain, Quantize(), capabilities)
    before = model_size(model()).weight_bytes
    share = model_size(plain).weight_bytes / before
    report = run(graph, Mixed(min_sqnr=1.0, max_size=share - 0.03), capabilities)
    assert model_size(graph).weight_bytes <= (share - 0.03) * before
    assert 1 <= in_four_bits(graph) < LAYERS
    assert "to 4-bit weights" in report.edits[-1].detail
    assert flips(graph, outputs) < 0.8


def test_size_in_bytes_goes_before_fidelity(capabilities):
    plain, graph = model(), model()
    run(plain, Quantize(), capabilities)
    limit = model_size(plain).weight_bytes + 100
    report = run(graph, Mixed(min_sqnr=100.0, max_size=float(limit)), capabilities)
    assert model_size(graph).weight_bytes <= limit
    assert in_float(graph) == []
    assert "short of 100 dB within max_size" in report.edits[-1].detail


def test_a_size_out_of_reach_is_said(capabilities):
    graph = model()
    report = run(graph, Mixed(min_sqnr=1.0, max_size=0.01), capabilities)
    assert in_four_bits(graph) == LAYERS - 1  # the last has fewer weights than are worth it
    left = model_size(graph).weight_bytes
    assert f"max_size cannot be held: {left} bytes of weights are left" in report.edits[-1].detail


def test_no_four_bits_without_a_kernel(capabilities):
    graph = model()
    report = run(graph, Mixed(min_sqnr=1.0, max_size=0.01), replace(capabilities, contrib_ops=frozenset()))
    assert in_four_bits(graph) == 0
    assert "the target has no kernel for 4-bit weights" in report.edits[-1].detail


def noisy_timer(noise: float):
    """Integers take 11 us instead of 10 in the first layer, 4 in the others; `noise` is the deviation."""
    random = np.random.default_rng(0)

    def timer(graph, _):
        table = {}
        for node in graph.graph:
            if node.op_type == "MatMul":
                integer = read_weight(node.inputs[1]) is not None
                base = (11.0 if node.name == "layer0" else 4.0) if integer else 10.0
                table[node.name] = base + noise * float(random.exponential())
        return {**table, "": sum(table.values())}

    return timer


def test_noisy_times_decide_nothing(capabilities):
    graph = model()
    report = run(graph, Mixed(min_sqnr=1.0), capabilities, timer=noisy_timer(0.0))
    assert in_float(graph) == ["layer0"]
    assert "noisy" not in report.edits[-1].detail
    graph = model()
    report = run(graph, Mixed(min_sqnr=1.0), capabilities, timer=noisy_timer(40.0))
    assert in_float(graph) == []
    assert "too noisy to tell" in report.edits[-1].detail


def test_time_budget_is_held_beyond_the_noise(capabilities):
    graph = model()
    run(graph, Mixed(min_sqnr=100.0, max_time=0.8), capabilities, timer=noisy_timer(0.2))
    # Integers in all four would take 23 of 40 us, each layer but the first in float 6 us more.
    assert len(in_float(graph)) <= 2


def test_timer_stops_when_the_answer_is_clear_and_when_time_is_up():
    graph, asked = model(), []

    def measure(values):
        def timer(m, _):
            asked.append(m)
            return {"": values(m, len(asked))}

        return timer

    one, other = graph, model()
    timer = Timer(measure=measure(lambda m, _: 1.0 if m is one else 2.0), sample={})
    assert timer(one, other) == [{"": Timing(median=1.0, spread=0.0)}, {"": Timing(median=2.0, spread=0.0)}]
    assert len(asked) == 6
    asked.clear()
    seconds = iter(range(0, 1000, 20))
    Timer(measure=measure(lambda _, n: float(n % 5)), sample={}, clock=lambda: next(seconds))(one, other)
    assert 6 <= len(asked) < 14
    assert Timer(measure=None, sample=None)(one, other) == [{}, {}]


def test_class_decisions_are_counted_by_position(capabilities):
    b = Builder()
    y = b.op("MatMul", b.input("x", [1, 6, 8]), b.floats(8, 8), name="last")
    graph = b.output(y).model()
    pipeline = Pipeline(passes=[], capabilities=capabilities, runner=reference_runner)
    data = [{"x": np.random.default_rng(0).normal(size=(1, 6, 8)).astype(np.float32)}]
    trials = Trials(model=graph, context=pipeline.context(data), step=Quantize(weight_bits=2), samples=1)
    _, moved = trials.difference(trials.only(["last"]))
    assert moved in [pytest.approx(i / 6) for i in range(1, 7)]


def test_keys_of_a_recipe():
    (step,) = parse_recipe('version = 1\n[[passes]]\npass = "mixed"\nmax_drop = 0.01\nmax_size = 0.2\n').passes
    assert (step.max_drop, step.max_size, step.min_sqnr) == (0.01, 0.2, None)
