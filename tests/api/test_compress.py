"""What `compress` wires together and writes."""

import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.errors import RecipeError
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.recipe import load_recipe
from onnxcomp.targets.ort import OrtCpu


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


def test_recipe_kinds(compress, recipe_path, fast):
    assert compress(recipe=str(recipe_path)).recipe == "fast"
    assert compress(recipe=recipe_path).recipe_source == recipe_path.read_text()
    recipe = load_recipe(str(recipe_path))
    assert compress(recipe=recipe).passes[1].config == recipe.passes[1]
    assert compress(recipe=list(fast)).recipe_source == ""
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
