"""The recipe for N:M weights, from the float model to the kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder

from onnxcomp import api, native
from onnxcomp.targets.ort import OrtCpu, reference_runner

WIDTH = 256


@pytest.fixture
def mlp():
    """Three layers, of which the last is the output layer."""
    b = Builder()
    x = b.input("x", ["rows", WIDTH])
    for width in (384, WIDTH):
        given = WIDTH if width == 384 else 384
        x = b.op("Add", b.op("MatMul", x, b.floats(given, width)), b.floats(width))
        x = b.op("Relu", x)
    return b.output(b.op("Gemm", x, b.floats(WIDTH, 16), b.floats(16), name="head")).model()


@pytest.fixture
def feeds():
    """Inputs that depend on one another."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(WIDTH // 4, WIDTH)) / 8
    return [{"x": (rng.normal(size=(32, WIDTH // 4)) @ mixing).astype(np.float32)} for _ in range(12)]


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_recipe(mlp, feeds, tmp_path):
    ir.save(mlp, tmp_path / "model.onnx")
    report = api.compress(tmp_path / "model.onnx", tmp_path / "out", recipe="nm24_int8", data=feeds, repeat=5)
    done = {p.name: [e for e in p.edits if e.action == "applied"] for p in report.passes}
    assert len(done["nm_mask"]) == len(done["nm_pack"]) == 2
    assert all("2:4 int8: " in e.detail for e in done["nm_pack"])
    assert report.after.audit.executed_ops["NMMatMulInt8"] == 2
    assert "Add" not in report.after.audit.executed_ops, "the kernels add the biases"
    assert report.after.size.macs < 0.6 * report.before.size.macs
    assert report.fidelity.outputs[0].sqnr > 10
    name = mlp.graph.outputs[0].name
    # The file by itself, in a runtime without the library, and the artifact.
    portable = reference_runner(ir.load(tmp_path / "out" / "model.onnx"), [name])(feeds[0])[name]
    target = OrtCpu()
    fast = target.load(target.open(tmp_path / "out" / "artifact")).run(feeds[0])[name]
    assert np.abs(fast - portable).max() < 0.02 * np.abs(portable).max()
