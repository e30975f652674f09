"""Bad recipes, data and metrics: each has a message of its own and exit code 2, and leaves what is there as it was."""

import sys

import numpy as np
import pytest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[passes]]\npass = "cleanup"\n[[passes]]\npass = "noisy_bias"\n[[passes]]\npass = "quantize"\nbitz = 4',
            "mine.toml: passes[2]: unknown key 'bitz'; quantize has ['activation_bits', ",
        ),
        ('[[passes]]\npass = "quantise"', "passes[0]: unknown pass 'quantise'; did you mean 'quantize'?"),
        ('[[passes]]\npass = "quantize"\nweight_bits = 99', "passes[0].weight_bits: "),
        ("passez = 3", "unknown key 'passez'"),
        ("[[passes]", "is not valid TOML"),
    ],
)
@pytest.mark.parametrize("verb", ["rewrite", "compress"])
def test_recipe(fails, tmp_path, model_path, data_path, verb, text, message):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("version = 1\n" + text, encoding="utf-8")
    found = fails(verb, model_path, "-o", tmp_path / "out", "--recipe", recipe, "--data", data_path)
    assert message in found


def test_recipe_of_another_version(fails, tmp_path, model_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("version = 7\npasses = []", encoding="utf-8")
    message = fails("rewrite", model_path, "-o", tmp_path / "out.onnx", "--recipe", recipe)
    assert "version is 7; this onnxcomp reads 'version = 1'" in message


def test_unknown_recipe_and_target(fails, tmp_path, model_path):
    out = ["-o", tmp_path / "out"]
    assert "unknown recipe 'int9'; did you mean 'int8'?" in fails("compress", model_path, *out, "--recipe", "int9")
    assert "unknown target 'ort-cpi'; did you mean 'ort-cpu'?" in fails("compile", model_path, *out, "-t", "ort-cpi")


def save(path, **arrays):
    np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"input": np.zeros((3, 8), np.float32)}, "the model has no input 'input'; its inputs are ['x']"),
        ({"x": np.zeros((3, 8), np.int64)}, "input 'x' is int64; the model expects float32"),
        ({"x": np.zeros((3, 7), np.float32)}, "input 'x' has shape 1x7; the model expects batchx8"),
        ({"x": np.full((3, 8), np.nan, np.float32)}, "sample 0: input 'x' holds NaN or infinity"),
        ({"x": np.zeros((0, 8), np.float32)}, "is empty"),
        ({"x": np.array([print], dtype=object)}, "'x' holds Python objects, which are not read"),
    ],
)
@pytest.mark.parametrize("option", ["--data", "--eval-data"])
def test_data(fails, tmp_path, model_path, data_path, recipe_path, option, arrays, message):
    save(tmp_path / "bad.npz", **arrays)
    other = {"--data": "--eval-data", "--eval-data": "--data"}[option]
    arguments = [option, tmp_path / "bad.npz", other, data_path, "--recipe", recipe_path]
    assert message in fails("compress", model_path, "-o", tmp_path / "out", *arguments)


def test_nan_in_a_later_sample_stops_before_the_long_work(fails, tmp_path, model_path, x):
    x[30, 1] = np.nan
    save(tmp_path / "bad.npz", x=x)
    message = fails("compress", model_path, "-o", tmp_path / "out", "--data", tmp_path / "bad.npz")
    assert "bad.npz, sample 30: input 'x' holds NaN" in message


def test_data_that_is_not_there(fails, tmp_path, model_path):
    out = ["-o", tmp_path / "out.onnx"]
    assert "there is no data at" in fails("rewrite", model_path, *out, "--data", tmp_path / "none.npz")
    assert "cannot be imported" in fails("rewrite", model_path, *out, "--data", "no_such_module_3:f")


def test_no_data(fails, tmp_path, model_path):
    message = fails("compress", model_path, "-o", tmp_path / "out")
    assert "recipe 'int8', chosen for a model of kind other" in message
    assert "it needs calibration data; give some with --data" in message


def test_gate_without_data(fails, tmp_path, model_path):
    for gate in ("--max-drop", "--min-sqnr"):
        assert "need evaluation data" in fails("compress", model_path, "-o", tmp_path / "out", gate, "0.1")


def test_a_metric_that_fails(fails, tmp_path, monkeypatch, model_path, data_path, recipe_path):
    (tmp_path / "metrics_1.py").write_text("def broken(run):\n    return {}['top1']\ndef none(run):\n    return None\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    arguments = ["--data", data_path, "--recipe", recipe_path, "--no-measure"]
    for name, reason in {"broken": "KeyError: 'top1'", "none": "TypeError"}.items():
        message = fails("compress", model_path, "-o", "out", *arguments, "--metric", f"metrics_1:{name}")
        assert f"the metric metrics_1:{name} has to return a number" in message
        assert reason in message
    assert "has no function" in fails("compress", model_path, "-o", "out", *arguments, "--metric", "metrics_1:x")
    assert "needs evaluation data" in fails("compress", model_path, "-o", "out", "--metric", "metrics_1:none")
