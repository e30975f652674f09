"""Files are as small as the formula says: N values of so many bits and N indices of ceil(log2 M) bits for M weights."""

from __future__ import annotations

import tracemalloc

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxcomp.model import load, save
from onnxcomp.passes.nm_pack import NmPack

FORMATS = [("2:4", "float16", 16), ("2:4", "int8", 8), ("1:4", "int8", 8), ("1:8", "int8", 8)]


def sparse(k: int, n: int, pattern: str, seed: int = 0) -> np.ndarray:
    """(K, N), exactly so many nonzeros in every group of rows."""
    kept, size = map(int, pattern.split(":"))
    weight = np.random.default_rng(seed).standard_normal((k, n), np.float32)
    return np.where((np.arange(k)[:, None] + 3 * np.arange(n)) % size < kept, weight, np.float32(0))


def bits_of(pattern: str, bits: int) -> float:
    kept, size = map(int, pattern.split(":"))
    return kept * (bits + (size - 1).bit_length()) / size


@pytest.mark.parametrize(("pattern", "values", "bits"), FORMATS)
def test_one_matrix(pattern, values, bits, b, run_passes, run, tmp_path):
    size = 2048
    weight = sparse(size, size, pattern)
    y = b.op("MatMul", b.input("x", [1, size]), b.const(weight), name="layer")
    model = b.output(y).model()
    run_passes(model, NmPack(values=values))
    path = tmp_path / "packed.onnx"
    save(model, path)
    assert path.stat().st_size == pytest.approx(bits_of(pattern, bits) * size * size / 8, rel=0.02)
    x = np.random.default_rng(1).standard_normal((1, size), np.float32)
    expected = x @ weight
    assert np.abs(run(path, {"x": x})[0] - expected).max() < 0.03 * np.abs(expected).max()


def decoder(b, pattern: str, width: int = 512, hidden: int = 1536, layers: int = 3) -> tuple[ir.Model, int]:
    """A table, projections and gated feed-forward blocks as of a language model; with the number of sparse weights."""
    x = b.op("Gather", b.const(np.random.default_rng(0).standard_normal((300, width), np.float32)), "ids", name="embed")
    b.input("ids", [1, "t"], onnx.TensorProto.INT64)
    count = 0

    def project(value: str, k: int, n: int, name: str) -> str:
        nonlocal count
        count += 1
        return b.op("MatMul", value, b.const(sparse(k, n, pattern, count) / np.float32(k) ** 0.5), name=name)

    for i in range(layers):
        q, k, v = (project(x, width, width, f"{part}{i}") for part in "qkv")
        scores = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
        x = b.op("Add", x, project(b.op("MatMul", scores, v), width, width, f"o{i}"))
        gate = b.op("Sigmoid", project(x, width, hidden, f"gate{i}"))
        up = b.op("Mul", gate, project(x, width, hidden, f"up{i}"))
        x = b.op("Add", x, project(up, hidden, width, f"down{i}"))
    return b.output(x).model(), layers * (4 * width * width + 3 * width * hidden)


@pytest.mark.parametrize(("pattern", "values", "bits"), FORMATS)
def test_many_layers(pattern, values, bits, b, run_passes, run, tmp_path):
    model, weights = decoder(b, pattern)
    path = tmp_path / "dense.onnx"
    save(model, path)
    dense, ids = path.stat().st_size, {"ids": np.array([[1, 5, 299]])}
    expected = run(path, ids)[0]
    report = run_passes(model, NmPack(values=values))
    assert report.applied == 3 * 7
    save(model, path)
    scales = 4 * 3 * (5 * 512 + 2 * 1536) if values == "int8" else 0
    packed = path.stat().st_size - (dense - 4 * weights)
    assert packed == pytest.approx(bits_of(pattern, bits) * weights / 8 + scales, rel=0.02)
    assert np.abs(run(path, ids)[0] - expected).max() < 0.05 * np.abs(expected).max()


def test_weights_on_disk_are_packed_one_at_a_time(b, run_passes, tmp_path):
    """Memory holds what one weight takes meanwhile; all packed ones would take thirteen times as much as one dense."""
    x, size, layers = b.input("x", [1, 1024]), 1024, 24
    weight = sparse(size, size, "2:4")
    for i in range(layers):
        x = b.op("MatMul", x, b.const(weight + np.float32(i) * (weight != 0)), name=f"layer{i}")
    path = tmp_path / "m.onnx"
    onnx.save(ir.to_proto(b.output(x).model()), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    b.weights.clear()
    model = load(path)
    tracemalloc.start()
    try:
        report = run_passes(model, NmPack())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.applied == layers
    assert peak < 6 * weight.nbytes
    packed = [v.const_value for v in model.graph.initializers.values()]
    assert all(isinstance(tensor, ir.LazyTensor) for tensor in packed)
    assert sum(tensor.nbytes for tensor in packed) == layers * weight.nbytes * 17 // 32
