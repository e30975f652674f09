"""The verbs beside `compress`."""

from collections.abc import Mapping

import onnx
import onnx_ir as ir
import pytest

import onnxcomp
from onnxcomp import api
from onnxcomp.errors import OnnxcompError
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.select import Select


def test_public_names():
    for name in onnxcomp.__all__:
        assert getattr(onnxcomp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onnxcomp.nothing


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


def test_rewrite(tmp_path, model_path, feeds, fast):
    model = load(model_path)
    before = ir.to_proto(model).SerializeToString()
    result = api.rewrite(model, tmp_path / "m.onnx", recipe=fast, data=feeds)
    assert ir.to_proto(model).SerializeToString() == before
    assert result.before.nodes == 3
    assert result.passes[-1].size.nodes == len(list(result.model.graph)) == len(list(load(result.path).graph))


def test_rewrite_without_writing(tmp_path, model_path, feeds, fast):
    result = api.rewrite(model_path, None, recipe=fast, data=feeds)
    assert result.path is None
    assert {n.op_type for n in result.model.graph} > {"QuantizeLinear"}
    assert [p.name for p in tmp_path.iterdir()] == ["mlp.onnx"]


def test_rewrite_in_place_gives_a_model_that_still_has_its_weights(monkeypatch, external_path, feeds, x):
    monkeypatch.setattr("onnxcomp.model.EXTERNAL_THRESHOLD", 100)
    for _ in range(2):
        result = api.rewrite(external_path, external_path, recipe=[Cleanup()])
        assert all(v.const_value.numpy().size for v in result.model.graph.initializers.values())


def test_half_calibrates_as_compress_does(model_path, feeds, fast):
    wild = [{"x": f["x"] * (1 if i < 16 else 100)} for i, f in enumerate(feeds)]

    def scale(data, **options):
        model = api.rewrite(model_path, None, recipe=fast, data=data, **options).model
        return max(float(v.const_value.numpy().max()) for n, v in model.graph.initializers.items() if n == "x_scale")

    assert scale(wild, half=True) == scale(feeds[:16])
    assert scale(wild) > 10 * scale(feeds[:16])


def test_numeric_check(model_path, feeds, fast):
    result = api.rewrite(model_path, None, recipe=fast, data=feeds, check="numeric")
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
