"""The verbs as functions: what they wire together, and what the report admits."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnxcomp
from onnxcomp import api, registry
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.quantize import Quantize
from onnxcomp.profile import Latency
from onnxcomp.recipe import load_recipe
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.select import Select
from onnxcomp.target import Audit
from onnxcomp.targets.ort import OrtCpu

FAST = (Cleanup(), Quantize(range="minmax", weight_range="minmax"))


@pytest.fixture
def feeds(x):
    return [{"x": row[None]} for row in x]


@pytest.fixture
def compress(tmp_path, model_path, feeds):
    """Compresses with fast defaults."""

    def call(model=model_path, out=tmp_path / "out", **options):
        return api.compress(model, out, **{"recipe": FAST, "data": feeds, "measure": False, **options})

    return call


def warns(report, text):
    return sum(text in w for w in report.warnings)


def test_public_names():
    for name in onnxcomp.__all__:
        assert getattr(onnxcomp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxcomp.nothing


# --- compress


def test_report(compress, tmp_path, model_path, x):
    report = compress(measure=True, repeat=6, seconds=5.0, threads=2)
    assert (report.recipe, report.target, report.threads) == ("custom", "ort-cpu", 2)
    assert (report.calibration_samples, report.fidelity.samples) == (16, 16)
    assert not report.fidelity.seen_by_calibration
    assert report.fidelity.worst_sqnr > 20
    assert {layer.node for layer in report.fidelity.layers} == {"/fc1/Gemm", "/fc2/Gemm"}
    assert report.ratio.rounds == report.before.latency.samples == report.after.latency.samples == 6
    assert report.before.peak_memory > 1e6
    assert report.after.node_times
    assert report.before.path == str(model_path)
    assert report.before.file_bytes == model_path.stat().st_size
    assert report.after.path == str(tmp_path / "out" / "model.onnx")
    assert report.after.file_bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    macs = 8 * 32 + 32 * 4
    assert report.before.size.macs == report.after.size.macs == macs, "of the feed that is run"
    assert report.before.audit.integer_mac_share == 0.0
    assert report.after.audit.integer_mac_share == 1.0
    assert [p.name for p in report.passes] == ["cleanup", "quantize"]


def test_output_folder(compress, tmp_path, run, x, model_path):
    report = compress()
    out = tmp_path / "out"
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["recipe"] == report.recipe
    portable = run(out / "model.onnx", {"x": x})[0]
    target = OrtCpu()
    artifact = target.open(out / "artifact")
    np.testing.assert_allclose(target.load(artifact).run({"x": x})["y"], portable, rtol=1e-5, atol=1e-5)
    expected = run(model_path, {"x": x})[0]
    assert np.abs(portable - expected).max() < 0.1 * np.abs(expected).max()


def test_an_earlier_output_is_replaced(compress, tmp_path):
    compress()
    (tmp_path / "out" / "artifact" / "extra").touch()
    report = compress(recipe=[Cleanup()])
    assert not (tmp_path / "out" / "artifact" / "extra").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["recipe"] == report.recipe
    assert {p.name for p in tmp_path.iterdir()} == {"mlp.onnx", "out"}


@pytest.mark.parametrize("after", ["out", "new"])
def test_an_earlier_output_survives_an_interrupt_at_the_end(compress, monkeypatch, tmp_path, snapshot, after):
    compress()
    before = snapshot(tmp_path)
    rename = os.rename

    def interrupted(source, target):
        name = Path(source).name
        if name == "new":
            raise KeyboardInterrupt
        rename(source, target)
        if name == after == "out":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe=[Cleanup()])
    assert snapshot(tmp_path) == before


def test_large_models(compress, monkeypatch, tmp_path, run, x, model_path):
    monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 100)
    for _ in range(2):
        report = compress(recipe=[Cleanup()])
        out = tmp_path / "out"
        files = [out / "model.onnx", out / "model.onnx.data"]
        assert report.after.file_bytes == sum(f.stat().st_size for f in files)
        for path in (files[0], out / "artifact" / "model.onnx"):
            np.testing.assert_allclose(run(path, {"x": x})[0], run(model_path, {"x": x})[0], rtol=1e-5, atol=1e-5)


def test_through_a_link(compress, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    compress(out=tmp_path / "link")
    assert (tmp_path / "real" / "report.json").is_file()
    assert (tmp_path / "link").is_symlink()


def test_fidelity_is_that_of_the_halves_that_calibration_did_not_see(compress, feeds):
    """Values in the second half that the first has not are clipped; that has to show."""
    wild = [{"x": f["x"] * (1 if i < 16 else 100)} for i, f in enumerate(feeds)]
    tame = compress().fidelity.worst_sqnr
    assert compress(data=wild).fidelity.worst_sqnr < tame - 10


@pytest.mark.parametrize("kind", ["path", "text", "memory", "external"])
def test_model_kinds(compress, tmp_path, model_path, external_path, kind):
    model = {"path": model_path, "text": str(model_path), "memory": load(model_path), "external": external_path}[kind]
    before = ir.to_proto(model).SerializeToString() if kind == "memory" else None
    report = compress(model)
    assert report.fidelity.worst_sqnr > 20
    if kind == "memory":
        assert report.before.path == "mlp"
        assert ir.to_proto(model).SerializeToString() == before, "it is left as it was"
    if kind == "external":
        files = ("mlp.onnx", "weights.bin")
        assert report.before.file_bytes == sum((external_path.parent / f).stat().st_size for f in files)


def test_recipe_kinds(compress, recipe_path):
    assert compress(recipe=str(recipe_path)).recipe == "fast"
    assert compress(recipe=recipe_path).recipe_source == recipe_path.read_text()
    recipe = load_recipe(str(recipe_path))
    assert compress(recipe=recipe).passes[1].config == recipe.passes[1]
    assert compress(recipe=list(FAST)).recipe_source == ""
    with pytest.raises(RecipeError, match="is a sequence of passes; 'cleanup' is none"):
        compress(recipe=["cleanup"])


def test_the_same_twice(compress, tmp_path):
    first, second = (compress(out=tmp_path / name) for name in "ab")
    assert (tmp_path / "a" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()
    assert first.fidelity == second.fidelity


def test_samples(compress):
    report = compress(samples=3, eval_samples=9)
    assert (report.calibration_samples, report.fidelity.samples) == (3, 9)


def test_shapes(compress, tmp_path):
    compress(shapes={"x": (1, 8)})
    assert list(load(tmp_path / "out" / "model.onnx").graph.inputs[0].shape) == [1, 8]


def test_metric(compress, x):
    seen = []

    def accuracy(run):
        seen.append(run({"x": x})["y"])
        return {"accuracy": np.float32(1.0 - 0.25 * len(seen)), "other": 1}

    report = compress(metric=accuracy)
    assert report.fidelity.reference_metric == {"accuracy": 0.75, "other": 1.0}
    assert report.fidelity.metric == {"accuracy": 0.5, "other": 1.0}
    assert report.fidelity.drop() == 0.25
    assert not np.array_equal(*seen), "the second is the rewritten model"


def test_streaming_state_starts_anew(tmp_path, mlp, compress, feeds):
    """A model that adds up its input; what is left from the comparison must not reach the metric."""
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["x", "before"], ["y"]), onnx.helper.make_node("Identity", ["y"], ["after"])],
            "sum",
            [onnx.helper.make_tensor_value_info(n, 1, [1, 8]) for n in ("x", "before")],
            [onnx.helper.make_tensor_value_info(n, 1, [1, 8]) for n in ("y", "after")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    state = [{"input": "before", "output": "after", "shape": [1, 8], "dtype": "float32"}]
    onnx.helper.set_model_props(model, {"onnxcomp.state": json.dumps(state)})
    onnx.save(model, tmp_path / "sum.onnx")
    found = []
    compress(tmp_path / "sum.onnx", recipe=[Cleanup()], metric=lambda run: found.append(run(feeds[0])["y"]) or 1.0)
    for y in found:
        np.testing.assert_array_equal(y, feeds[0]["x"])


def test_a_model_without_linear_ops(compress, tmp_path, feeds):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "relu",
        [onnx.helper.make_tensor_value_info("x", 1, [-1, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, [-1, 8])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "relu.onnx")
    report = compress(tmp_path / "relu.onnx")
    assert (report.after.size.macs, report.after.audit.rows, report.fidelity.layers) == (0, (), ())
    assert compress(tmp_path / "relu.onnx", data="random").fidelity.samples == 8


def test_progress(compress):
    told = []
    compress(measure=True, repeat=5, progress=lambda *step: told.append(step))
    assert ("quantize: calibrate", 16, 16) in told, "with the total, for a bar"
    assert ("compare", 16, 16) in told
    assert ("profile", 5, 5) in told


# --- what a report admits


def test_nothing_to_admit(compress):
    assert compress(recipe=[Cleanup()]).warnings == ()


def test_no_data(compress):
    report = compress(recipe=[Cleanup()], data=None)
    assert report.fidelity is None
    assert warns(report, "no data was given: only passes that need none could run")
    with pytest.raises(OnnxcompError, match="pass 'quantize': it needs calibration data"):
        compress(data=None)
    with pytest.raises(DataError, match="a metric needs evaluation data"):
        compress(recipe=[Cleanup()], data=None, metric=lambda run: 1.0)


def test_random_data(compress, feeds):
    assert warns(compress(data="random"), "random data was used")
    assert warns(compress(eval_data="random"), "random data was used")


@pytest.mark.parametrize(("count", "warning"), [(16, 0), (14, 1), (2, 1)])
def test_few_samples(compress, feeds, count, warning):
    assert warns(compress(data=feeds[:count]), "fidelity rests on") == warning


def test_evaluation_on_what_calibration_saw(compress, feeds):
    for options in ({"data": feeds[:1]}, {"eval_data": feeds}, {"data": feeds[:8], "eval_data": list(feeds[:8])}):
        report = compress(**options)
        assert report.fidelity.seen_by_calibration
        assert any("calibration saw the evaluation data" in n for n in report.notices)


def test_evaluation_on_some_that_calibration_saw(compress, feeds):
    report = compress(data=feeds[:10], eval_data=feeds[8:])
    assert warns(report, "2 of 24 evaluation samples are calibration samples as well")
    assert report.fidelity.seen_by_calibration


def test_repeated_samples_are_found_in_a_split(compress, feeds):
    assert warns(compress(data=[*feeds, feeds[0]]), "1 of 17 evaluation samples are calibration samples as well")


def test_evaluation_data_of_its_own(compress, feeds):
    report = compress(data=feeds[:10], eval_data=feeds[10:])
    assert (report.calibration_samples, report.fidelity.samples) == (10, 22)
    assert not report.fidelity.seen_by_calibration


def test_slower(compress, monkeypatch):
    def slow(runs, **_):
        return {k: Latency.of([n * 1_000_000] * 20, [1] * 20) for n, k in ((1, "before"), (2, "after"))}

    monkeypatch.setattr(api, "_time", slow)
    report = compress(measure=True)
    assert report.verdict.kind == "slower"
    assert warns(report, "the rewritten model is slower than the original on ort-cpu")


def test_fallback_to_float(compress, monkeypatch):
    real = OrtCpu.compile

    def compile_(self, model, out):
        artifact = real(self, model, out)
        rows = tuple(replace(r, integer=False, reason="no kernel") for r in artifact.audit.rows)
        return replace(artifact, audit=Audit(rows=rows))

    monkeypatch.setattr(OrtCpu, "compile", compile_)
    assert warns(compress(), "2 of 2 quantized nodes run in float on ort-cpu")


def test_no_vnni(compress, monkeypatch):
    real = OrtCpu.capabilities
    monkeypatch.setattr(OrtCpu, "capabilities", lambda self: replace(real(self), reduce_range=True))
    report = compress()
    assert warns(report, "no 8-bit dot product that keeps its sums (VNNI)")
    assert "weight 7 bit" in str(report.passes[1].edits)


def test_recipe_for_another_target(compress, tmp_path):
    recipe = tmp_path / "other.toml"
    recipe.write_text('version = 1\ntarget = "tvm"\n[[passes]]\npass = "cleanup"\n')
    assert warns(compress(recipe=str(recipe)), "recipe 'other' is made for target tvm, not ort-cpu")


# --- targets with a lowering


@dataclass(frozen=True, kw_only=True)
class Negate(Pass):
    """Negates what the classifier returns, so that a test sees where the lowering took effect."""

    name: ClassVar[str] = "negate"
    summary: ClassVar[str] = "For tests."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        (output,) = model.graph.outputs
        node = ir.node("Neg", [output], outputs=[ir.Value(name="lowered", shape=output.shape, type=output.type)])
        model.graph.append(node)
        model.graph.outputs[0] = node.outputs[0]
        node.outputs[0].name, output.name = output.name, "raised"
        return [applied(node, "negated")]


class Lowering(OrtCpu):
    name: ClassVar[str] = "lowering"

    def lowering(self) -> Sequence[Pass]:
        return (Negate(),)


@pytest.fixture
def lowering(monkeypatch):
    monkeypatch.setattr(api, "load_target", lambda name: Lowering if name == "lowering" else registry.load_target(name))


def test_lowering_is_on_the_way_to_the_artifact(lowering, compress, tmp_path, run, x, model_path):
    report = compress(target="lowering", recipe=[Cleanup()])
    assert report.fidelity.worst_sqnr > 100, "the baseline takes the same way"
    portable = run(tmp_path / "out" / "model.onnx", {"x": x})[0]
    np.testing.assert_allclose(portable, run(model_path, {"x": x})[0], rtol=1e-5, atol=1e-5)
    session = Lowering().load(Lowering().open(tmp_path / "out" / "artifact"))
    np.testing.assert_allclose(session.run({"x": x})["y"], -portable, rtol=1e-5, atol=1e-5)


def test_lowering_leaves_a_model_in_memory(lowering, tmp_path, model_path):
    model = load(model_path)
    api.compile(model, tmp_path / "artifact", target="lowering")
    assert [n.op_type for n in model.graph] == ["Gemm", "Relu", "Gemm"]


# --- the others


def test_inspect(model_path):
    found = api.inspect(model_path, select=Select(op=("Gemm",)))
    assert [name for name, _, _ in found.selected] == ["/fc1/Gemm", "/fc2/Gemm"]
    assert found.inputs == {"x": "FLOAT [batch,8]"}
    in_memory = api.inspect(load(model_path), shapes={"x": (1, 8)})
    assert in_memory.path == ""
    assert in_memory.size.macs == 8 * 32 + 32 * 4
    assert in_memory.dynamic == {}


def test_fixed_shapes_leave_a_model_in_memory(model_path):
    model = load(model_path)
    api.inspect(model, shapes={"x": (1, 8)})
    assert model.graph.inputs[0].shape[1] == 8
    assert not isinstance(model.graph.inputs[0].shape[0], int)


def test_rewrite(tmp_path, model_path, feeds):
    model = load(model_path)
    before = ir.to_proto(model).SerializeToString()
    result = api.rewrite(model, tmp_path / "m.onnx", recipe=FAST, data=feeds)
    assert ir.to_proto(model).SerializeToString() == before
    assert result.before.nodes == 3
    assert result.passes[-1].size.nodes == len(list(result.model.graph)) == len(list(load(result.path).graph))


def test_rewrite_without_writing(tmp_path, model_path, feeds):
    result = api.rewrite(model_path, None, recipe=FAST, data=feeds)
    assert result.path is None
    assert {n.op_type for n in result.model.graph} > {"QuantizeLinear"}
    assert [p.name for p in tmp_path.iterdir()] == ["mlp.onnx"]


def test_rewrite_in_place_gives_a_model_that_still_has_its_weights(monkeypatch, external_path, feeds, x):
    monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 100)
    for _ in range(2):
        result = api.rewrite(external_path, external_path, recipe=[Cleanup()])
        assert all(v.const_value.numpy().size for v in result.model.graph.initializers.values())


def test_half_calibrates_as_compress_does(model_path, feeds):
    wild = [{"x": f["x"] * (1 if i < 16 else 100)} for i, f in enumerate(feeds)]

    def scale(data, **options):
        model = api.rewrite(model_path, None, recipe=FAST, data=data, **options).model
        return max(float(v.const_value.numpy().max()) for n, v in model.graph.initializers.items() if n == "x_scale")

    assert scale(wild, half=True) == scale(feeds[:16])
    assert scale(wild) > 10 * scale(feeds[:16])


def test_numeric_check(model_path, feeds):
    result = api.rewrite(model_path, None, recipe=FAST, data=feeds, check="numeric")
    cleanup, quantize = (p.sqnr for p in result.passes)
    assert cleanup > 100 > quantize > 20


def test_profile_and_compare(tmp_path, model_path, feeds):
    artifact = api.compile(model_path, tmp_path / "artifact")
    found = api.profile(artifact.path, load(model_path), data=feeds, repeat=6)
    assert isinstance(found.latency, Mapping)
    assert found.ratio.rounds == 6
    assert api.profile(model_path, data=feeds, repeat=5).ratio is None
    fidelity = api.compare(model_path, load(model_path), data=feeds, layers=False)
    assert (fidelity.samples, fidelity.layers) == (32, ())
    assert fidelity.outputs[0].max_error == 0.0


def test_models_with_other_inputs_cannot_be_compared(tmp_path, mlp, model_path, feeds):
    model = mlp()
    model.graph.input[0].name = model.graph.node[0].input[0] = "z"
    onnx.save(model, tmp_path / "z.onnx")
    with pytest.raises(OnnxcompError, match="z"):
        api.compare(model_path, tmp_path / "z.onnx", data=feeds)


def test_lists():
    assert "quantize" in api.list_passes()
    assert "ort-cpu" in api.list_targets()
    assert "int8" in api.list_recipes()
    assert all(name.startswith("onnxcomp::") for name in api.list_ops())
    assert all(text for what in (api.list_passes, api.list_targets, api.list_recipes) for text in what().values())
