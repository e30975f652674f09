"""`--recipe auto`: what is printed, and where."""

import json

import kinds
import pytest

from onnxcomp.model import save


def test_it_is_the_default_and_says_why_on_stderr(cli, tmp_path, model_path, data_path):
    code, out, err = cli("rewrite", model_path, "-o", tmp_path / "m.onnx", "--data", data_path)
    assert code == 0
    assert err == (
        "kind: other (2 matrix products with 384 weights) -> recipe int8: its linear layers have integer kernels\n"
    )
    assert "kind:" not in out


@pytest.mark.parametrize("verb", ["rewrite", "compress"])
def test_a_decoder_needs_no_data(cli, tmp_path, verb):
    save(kinds.decoder(), tmp_path / "m.onnx")
    extra = ["--no-measure"] if verb == "compress" else []
    code, out, err = cli(verb, tmp_path / "m.onnx", "-o", tmp_path / "out", "--recipe", "auto", *extra)
    assert code == 0, err
    assert err.startswith("kind: decoder-lm (ids looks up 96 tokens; ")
    assert "-> recipe weight_only8: static int8 of a decoder costs its language" in err
    assert "weight_only" in out


def test_json_holds_it(as_json, cli, tmp_path, model_path, data_path):
    found = as_json("rewrite", model_path, "--dry-run", "--data", data_path)
    assert (found["recipe"], found["kind"]["name"]) == ("int8", "other")
    assert found["reason"]
    assert "model" not in found
    out = cli("compress", model_path, "-o", tmp_path / "out", "--data", data_path, "--no-measure", "--json")[1]
    assert json.loads(out)["metadata"]["why this recipe"] == found["reason"]


def test_a_warning_of_a_named_recipe(cli, tmp_path):
    save(kinds.cnn(), tmp_path / "m.onnx")
    code, _, err = cli("rewrite", tmp_path / "m.onnx", "--dry-run", "--recipe", "dynamic_int8")
    assert code == 0
    assert err.startswith("warning: dynamic_quantize leaves convolutions in float")
    assert len(err.splitlines()) == 1


def test_no_data_is_an_error_that_names_the_kind(fails, tmp_path):
    save(kinds.cnn(), tmp_path / "m.onnx")
    for verb in ("rewrite", "compress"):
        message = fails(verb, tmp_path / "m.onnx", "-o", tmp_path / "out")
        assert "recipe 'int8', chosen for a model of kind cnn, calibrates" in message
        assert "--data" in message


def test_inspect(cli, as_json, tmp_path):
    save(kinds.streaming(), tmp_path / "m.onnx")
    assert "recurrent-streaming (2 states in and out; " in cli("inspect", tmp_path / "m.onnx")[1]
    assert as_json("inspect", tmp_path / "m.onnx")["kind"]["name"] == "recurrent-streaming"


def test_auto_is_offered(fails, model_path, tmp_path):
    assert "did you mean 'auto'?" in fails("rewrite", model_path, "-o", tmp_path / "m.onnx", "--recipe", "aut")
