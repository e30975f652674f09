"""What is left as it is and why, what judges the integers, and how the work is cut."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp.errors import CalibrationError
from onnxcomp.model import load, save
from onnxcomp.passes._integers import Search, choose_integers, round_rows
from onnxcomp.passes.gptq import Gptq
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import read_weight
from onnxcomp.rewrite import Context, Edit, Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner


def layers(count: int = 3) -> ir.Model:
    """Square MatMuls with biases and ReLUs between, named `layer0` and so on."""
    b = Builder()
    y = b.input("x", ["n", 8, 16])
    for i in range(count):
        y = b.op("Add", b.op("MatMul", b.op("Relu", y), b.floats(16, 16), name=f"layer{i}"), b.floats(16))
    return b.output(y).model()


def data(count: int = 8) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(16, 16)) / 4
    return [{"x": (rng.normal(1.0, 1.0, (2, 8, 16)) @ mix).astype(np.float32)} for _ in range(count)]


def integers(model: ir.Model) -> dict[str, np.ndarray]:
    found = {n.name or "": read_weight(n.inputs[1]) for n in model.graph if n.op_type == "MatMul"}
    return {name: stored[0] for name, stored in found.items() if stored is not None}


@pytest.fixture
def quantized(run_passes):
    model = layers()
    run_passes(model, Quantize(weight_bits=4), data=data())
    return model


def by_gptq(problem):
    return round_rows(problem, problem.weight, problem.gram, damp=0.01, act_order=True)


SEARCH = Search(name="probe", solve=by_gptq, errors=False, positions=64, memory=1 << 20, sequential=False)


def choose(model: ir.Model, search: Search, capabilities) -> tuple[list[Edit], int]:
    """Edits, and the number of runs over the data."""
    runs = 0

    def sweep(on, observers):
        nonlocal runs
        runs += 1
        names = list(observers)
        run = reference_runner(on, names)
        for feed in data():
            for name, value in run(feed).items():
                observers[name].update(value)

    context = Context(capabilities=capabilities, sweep=sweep)
    return choose_integers(model, context, Select(), search), runs


def test_float_model_is_refused(run_passes):
    report = run_passes(layers(), Gptq(), data=data())
    assert {e.detail for e in report.edits} == {"its second input is no quantized weight; gptq goes after quantize"}
    assert len(report.edits) == 3


def test_float_weights_are_not_in_a_file(quantized, run_passes, tmp_path):
    save(quantized, tmp_path / "q.onnx")
    model = load(tmp_path / "q.onnx")
    report = run_passes(model, Gptq(), data=data())
    assert [e.action for e in report.edits] == ["refused"] * 3
    assert all("quantize and gptq go into one recipe" in e.detail for e in report.edits)


def test_subgraph_and_shared_weight(branching_example, run_passes):
    model, feed = branching_example
    run_passes(model, Quantize(), data=[feed] * 4)
    reasons = {e.node: e.detail for e in run_passes(model, Gptq(), data=[feed] * 4).edits}
    assert sum("subgraph" in r for r in reasons.values()) == 1
    first, second = (n for n in model.graph if n.op_type == "MatMul")
    second.replace_input_with(1, first.inputs[1])
    for n in (first, second):
        n.metadata_props.clear()
    report = run_passes(model, Gptq(), data=[feed] * 4)
    assert sum(e.detail == "its weight is shared with another op" for e in report.edits) == 2


def test_weight_that_was_turned_since(quantized, run_passes):
    matmul = next(n for n in quantized.graph if n.op_type == "MatMul")
    matmul.inputs[1].producer().attributes["axis"] = ir.AttrInt64("axis", 0)
    report = run_passes(quantized, Gptq(), data=data())
    assert [e.detail for e in report.edits if e.node == "layer0"] == [
        "its weight was rearranged after it was quantized"
    ]


def test_no_data_and_little_data(quantized, capabilities, run_passes):
    with pytest.raises(CalibrationError, match=r"pass 'gptq'.*--data"):
        Pipeline(passes=[Gptq()], capabilities=capabilities).run(quantized)
    one = [{"x": data()[0]["x"][:1]}]
    report = run_passes(quantized, Gptq(), data=one)
    assert {e.action for e in report.edits} == {"refused"}
    assert all("one sample" in e.detail for e in report.edits)


def test_too_little_memory_for_a_layer(quantized, capabilities):
    edits, runs = choose(quantized, dataclasses.replace(SEARCH, memory=4095), capabilities)
    assert runs == 0
    assert all("raise memory_mb" in e.detail for e in edits)


def test_zero_weight(run_passes):
    b = Builder()
    y = b.op("Gemm", b.input("x", [16, 16]), b.const(np.zeros((16, 4), np.float32)), name="dead")
    model = b.output(y).model()
    feeds = [{"x": np.ones((16, 16), np.float32)}]
    run_passes(model, Quantize(output_aware=False), data=feeds)
    assert [e.detail for e in run_passes(model, Gptq(), data=feeds).edits] == ["all its integers are zero"]


def test_integers_that_are_no_better_are_not_taken(quantized, capabilities):
    before = integers(quantized)
    search = dataclasses.replace(SEARCH, solve=lambda problem: np.zeros_like(problem.weight))
    edits, _ = choose(quantized, search, capabilities)
    assert {e.detail for e in edits} == {"no other integers lower the held-out output error; the old ones stay"}
    for name, array in integers(quantized).items():
        np.testing.assert_array_equal(array, before[name])


def test_channels_are_judged_apart(quantized, capabilities):
    before, whole = integers(quantized), quantized.clone()
    choose(whole, SEARCH, capabilities)

    def half(problem):
        found = by_gptq(problem)
        found[:, ::2] = 0
        return found

    edits, _ = choose(quantized, dataclasses.replace(SEARCH, solve=half), capabilities)
    after, expected = integers(quantized), integers(whole)
    assert "of 16 channels" in edits[0].detail
    np.testing.assert_array_equal(after["layer0"][:, ::2], before["layer0"][:, ::2])
    np.testing.assert_array_equal(after["layer0"][:, 1::2], expected["layer0"][:, 1::2])
    assert not np.array_equal(after["layer0"], before["layer0"])


def test_little_memory_takes_more_runs_to_the_same_result(quantized, capabilities):
    found = []
    for memory, expected in ((1 << 20, 1), (3 * 4096 - 1, 2), (4096, 3)):
        model = quantized.clone()
        edits, runs = choose(model, dataclasses.replace(SEARCH, memory=memory), capabilities)
        assert runs == expected
        found.append((edits, integers(model)))
    for edits, arrays in found[1:]:
        assert edits == found[0][0]
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, found[0][1][name])


def test_sequential_is_one_layer_after_the_other(quantized, run_passes):
    apart, at_once, sequential = quantized.clone(), quantized.clone(), quantized.clone()
    for i in range(3):
        run_passes(apart, Gptq(where=Select(name=(f"layer{i}",))), data=data())
    run_passes(at_once, Gptq(), data=data())
    run_passes(sequential, Gptq(sequential=True), data=data())
    for name, array in integers(sequential).items():
        np.testing.assert_array_equal(array, integers(apart)[name])
    assert not np.array_equal(integers(sequential)["layer2"], integers(at_once)["layer2"])


def test_activations_may_be_float(quantized, run_passes):
    """Only the weight is dequantized; the input is observed as it is."""
    matmul = next(n for n in quantized.graph if n.name == "layer0")
    matmul.replace_input_with(0, matmul.inputs[0].producer().inputs[0].producer().inputs[0])
    report = run_passes(quantized, Gptq(), data=data())
    assert [e.action for e in report.edits if e.node == "layer0"] == ["applied"]
