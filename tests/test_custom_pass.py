"""The package of `examples/custom_pass` as a third party would use it: installed, found, run and held to account."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_pass"

RUN = """
import sys
import numpy as np
import onnxcomp.api
from onnxcomp.model import load
from onnxcomp.recipe import load_recipe
from onnxcomp.registry import PASSES, load_pass, names
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner

assert "clip_weights" in names(PASSES), names(PASSES)
assert load_pass("clip_weights").__module__ == "onnxcomp_clip_weights"
assert "clip_weights" in onnxcomp.api.list_passes()
recipe = load_recipe(sys.argv[1])
model = load(sys.argv[2])
data = [{"x": np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)}]
pipeline = Pipeline(passes=recipe.passes, capabilities=OrtCpu().capabilities(), runner=reference_runner)
for report in pipeline.run(model, data):
    print(report.name, report.applied)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a Python that has the example installed beside what this one has."""
    pytest.importorskip("setuptools", reason="builds the example")
    folder = tmp_path_factory.mktemp("custom_pass")
    source, site = folder / "source", folder / "site"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(source)], check=True, timeout=300
    )
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def python(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_listed_and_its_recipe_runs(environment, mlp, tmp_path):
    import numpy as np
    import onnx

    model = mlp()
    weight = next(w for w in model.graph.initializer if w.name == "w1")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[0, 0] = 1000.0
    weight.CopyFrom(onnx.numpy_helper.from_array(np.asarray(array), "w1"))
    onnx.save(model, tmp_path / "model.onnx")
    reports = dict(
        line.split()
        for line in python(environment, "-c", RUN, EXAMPLE / "recipe.toml", tmp_path / "model.onnx").splitlines()
    )
    assert list(reports) == ["cleanup", "clip_weights", "quantize"]
    assert int(reports["clip_weights"]) >= 1
    assert int(reports["quantize"]) >= 2


def test_a_mistake_in_its_configuration_is_named(environment, tmp_path):
    recipe = tmp_path / "wrong.toml"
    recipe.write_text('version = 1\n[[passes]]\npass = "clip_weights"\nsigma = 3\n', encoding="utf-8")
    code = (
        "import sys, onnxcomp.recipe as r\n"
        "try:\n    r.load_recipe(sys.argv[1])\nexcept r.RecipeError as e:\n    print(e)"
    )
    said = python(environment, "-c", code, recipe)
    assert "passes[0]: unknown key 'sigma'; clip_weights has ['sigmas', 'where']" in said


def test_its_own_contract_test_passes(environment, tmp_path):
    shutil.copytree(EXAMPLE / "tests", tmp_path / "tests")
    said = python(environment, "-m", "pytest", "-q", f"--rootdir={tmp_path}", "-p", "no:benchmark", tmp_path / "tests")
    assert "4 passed" in said


def test_it_is_not_registered_without_being_installed():
    from onnxcomp.registry import PASSES, names

    assert "clip_weights" not in names(PASSES)
