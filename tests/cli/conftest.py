"""The command line with its output read as JSON, or expected to fail; tests get them as fixtures."""

import json

import pytest


@pytest.fixture
def as_json(cli):
    """Runs the command line with `--json`; stdout has to be JSON and nothing else."""

    def call(*arguments, code=0):
        found, out, err = cli(*arguments, "--json")
        assert found == code, err
        return json.loads(out)

    return call


@pytest.fixture
def quantized(cli, tmp_path, model_path, data_path, recipe_path):
    out = tmp_path / "int8.onnx"
    code, _, err = cli("rewrite", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path)
    assert code == 0, err
    return out


@pytest.fixture
def fails(cli, snapshot, tmp_path):
    """Runs the command line, asserts that it fails properly, and gives the message."""

    def call(*arguments, code=2):
        before = snapshot(tmp_path)
        found, out, err = cli(*arguments)
        assert found == code, (out, err)
        assert "Traceback" not in err
        assert out == ""
        assert snapshot(tmp_path) == before
        told, error, message = err.partition("error: ")
        assert error, err
        assert all(line.startswith("kind: ") for line in told.splitlines()), err
        return message

    return call


@pytest.fixture
def output(cli, tmp_path, model_path, data_path, recipe_path):
    """An earlier output."""
    out = tmp_path / "out"
    code, _, err = cli("compress", model_path, "-o", out, "--data", data_path, "--recipe", recipe_path, "--no-measure")
    assert code == 0, err
    return out
