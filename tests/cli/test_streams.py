"""`onnxcomp profile --stream`."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
import streams


@pytest.fixture
def folder(tmp_path):
    """Holds a step model, the dense one, and a sequence."""
    model, _ = streams.delta(streams.cnn(), streams.frames(6), threshold=0.0)
    ir.save(model, tmp_path / "step.onnx")
    ir.save(streams.cnn(), tmp_path / "dense.onnx")
    np.savez(tmp_path / "frames.npz", x=np.concatenate([f["x"] for f in streams.frames(30)]))
    return tmp_path


def test_stream(cli, as_json, folder):
    code, _, err = cli("compile", folder / "step.onnx", "-o", folder / "artifact")
    assert code == 0, err
    arguments = ["profile", folder / "artifact", "--stream", "--data", folder / "frames.npz", "--repeat", 6]
    found = as_json(*arguments, "--baseline", folder / "dense.onnx", "--plot", folder / "stream.html")
    assert len(found["steps"]) == 30
    assert found["steps"][0]["density"] is None
    assert set(found["steps"][1]) == {"step", "density", "state_density", "model_ms", "baseline_ms", "ratio", "error"}
    assert (found["threads"], found["ratio"]["rounds"], found["model"]["passes"]["samples"]) == (1, 6, 6)
    assert found["verdict"]
    assert {"density", "model_ms", "baseline_ms", "ratio", "steps"} == set(found["low"]) == set(found["high"])
    assert "<h1>Stream through artifact</h1>" in (folder / "stream.html").read_text(encoding="utf-8")

    code, out, err = cli(*arguments, "--baseline", folder / "dense.onnx", "--plot", folder / "stream.html")
    assert (code, err) == (0, "")
    for part in (
        "p90 ms", "quarter of lowest density", "quarter of highest density", "of the state", "28 - 29", "median",
        "30 steps of", "6 passes", "1 thread(s) on ort-cpu", "interval", f"plot: {folder / 'stream.html'}",
    ):  # fmt: skip
        assert part in out, part

    code, out, err = cli(*arguments, "--samples", 4)
    assert (code, err) == (0, "")
    assert "4 steps of" in out
    assert "interval" not in out
    lines = [line.split()[0] for line in out.splitlines() if line[:1].isdigit()]
    assert lines == ["0", "1", "2", "3", "4"]


def test_a_stream_is_asked_for(cli, folder):
    code, out, _ = cli("profile", folder / "step.onnx", "--data", folder / "frames.npz", "--repeat", 5)
    assert code == 0
    assert "the model carries state: one feed over and over is no stream; give a sequence with --stream" in out
    code, out, _ = cli("profile", folder / "dense.onnx", "--data", folder / "frames.npz", "--repeat", 5, "--json")
    assert json.loads(out)["carries_state"] is False


def test_refused(fails, folder):
    stream = ["profile", folder / "step.onnx", "--stream"]
    assert "instead of random" in fails(*stream)
    assert "2 or more" in fails(*stream, "--data", folder / "frames.npz", "--samples", 1).replace("two", "2")
    assert "ends in .html" in fails(*stream, "--data", folder / "frames.npz", "--plot", folder / "plot.png")
    plain = ["profile", folder / "step.onnx", "--data", folder / "frames.npz"]
    for option in (["--samples", 3], ["--plot", folder / "plot.html"]):
        assert "give --stream as well" in fails(*plain, *option)
