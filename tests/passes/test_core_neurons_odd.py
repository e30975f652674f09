"""CoreInfer's graphs of models that are put together oddly, what is refused, and the clusters of prompts."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from blocks import HIDDEN, WIDTH, feeds, weight
from builder import Builder
from pydantic import TypeAdapter

from onnxcomp.errors import CalibrationError, PassError
from onnxcomp.passes._core_clusters import k_means
from onnxcomp.passes.core_neurons import CoreNeurons
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

FEED = feeds(1)[0]
STAGES = ("prefill", "gather", "decode")


def edits(report, action: str) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == action}


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return reference_runner(model, [v.name for v in model.graph.outputs])(feed)


def two_blocks(b: Builder, weights: list[list[str]]) -> ir.Model:
    y = b.input("x", [1, 12, WIDTH])
    for n, (gate, up, down) in enumerate(weights):
        a = b.op("MatMul", y, gate, name=f"gate{n}")
        a = b.op("Mul", a, b.op("Sigmoid", a, name=f"sigmoid{n}"), name=f"act{n}")
        h = b.op("Mul", a, b.op("MatMul", y, up, name=f"up{n}"), name=f"h{n}")
        y = b.op("MatMul", h, down, name=f"down{n}")
    return b.output(y).model(opset=18)


def one_weight(b: Builder) -> list[str]:
    return [weight(b, WIDTH, HIDDEN), weight(b, WIDTH, HIDDEN), weight(b, HIDDEN, WIDTH)]


def all_stages(model: ir.Model, run_passes, **keys) -> tuple[dict[str, ir.Model], dict[str, np.ndarray]]:
    """The three graphs, and what they say one after the other."""
    graphs, values = {}, dict(FEED)
    for stage in STAGES:
        graphs[stage] = model.clone()
        report = run_passes(graphs[stage], CoreNeurons(stage=stage, skip_layers=0, **keys))
        assert edits(report, "applied")
        names = {v.name for v in graphs[stage].graph.inputs}
        values |= run(graphs[stage], {k: v for k, v in values.items() if k in names})
    return graphs, values


@pytest.mark.parametrize("storage", ["float", "int8"])
def test_shared_weights_are_stored_once(storage, b, run_passes):
    shared = one_weight(b)
    model = two_blocks(b, [shared, shared])
    graphs, values = all_stages(model, run_passes, keep=1.0, weights=storage)
    large = [v for v in graphs["gather"].graph.initializers.values() if v.const_value.size >= WIDTH * HIDDEN]
    assert len(large) == 3
    want, found = run(model, FEED)["down1_out"], values["down1_out"]
    assert np.linalg.norm(found - want) < (0.05 if storage == "int8" else 1e-6) * np.linalg.norm(want)


def test_layers_choose_alone(b, run_passes):
    _, values = all_stages(two_blocks(b, [one_weight(b), one_weight(b)]), run_passes, keep=0.25)
    assert values["core_index.0"].shape == values["core_index.1"].shape == (12,)
    assert (values["core_index.0"] != values["core_index.1"]).any()


def test_no_types(b, run_passes):
    model = two_blocks(b, [one_weight(b)])
    want = run(model, FEED)["down0_out"]
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape, value.type = None, None
    _, values = all_stages(model, run_passes, keep=1.0)
    np.testing.assert_allclose(values["down0_out"], want, rtol=0, atol=1e-6 * np.abs(want).max())


def test_several_samples_choose_together(b, run_passes):
    """The axes before the last one are all tokens."""
    model = two_blocks(b, [one_weight(b)])
    model.graph.inputs[0].shape = ir.Shape(["N", "T", WIDTH])
    run_passes(model, CoreNeurons(skip_layers=0))
    x = np.concatenate([feed["x"] for feed in feeds(3)])
    together, flat = run(model, {"x": x}), run(model, {"x": x.reshape(1, -1, WIDTH)})
    for name in ("core_count.0", "core_index.0"):
        np.testing.assert_array_equal(together[name], flat[name])


def test_magnitudes(b, run_passes):
    model = two_blocks(b, [one_weight(b)])
    hidden = np.abs(reference_runner(model, ["h0_out"])(FEED)["h0_out"][0])
    run_passes(model, CoreNeurons(skip_layers=0, token_share=0.25))
    least = np.sort(hidden, axis=1)[:, -12:].min(axis=1, keepdims=True)
    np.testing.assert_array_equal(run(model, FEED)["core_count.0"], (hidden >= least).sum(axis=0))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("place", "reason"),
    [("h0", "read outside"), ("up0", "read outside"), ("reshape", "may hold"), ("factor", "for each neuron")],
)
def test_refusals(place, reason, stage, b, run_passes):
    """The same in every stage, so that the graphs fit together."""
    y = b.input("x", [1, 12, WIDTH])
    gate, up, down = one_weight(b)
    a = b.op("Relu", b.op("MatMul", y, gate, name="gate0"))
    if place == "factor":
        a = b.op("Mul", a, b.floats(HIDDEN))
    h = b.op("Mul", a, b.op("MatMul", y, up, name="up0"), name="h0")
    if place == "reshape":
        h = b.op("Reshape", h, b.const(np.array([12, HIDDEN])))
    model = b.output(b.op("MatMul", h, down, name="down0")).model(opset=18)
    if place in ("h0", "up0"):
        value = model.graph.node(place).outputs[0]
        value.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.outputs.append(value)
    before = ir.to_onnx_text(model)
    report = run_passes(model, CoreNeurons(stage=stage, skip_layers=0))
    assert reason in edits(report, "refused")["down0"]
    assert not edits(report, "applied")
    assert ir.to_onnx_text(model) == before


@pytest.mark.parametrize("stage", STAGES)
def test_second_application_changes_nothing(stage, b, run_passes):
    model = two_blocks(b, [one_weight(b) for _ in range(3)])
    assert set(edits(run_passes(model, CoreNeurons(stage=stage, skip_layers=1)), "applied")) == {"down1", "down2"}
    once = ir.to_onnx_text(model)
    report = run_passes(model, CoreNeurons(stage=stage, skip_layers=1))
    assert not edits(report, "applied")
    assert ir.to_onnx_text(model) == once
    if stage != "gather":
        assert "stay dense" in edits(report, "refused")["down0"]
    if stage == "prefill":
        assert "from the dense model" in edits(report, "refused")["down1"]


@pytest.mark.parametrize("stage", STAGES)
def test_where(stage, b, run_passes):
    """Blocks keep their numbers, whichever are selected."""
    model = two_blocks(b, [one_weight(b) for _ in range(3)])
    run_passes(model, CoreNeurons(stage=stage, skip_layers=0, where=Select(name=("down1",))))
    names = {v.name for v in (*model.graph.inputs, *model.graph.outputs) if v.name.startswith("core_")}
    assert names
    assert all(name.endswith(".1") for name in names)
    untouched = two_blocks(Builder(), [one_weight(Builder())])
    before = ir.to_onnx_text(untouched)
    run_passes(untouched, CoreNeurons(stage=stage, skip_layers=0, where=Select(name=("none",))))
    assert ir.to_onnx_text(untouched) == before


def test_subgraphs_and_functions(run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
        g (float[3, 4] x, bool c) => (float[3, 4] y)
        <float[4, 4] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}> {
            first = local.Layer(x, w)
            y = If (c) <
                then_branch = t () => (float[3, 4] p) { h = MatMul(first, w)  r = Relu(h)  p = MatMul(r, w) },
                else_branch = e () => (float[3, 4] q) { q = Identity(first) }>
        }
        <domain: "local", opset_import: ["" : 18]> Layer (p, q) => (s) { r = MatMul(p, q)  s = Relu(r) }""")
    for graph in (model.graph, *model.functions.values()):
        for i, node in enumerate(graph.all_nodes()):
            node.name = f"{graph.name}{i}"
    for stage in STAGES:
        report = run_passes(model, CoreNeurons(stage=stage, skip_layers=0))
        assert not edits(report, "applied")
        assert sum("subgraph" in reason for reason in edits(report, "refused").values()) == 2
        assert sum("function" in reason for reason in edits(report, "refused").values()) == 1


def test_taken_names(b, run_passes):
    model = two_blocks(b, [one_weight(b)])
    model.graph.inputs[0].name = "core_index.0"
    with pytest.raises(PassError, match=r"called 'core_index.0'"):
        run_passes(model, CoreNeurons(skip_layers=0))


@pytest.mark.parametrize("stage", STAGES[1:])
def test_weights_that_are_not_finite(stage, b, run_passes):
    gate, up, _ = one_weight(b)
    model = two_blocks(b, [[gate, up, b.const(np.full((HIDDEN, WIDTH), np.inf, np.float32))]])
    with pytest.raises(PassError, match="down0 holds NaN or infinity"):
        run_passes(model, CoreNeurons(stage=stage, skip_layers=0, weights="int8"))


def test_clusters_need_prompts(b, run_passes):
    model = two_blocks(b, [one_weight(b)])
    with pytest.raises(CalibrationError, match="--data"):
        run_passes(model.clone(), CoreNeurons(skip_layers=0, clusters=2))
    with pytest.raises(CalibrationError, match="3 prompts make no 4 clusters"):
        run_passes(model.clone(), CoreNeurons(skip_layers=0, clusters=4), data=feeds(3))
    with pytest.raises(PassError, match="one cluster"):
        run_passes(model.clone(), CoreNeurons(skip_layers=0, clusters=1), data=feeds(3))


def test_contract(b, capabilities, attention_example):
    """As registered: three blocks at the start stay dense, so that a small model stays as it is."""
    check_pass(CoreNeurons(), attention_example[0], capabilities=capabilities)
    adapter = TypeAdapter(CoreNeurons)
    step = CoreNeurons(stage="decode", keep=0.2, weights="int8", clusters=4)
    assert adapter.validate_json(json.dumps(json.loads(adapter.dump_json(step)))) == step


@pytest.mark.parametrize("seed", range(4))
def test_k_means(seed):
    """Three far groups are found whatever the draw; no cluster is empty, even of equal points."""
    random = np.random.default_rng(seed)
    points = np.repeat(10 * np.eye(3, 8), 5, axis=0) + random.normal(size=(15, 8)) * 0.1
    found = k_means(points.astype(np.float32), 3, seed)
    assert [len(set(found[i : i + 5])) for i in (0, 5, 10)] == [1, 1, 1]
    assert len(set(found)) == 3
    assert set(k_means(np.ones((6, 4), np.float32), 3, seed)) == {0, 1, 2}
