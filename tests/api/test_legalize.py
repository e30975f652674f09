"""`legalize`: what it wires together, what it compares, and when it writes."""

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from stubs import Scale, ScaleLittle, ScaleMuch, register

from onnxcomp import api
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.model import load, save
from onnxcomp.passes.legalize import Legalize


@pytest.fixture
def little(monkeypatch):
    """The pass changes next to nothing."""
    register(monkeypatch, ScaleLittle)


@pytest.fixture
def much(monkeypatch):
    """The pass breaks the model."""
    register(monkeypatch, ScaleMuch)


@pytest.mark.usefixtures("little")
def test_it_runs_the_pass_behind_cleanup_and_writes(tmp_path, model_path, feeds):
    found = api.legalize(model_path, tmp_path / "out.onnx", data=feeds)
    assert [p.name for p in found.passes] == ["cleanup", "legalize"]
    actions = [(e.action, e.node) for e in found.passes[1].edits]
    assert actions == [("applied", "/fc1/Gemm"), ("refused", "/act/Relu"), ("applied", "/fc2/Gemm")]
    assert found.accepted
    assert found.path == tmp_path / "out.onnx"
    assert (found.fidelity.samples, found.fidelity.layers) == (32, ())
    assert 40 < found.fidelity.worst_sqnr < 70, "two weights, each 60 dB off"
    w1, written = (load(p).graph.initializers["w1"].const_value.numpy() for p in (model_path, found.path))
    np.testing.assert_allclose(written, w1 * np.float32(1.001), rtol=1e-6)


@pytest.mark.usefixtures("much")
def test_nothing_is_written_when_outputs_differ(tmp_path, model_path, feeds, snapshot):
    before = snapshot(tmp_path)
    found = api.legalize(model_path, model_path, data=feeds)
    assert not found.accepted
    assert found.path is None
    assert found.fidelity.worst_sqnr < 15
    assert snapshot(tmp_path) == before
    assert api.legalize(model_path, tmp_path / "out.onnx", data=feeds, min_sqnr=1.0).path == tmp_path / "out.onnx"


@pytest.mark.usefixtures("much")
def test_a_dry_run_tells_the_same_and_writes_nothing(tmp_path, model_path, feeds, snapshot):
    before = snapshot(tmp_path)
    dry = api.legalize(model_path, None, data=feeds, min_sqnr=1.0)
    assert (dry.accepted, dry.path) == (True, None)
    assert dry.fidelity.worst_sqnr < 15
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("little")
def test_without_data_random_feeds_are_compared(model_path):
    found = api.legalize(model_path, None)
    assert (found.fidelity.data, found.fidelity.samples) == ("random data", 16)
    again, other = (api.legalize(model_path, None, seed=s).fidelity for s in (0, 1))
    assert again == found.fidelity
    assert other != found.fidelity


@pytest.mark.usefixtures("little")
def test_over_the_input_whose_weights_lie_in_another_file(tmp_path, external_path, feeds):
    found = api.legalize(external_path, external_path, data=feeds, samples=3)
    assert found.fidelity.samples == 3
    assert all(v.const_value.numpy().size for v in found.model.graph.initializers.values())


@pytest.mark.usefixtures("little")
def test_a_model_in_memory_is_left_as_it_was(model_path, feeds):
    model = load(model_path)
    before = ir.to_proto(model).SerializeToString()
    found = api.legalize(model, None, data=feeds, shapes={"x": (1, 8)})
    assert ir.to_proto(model).SerializeToString() == before
    assert list(found.model.graph.inputs[0].shape) == [1, 8]


@pytest.mark.usefixtures("little")
def test_measured(model_path, feeds):
    found = api.legalize(model_path, None, data=feeds, measure=True, repeat=6, threads=2)
    assert {name: v.samples for name, v in found.latency.items()} == {"before": 6, "after": 6}
    assert found.ratio.rounds == 6
    assert found.threads == 2
    assert api.legalize(model_path, None, data=feeds).ratio is None


def test_options_reach_the_pass(monkeypatch, model_path, feeds):
    register(monkeypatch, Scale)
    for exact in (False, True):
        edits = api.legalize(model_path, None, exact=exact, data=feeds).passes[1].edits
        assert f"exact is {exact}" in edits[0].detail


@pytest.mark.usefixtures("little")
def test_what_is_wrong_is_found_before_anything_is_done(tmp_path, model_path):
    with pytest.raises(OnnxcompError, match="there is no folder"):
        api.legalize(model_path, tmp_path / "none" / "out.onnx")
    with pytest.raises(RecipeError, match="unknown target 'ort'"):
        api.legalize(model_path, None, target="ort")
    with pytest.raises(DataError, match="calibration needs data"):
        api.legalize(model_path, None, calibrate=True)


# --- with the real pass


@pytest.fixture
def real(monkeypatch):
    register(monkeypatch, Legalize)


@pytest.fixture
def signed(tmp_path):
    """A Conv between int8 activations, as other tools write them, which onnxruntime leaves in float."""
    b = Builder()
    x = b.qdq(b.input("x", [1, 8, 16, 16]), zero=0, dtype=np.int8)
    y = b.qdq(b.op("Relu", b.conv(x)), zero=0, dtype=np.int8)
    save(b.output(y).model(), tmp_path / "signed.onnx")
    return tmp_path / "signed.onnx"


@pytest.mark.usefixtures("real")
def test_audits_tell_what_was_gained(signed, tmp_path):
    found = api.legalize(signed, tmp_path / "out.onnx")
    assert found.before.integer_mac_share == 0.0
    (fallback,) = found.before.fallbacks
    assert (fallback.node, fallback.macs) == ("conv", 8 * 16 * 16 * 8 * 3 * 3)
    assert fallback.reason
    assert found.after.integer_mac_share == 1.0
    assert found.after.fallbacks == ()
    assert found.fidelity.worst_sqnr >= 30.0
    again = api.legalize(found.path, None)
    assert again.passes[1].applied == 0
    assert again.before.integer_mac_share == again.after.integer_mac_share == 1.0


@pytest.mark.usefixtures("real")
def test_calibration_takes_half_of_the_data(signed):
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 8, 16, 16)).astype(np.float32)} for i in range(6)]
    found = api.legalize(signed, None, calibrate=True, data=feeds)
    assert found.fidelity.samples == 3
    assert not found.fidelity.seen_by_calibration
    assert api.legalize(signed, None, data=feeds).fidelity.samples == 6
