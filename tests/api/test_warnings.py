"""What a report admits."""

from dataclasses import replace

import pytest

from onnxcomp.errors import DataError, OnnxcompError
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.profile import Latency
from onnxcomp.target import Audit
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs import figures


def warns(report, text):
    return sum(text in w for w in report.warnings)


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
    with pytest.raises(DataError, match="a drop is told on evaluation data"):
        compress(recipe=[Cleanup()], data=None, require_drop=True)


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

    monkeypatch.setattr(figures, "measure", slow)
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
