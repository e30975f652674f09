"""N:M sparsity of models whose weights lie in a file: read from there, and written to a file again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp import api
from onnxcomp.model import load
from onnxcomp.ops import NM_OPS
from onnxcomp.passes import _disk_weights
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.permute import Permute
from onnxcomp.targets.ort import reference_runner

WIDTH, HIDDEN = 64, 96
FEEDS = [{"x": np.random.default_rng(i).normal(size=(8, WIDTH)).astype(np.float32)} for i in range(4)]
CHAIN = [NmMask(method="wanda", include_ends=True), NmPack()]


@pytest.fixture(autouse=True)
def small_weights(monkeypatch):
    monkeypatch.setattr(_disk_weights, "_SMALL", 64)


@pytest.fixture
def path(b, tmp_path) -> Path:
    """Two blocks with a residual stream, all weights and biases in `w.bin`."""
    x = b.input("x", ["rows", WIDTH])
    for _ in range(2):
        y = b.op("Add", b.op("MatMul", x, b.floats(WIDTH, HIDDEN)), b.floats(HIDDEN))
        y = b.op("Gemm", b.op("Relu", y), b.floats(WIDTH, HIDDEN), b.floats(WIDTH), transB=1)
        x = b.op("Add", x, y)
    y = b.op("MatMul", x, b.floats(WIDTH, 16), name="head")
    proto = ir.to_proto(b.output(y).model(20))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "m.onnx").stat().st_size < 8192 < (tmp_path / "w.bin").stat().st_size
    return tmp_path / "m.onnx"


def in_memory(path: Path) -> ir.Model:
    return ir.from_proto(onnx.load(path))


def outputs(model: ir.Model) -> np.ndarray:
    (name,) = (v.name for v in model.graph.outputs)
    return np.stack([reference_runner(model, [name])(feed)[name] for feed in FEEDS])


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_permute(path, tmp_path, score):
    before = outputs(in_memory(path))
    result = api.rewrite(path, tmp_path / "out.onnx", recipe=[Permute(score=score)], data=FEEDS)
    assert result.passes[0].applied
    written = load(tmp_path / "out.onnx")
    assert_near(outputs(written), before)
    moved = {v.name for v in written.graph.initializers.values()}
    assert moved == {v.name for v in load(path).graph.initializers.values()}
    assert any(
        not np.array_equal(v.const_value.numpy(), in_memory(path).graph.initializers[name].const_value.numpy())
        for name, v in written.graph.initializers.items()
    )


@pytest.mark.parametrize("chain", [CHAIN, [Permute(include_ends=True), *CHAIN]], ids=["plain", "permuted"])
def test_mask_and_pack(path, tmp_path, chain):
    memory = api.rewrite(in_memory(path), None, recipe=chain, data=FEEDS).model
    api.rewrite(path, tmp_path / "out.onnx", recipe=chain, data=FEEDS)
    written = load(tmp_path / "out.onnx")
    assert [n.op_type for n in written.graph if n.op_type in NM_OPS] == ["NMMatMul"] * 5
    assert_near(outputs(written), outputs(memory))
    size = (tmp_path / "out.onnx").stat().st_size + sum(f.stat().st_size for f in tmp_path.glob("out.onnx*.data"))
    assert size < 0.6 * path.with_name("w.bin").stat().st_size


def test_a_model_is_written_over_itself(path):
    expected = outputs(api.rewrite(in_memory(path), None, recipe=CHAIN, data=FEEDS).model)
    api.rewrite(path, path, recipe=CHAIN, data=FEEDS)
    assert_near(outputs(load(path)), expected)
