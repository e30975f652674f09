"""`auto`: the recipe for the kind of model, its reason, and what is said of recipes that do not suit it."""

from __future__ import annotations

import json

import kinds
import pytest
from builder import Builder

from onnxcomp import api
from onnxcomp.errors import CalibrationError
from onnxcomp.model import load, save
from onnxcomp.passes.dynamic_quantize import DynamicQuantize
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.quantize import Quantize
from onnxcomp.recipe import load_recipe
from onnxcomp.verbs.choosing import choose

RECIPES = {
    "cnn": "int8",
    "transformer-encoder": "int8_smooth",
    "decoder-lm": "weight_only8",
    "recurrent": "dynamic_int8",
    "recurrent-streaming": "dynamic_int8",
    "mixed": "int8",
    "other": "int8",
}


@pytest.mark.parametrize("kind", sorted(RECIPES))
def test_recipe_of_a_kind(kind):
    model = kinds.KINDS[kind][0][1]()
    choice = choose("auto", model, data=True)
    assert (choice.kind.name, choice.recipe) == (kind, load_recipe(RECIPES[kind]))
    assert choice.reason
    assert choice.warnings == (), "what it chooses is not warned of"


@pytest.mark.parametrize("kind", ["decoder-lm", "recurrent", "recurrent-streaming"])
def test_recipes_that_need_no_data(kind):
    choose("auto", kinds.KINDS[kind][0][1](), data=False)


@pytest.mark.parametrize("kind", ["cnn", "transformer-encoder", "mixed", "other"])
def test_recipes_that_calibrate(kind):
    with pytest.raises(
        CalibrationError, match=f"recipe '{RECIPES[kind]}', chosen for a model of kind {kind}, calibrates"
    ):
        choose("auto", kinds.KINDS[kind][0][1](), data=False)


def test_nothing_is_told_of_a_recipe_that_was_named():
    told = []
    choice = choose("cleanup", kinds.cnn(), data=False)
    choice.tell(told.append, warn=True)
    assert (choice.reason, told) == ("", [])
    assert list(choice.metadata()) == ["kind of model"]


# --- warnings


CASES = {
    "per tensor": (kinds.cnn, [Quantize(per_channel=False)], "7 dB SQNR was measured, 19 dB with per_channel"),
    "static decoder": (kinds.decoder, [Quantize()], "perplexity 3.4 -> 40,335 was measured"),
    "N:M decoder": (kinds.decoder, [NmMask()], "perplexity 20 -> 54 was measured"),
    "dynamic cnn": (kinds.cnn, [DynamicQuantize()], "8 times the time of float"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_warning(case):
    make, recipe, text = CASES[case]
    (warning,) = choose(recipe, make(), data=True).warnings
    assert text in warning
    others = [c for c in CASES if CASES[c][0] is not make]
    assert not [w for c in others for w in choose(recipe, CASES[c][0](), data=True).warnings if text in w]


def test_a_model_that_another_tool_made_dynamic():
    b = Builder()
    x = b.input("x", [1, 1, 8, 8])
    q = b.op("Conv", x, b.floats(1, 1, 3, 3))
    model = b.output(q).model()
    assert choose("cleanup", model, data=False).warnings == ()
    next(iter(model.graph)).op_type = "ConvInteger"
    (warning,) = choose("cleanup", model, data=False).warnings
    assert "1 convolutions of the model are ConvInteger" in warning


# --- through the verbs


def test_report(compress, tmp_path):
    told = []
    report = compress(recipe="auto", notice=told.append)
    assert report.recipe == "int8"
    assert report.recipe_source == load_recipe("int8").source
    assert report.metadata["kind of model"] == "other (2 matrix products with 384 weights)"
    assert report.metadata["why this recipe"]
    assert told == [f"kind: {report.metadata['kind of model']} -> recipe int8: {report.metadata['why this recipe']}"]
    written = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert written["metadata"] == report.metadata
    assert report.metadata["kind of model"] in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_auto_is_the_default(model_path, feeds):
    result = api.rewrite(model_path, None, data=feeds)
    assert (result.recipe, result.kind.name) == ("int8", "other")
    assert result.reason
    assert [p.name for p in result.passes] == ["cleanup", "quantize"]


def test_a_decoder_without_data(tmp_path):

    save(kinds.decoder(), tmp_path / "m.onnx")
    report = api.compress(tmp_path / "m.onnx", tmp_path / "out", measure=False)
    assert report.recipe == "weight_only8"
    assert report.fidelity is None
    assert load(tmp_path / "out" / "model.onnx").graph.outputs[0].name == "logits_out"


def test_warnings_reach_the_report_and_the_result(compress, tmp_path, feeds):
    b = Builder()
    y = b.op("Flatten", b.op("Conv", b.input("x", [1, 1, 8]), b.floats(4, 1, 3)))

    save(b.output(y).model(), tmp_path / "cnn.onnx")
    data = [{"x": f["x"][:, None]} for f in feeds]
    recipe = [Quantize(per_channel=False, range="minmax")]
    report = compress(tmp_path / "cnn.onnx", recipe=recipe, data=data)
    assert any("7 dB SQNR" in w for w in report.warnings)
    told = []
    result = api.rewrite(tmp_path / "cnn.onnx", None, recipe=recipe, data=data, notice=told.append)
    assert [f"warning: {w}" for w in result.warnings] == told
    assert "7 dB SQNR" in told[0]


def test_inspect_tells_the_kind():
    assert api.inspect(kinds.decoder()).kind.name == "decoder-lm"
