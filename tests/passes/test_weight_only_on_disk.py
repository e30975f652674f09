"""Weights in an external file are quantized part by part to what they would be in memory, and go back to disk."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp import blockwise
from onnxcomp.blockwise import Source, quantize_blocks
from onnxcomp.model import load, save
from onnxcomp.passes import _disk_weights
from onnxcomp.passes.weight_only import WeightOnly


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    """Parts of few elements, so that small matrices are cut both ways; temporary files where the test sees them."""
    monkeypatch.setattr(blockwise, "_READ", 2048)
    monkeypatch.setattr(blockwise, "_SLAB", 512)
    monkeypatch.setattr(_disk_weights, "_SMALL", 64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()


def on_disk(model: ir.Model, path: Path) -> ir.Model:
    onnx.save(ir.to_proto(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return load(path)


def tied(b) -> ir.Model:
    """A table that is looked up and multiplied with, and a matrix of either layout, none a multiple of the block."""
    table = b.floats(70, 40)
    x = b.op("Gather", table, b.input("ids", ["t"], TensorProto.INT64), name="embed")
    x = b.op("MatMul", b.op("Tanh", x), b.floats(40, 100), name="first")
    x = b.op("Gemm", b.op("Tanh", x), b.floats(40, 100), name="second", transB=1)
    return b.output(b.op("Gemm", x, table, name="head", transB=1)).model()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
def test_same_as_in_memory(form, bits, symmetric, b, run_passes, outputs, tmp_path):
    memory = tied(b)
    disk = on_disk(memory, tmp_path / "model.onnx")
    config = {"bits": bits, "form": form, "symmetric": symmetric, "min_weights": 0, "accuracy_level": 0}
    assert run_passes(disk, WeightOnly(**config)).edits == run_passes(memory, WeightOnly(**config)).edits
    assert set(disk.graph.initializers) == set(memory.graph.initializers)
    for name, value in memory.graph.initializers.items():
        other = disk.graph.initializers[name].const_value
        assert (other.dtype, other.shape) == (value.const_value.dtype, value.const_value.shape)
        assert other.tobytes() == value.const_value.tobytes()
        assert isinstance(other, ir.LazyTensor) == (value.const_value.nbytes >= 64 and "_q" in name) or "_q" not in name
    feed = {"ids": np.array([0, 69, 3])}
    np.testing.assert_array_equal(outputs(disk, feed)[0], outputs(memory, feed)[0])
    save(disk, tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink(missing_ok=True)
    np.testing.assert_array_equal(outputs(load(tmp_path / "model.onnx"), feed)[0], outputs(memory, feed)[0])


def test_temporary_files_go_with_the_model(b, run_passes, tmp_path):
    model = on_disk(tied(b), tmp_path / "model.onnx")
    run_passes(model, WeightOnly(min_weights=0))
    copy = model.clone()
    del model
    gc.collect()
    assert len(list((tmp_path / "spool").iterdir())) == 1
    assert all(v.const_value.tobytes() for v in copy.graph.initializers.values())
    del copy
    gc.collect()
    assert not list((tmp_path / "spool").iterdir())


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq"])
def test_parts_are_small_and_make_up_the_whole(method, column_major):
    weight = np.random.default_rng(0).normal(size=(90, 200)).astype(np.float32)
    seen = np.zeros(weight.shape, int)

    def read(rows: slice, columns: slice) -> np.ndarray:
        part = weight[rows, columns]
        assert part.size <= 90 * 32
        seen[rows, columns] += 1
        return part

    source = Source(shape=weight.shape, dtype=weight.dtype, column_major=column_major, read=read)
    found = quantize_blocks(source, 4, 32, symmetric=False, method=method)
    assert (seen == 1).all()
    whole = quantize_blocks(weight, 4, 32, symmetric=False, method=method)
    np.testing.assert_array_equal(found.codes, whole.codes)
    np.testing.assert_array_equal(found.scale, whole.scale)
    assert found.error == pytest.approx(whole.error)


def test_not_finite(b, run_passes, tmp_path):
    weight = np.ones((64, 64), np.float32)
    weight[63, 2] = np.inf
    model = b.output(b.op("MatMul", b.input("x", ["n", 64]), b.const(weight), name="node")).model()
    disk = on_disk(model, tmp_path / "model.onnx")
    (edit,) = run_passes(disk, WeightOnly(min_weights=0)).edits
    assert (edit.action, edit.detail) == ("refused", "its weight holds NaN or infinity")
