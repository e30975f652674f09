"""`legalize`: what it wires together, what it compares, and when it writes."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from foreign import TOOLS
from stubs import Scale, ScaleLittle, ScaleMuch, register

from onnxcomp import api
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.model import load, save
from onnxcomp.passes.legalize import Legalize
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs import legalization


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


# --- what it is judged by


class Distorting(OrtCpu):
    """Adds to what models give when they are executed."""

    added = (("before", 0.0), ("after", 0.0))

    def load(self, artifact, *, threads=1):
        session = super().load(artifact, threads=threads)
        run, added = session.run, dict(self.added)[artifact.path.name]
        session.run = lambda feed: {k: v + np.float32(added) for k, v in run(feed).items()}
        return session


@pytest.fixture
def distorted(monkeypatch):
    """Sets what is added to the outputs before and after, whatever the target."""

    def call(before, after):
        kind = type("Distorted", (Distorting,), {"added": (("before", before), ("after", after))})
        monkeypatch.setattr(legalization, "make_target", lambda _: kind())

    return call


@pytest.mark.usefixtures("little")
def test_the_original_is_what_the_file_says(distorted, model_path, feeds):
    distorted(before=20.0, after=0.0)
    found = api.legalize(model_path, None, data=feeds)
    assert found.runtime.worst_sqnr < 0, "the outputs are smaller than that"
    assert 40 < found.fidelity.worst_sqnr < 70
    assert found.accepted
    distorted(before=20.0, after=20.0)
    assert not api.legalize(model_path, None, data=feeds).accepted, "as far off, but not by rounding"


@pytest.mark.usefixtures("little")
def test_as_close_as_the_original_when_executed(distorted, model_path, feeds):
    distorted(before=0.5, after=0.5)
    found = api.legalize(model_path, None, data=feeds)
    assert found.runtime.worst_sqnr == pytest.approx(found.fidelity.worst_sqnr, abs=0.4)
    assert 10 < found.fidelity.worst_sqnr < 30
    assert found.accepted
    distorted(before=0.5, after=0.7)
    assert not api.legalize(model_path, None, data=feeds).accepted


def scaled(path, out, factor):
    model = load(path)
    for name in ("w1", "b1", "w2", "b2"):
        array = model.graph.initializers[name].const_value.numpy() * np.float32(factor)
        model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    save(model, out)
    return out


@pytest.mark.usefixtures("much")
def test_a_reference(tmp_path, model_path, feeds):
    """The pass makes weights larger by a fifth, which is closer to the reference or further from it."""
    larger, smaller = (scaled(model_path, tmp_path / f"{f}.onnx", f) for f in (1.2, 0.8))
    found = api.legalize(model_path, tmp_path / "out.onnx", data=feeds, reference=larger)
    assert found.reference == "the reference"
    before, after = (found.to_reference[name].worst_sqnr for name in ("before", "after"))
    assert 6 < before < after < 30
    assert found.fidelity.worst_sqnr < 15
    assert found.path == tmp_path / "out.onnx"
    for reference in (smaller, model_path):
        found = api.legalize(model_path, None, data=feeds, reference=reference)
        assert found.to_reference["before"].worst_sqnr > found.to_reference["after"].worst_sqnr
        assert not found.accepted


@pytest.mark.usefixtures("much")
def test_a_reference_that_has_nothing_in_common(tmp_path, model_path, feeds):
    reference = scaled(model_path, tmp_path / "negative.onnx", 40)
    found = api.legalize(model_path, None, data=feeds, reference=reference)
    assert found.to_reference["before"].worst_sqnr < found.to_reference["after"].worst_sqnr < 3
    assert not found.accepted


@pytest.mark.usefixtures("little")
def test_a_reference_with_other_outputs(tmp_path, model_path, feeds):
    model = load(model_path)
    model.graph.outputs[0].name = "z"
    with pytest.raises(OnnxcompError, match=r"the reference has no output 'y'.*it has \['z'\]"):
        api.legalize(model_path, None, data=feeds, reference=model)


@pytest.mark.usefixtures("little")
def test_state_starts_anew_for_every_comparison():
    """What is carried decays, so that a run which goes on where another ended differs."""
    b = Builder()
    total = b.op("Add", b.qdq(b.input("x", [1, 4])), b.op("Mul", b.input("before", [1, 4]), b.const(np.float32(0.9))))
    model = b.output(total).output(b.op("Neg", total)).model()
    state = {"input": "before", "output": total, "shape": [1, 4], "dtype": "float32"}
    model.metadata_props["onnxcomp.state"] = json.dumps([state])
    feeds = [{"x": np.random.default_rng(i).normal(size=(1, 4)).astype(np.float32)} for i in range(6)]
    found = api.legalize(model, None, data=feeds, reference=model)
    compared = (found.fidelity, found.runtime, *found.to_reference.values())
    assert [f.worst_sqnr > 100 for f in compared] == [True] * 4
    assert len(found.fidelity.outputs) == 1


@pytest.mark.usefixtures("much")
def test_a_broken_rewrite_of_a_quantized_model_is_refused():
    b = Builder()
    y = b.op("MatMul", b.qdq(b.input("x", [4, 8])), b.const(b.rng.normal(size=(8, 8)).astype(np.float32), "w"))
    found = api.legalize(b.output(b.qdq(y, 0.1)).model(), None)
    assert found.reference == "the original without rounding"
    before, after = (found.to_reference[name].worst_sqnr for name in ("before", "after"))
    assert before > 30
    assert after < 15
    assert not found.accepted


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


@pytest.mark.usefixtures("real")
def test_another_rounding_of_the_same_model(tmp_path):
    model, feed = TOOLS["quark"]()
    found = api.legalize(model, tmp_path / "out.onnx", data=[feed], min_sqnr=100.0)
    assert found.fidelity.worst_sqnr < 50
    assert found.reference == "the original without rounding"
    before, after = (found.to_reference[name].worst_sqnr for name in ("before", "after"))
    assert after >= before - 0.5
    assert (found.path, found.exact, found.refused_sqnr) == (tmp_path / "out.onnx", False, None)


@pytest.mark.usefixtures("real")
def test_exact_where_less_is_not_accepted(tmp_path):
    """What goes into the residual Add is float; quantized, it is further from the original than 8 bits are."""
    model, _ = TOOLS["modelopt"]()
    data = [{"x": np.random.default_rng(i).normal(size=(1, 3, 12, 12)).astype(np.float32)} for i in range(8)]
    found = api.legalize(model, tmp_path / "out.onnx", data=data, min_sqnr=40.0)
    assert found.path == tmp_path / "out.onnx"
    assert found.exact
    assert found.refused_sqnr < 40 < found.fidelity.worst_sqnr
    assert 0 < found.after.integer_mac_share < 1
    free = api.legalize(model, None, data=data, min_sqnr=30.0)
    assert (free.exact, free.refused_sqnr, free.after.integer_mac_share) == (False, None, 1.0)
    assert free.fidelity.worst_sqnr == found.refused_sqnr
    assert api.legalize(model, None, data=data, exact=True).exact
