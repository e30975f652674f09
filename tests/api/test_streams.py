"""`profile_stream`, and the page that it fills."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import streams
from pages import Page, assert_loads_nothing
from reports import EVIL

from onnxcomp import api, plots
from onnxcomp.errors import DataError, OnnxcompError, RecipeError
from onnxcomp.passes.delta import Delta
from onnxcomp.stream_profile import StreamProfile
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs.resolve import compiled


@pytest.fixture(scope="module")
def profile() -> StreamProfile:
    model, _ = streams.delta(streams.cnn(), streams.frames(6), threshold=0.0)
    return api.profile_stream(model, streams.cnn(), data=streams.frames(8), repeat=6)


def test_a_delta_model_against_the_dense_one(profile):
    assert len(profile.steps) == 8
    assert profile.steps[0].density is None
    assert [s.density == 0 for s in profile.steps[1:]] == [True, False] * 3 + [True]  # every second frame is new
    assert profile.steps[1].state_density < 1e-3  # one number of the state counts steps
    assert profile.steps[0].state_density > 0.9
    assert all(s.error < 1e-5 for s in profile.steps)
    assert all(s.model_ms > 0 and s.baseline_ms > 0 and s.ratio > 0 for s in profile.steps)
    assert (profile.ratio.rounds, profile.target, profile.threads) == (6, "ort-cpu", 1)
    assert "1 thread" in profile.verdict
    assert profile.low.density < profile.high.density


def test_an_artifact_alone_and_part_of_a_sequence(tmp_path):
    model, _ = streams.delta(streams.cnn(), streams.frames(6), threshold=0.0)
    artifact = compiled(model, OrtCpu(), tmp_path / "a")
    np.savez(tmp_path / "frames.npz", x=np.concatenate([f["x"] for f in streams.frames(8)]))
    found = api.profile_stream(artifact.path, data=tmp_path / "frames.npz", samples=5, repeat=5)
    assert (len(found.steps), found.baseline, found.ratio, found.verdict) == (5, None, None, "")
    assert found.data == str(tmp_path / "frames.npz")


def test_a_model_without_state(model_path, feeds):
    found = api.profile_stream(model_path, model_path, data=feeds, repeat=5)
    assert {s.state_density for s in found.steps} == {None}
    assert {s.density for s in found.steps[1:]} == {1.0}


def test_refused(model_path, feeds):
    with pytest.raises(RecipeError, match="instead of random"):
        api.profile_stream(model_path, data="random")
    with pytest.raises(DataError, match="data has 1 step"):
        api.profile_stream(model_path, data=feeds[:1])
    with pytest.raises(DataError, match="lacks input"):
        api.profile_stream(model_path, streams.recurrent("GRU"), data=feeds, repeat=5)


def test_one_feed_over_and_over_is_told_from_a_stream(model_path, feeds):
    model, _ = streams.delta(streams.cnn(), streams.frames(6), threshold=0.0)
    assert api.profile(model, data=streams.frames(1), repeat=5).carries_state
    assert not api.profile(model_path, data=feeds, repeat=5).carries_state


def test_compress_makes_no_claim_about_the_speed_of_a_stream(tmp_path):
    steps = streams.frames(2)
    found = api.compress(streams.cnn(), tmp_path / "out", recipe=[Delta(threshold=0.0)], data=steps, repeat=6)
    assert (found.ratio, found.verdict.kind) == (None, "unknown")
    assert any("one feed over and over" in text for text in found.warnings)


@pytest.fixture(params=[True, False], ids=["matplotlib", "tables"])
def _plotting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        pytest.importorskip("matplotlib")
    else:
        monkeypatch.setattr(plots, "available", lambda: False)
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("_plotting")
@pytest.mark.parametrize("alone", [False, True])
def test_the_page(profile, alone, tmp_path):
    if alone:
        steps = tuple(replace(s, baseline_ms=None, ratio=None, state_density=None) for s in profile.steps)
        profile = replace(profile, steps=steps, baseline=None, ratio=None, low=None, high=None)
    path = tmp_path / "page.html"
    api.write_stream_page(replace(profile, data=EVIL), path, model=EVIL)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert_loads_nothing(text)
    assert EVIL not in text
    assert ("<svg" in text) == plots.available()
    assert ("baseline" in text) != alone
    assert text.count("<tr>") == 1 + 1 + 2 * (not alone) + 1 + 8
    api.write_stream_page(replace(profile, data=EVIL), tmp_path / "again.html", model=EVIL)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == text


def test_a_page_that_cannot_be_written(profile, tmp_path):
    for path in (tmp_path / "page.png", tmp_path / "no" / "page.html"):
        with pytest.raises(OnnxcompError):
            api.write_stream_page(profile, path)


def test_compress_times_a_stream_on_its_sequence(tmp_path):
    steps = streams.frames(30)
    found = api.compress(streams.cnn(), tmp_path / "out", recipe=[Delta(threshold=0.02)], data=steps, repeat=6)
    assert found.ratio is not None
    assert found.ratio.rounds == 6
    assert any("15 steps of the evaluation data, run as one stream" in text for text in found.warnings)


def test_errors_of_steps_are_those_of_the_outputs(tmp_path):
    steps = streams.frames(12)
    model, _ = streams.delta(streams.cnn(), steps, threshold=0.05)
    found = api.profile_stream(model, streams.cnn(), data=steps, repeat=5)
    target = OrtCpu()
    session = target.load(compiled(model, target, tmp_path / "artifact"))
    name = session.outputs[0].name
    dense = streams.stream(streams.cnn(), steps)
    wanted = [
        float(np.linalg.norm(session.run(f)[name] - d) / np.linalg.norm(d)) for f, d in zip(steps, dense, strict=True)
    ]
    assert max(wanted) > 1e-3
    np.testing.assert_allclose([s.error for s in found.steps], wanted, rtol=0.01, atol=1e-6)
