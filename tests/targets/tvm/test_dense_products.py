"""Sparse products that do not pay on a target."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

from onnxcomp.break_even import BreakEven  # noqa: E402
from onnxcomp.model import infer_shapes  # noqa: E402
from onnxcomp.ops import DOMAIN, OPS, SPARSITY  # noqa: E402
from onnxcomp.passes.threshold import Threshold  # noqa: E402
from onnxcomp.rewrite import Pipeline  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm import TvmCpu  # noqa: E402

ROWS, K, N = 3, 32, 24


def model_of(rows: int) -> ir.Model:
    rng = np.random.default_rng(0)

    def value(name: str, size: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape((rows, size)), type=ir.TensorType(ir.DataType.FLOAT))

    def weight(name: str, k: int, n: int) -> ir.Value:
        array = rng.standard_normal((k, n), np.float32) / np.float32(np.sqrt(k))
        found = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape((k, n)))
        found.type = ir.TensorType(ir.DataType.FLOAT)
        return found

    x, wide, gate, hidden, y = (value(n, s) for n, s in zip("xwghy", (16, K, K, K, N), strict=True))
    first, second = weight("up", 16, K), weight("down", K, N)
    nodes = [
        ir.node("MatMul", [x, first], outputs=[wide], name="up"),
        ir.node("Sigmoid", [wide], outputs=[gate], name="gate"),
        ir.node("Mul", [wide, gate], outputs=[hidden], name="silu"),
        ir.node("MatMul", [hidden, second], outputs=[y], name="down"),
    ]
    graph = ir.Graph([x], [y], nodes=nodes, initializers=[first, second], opset_imports={"": 21}, name="m")
    return ir.Model(graph, ir_version=10)


def thresholded(share: float, rows: int = ROWS) -> ir.Model:
    model = model_of(rows)
    infer_shapes(model)
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.standard_normal((rows, 16), np.float32)} for _ in range(8)]
    step = Threshold(method="teal", sparsity=share, weights="keep", only_if_faster=False)
    Pipeline(passes=[step], capabilities=TvmCpu().capabilities(), runner=reference_runner).run(model, feeds)
    assert any(n.op_type == "ThresholdMatMul" for n in model.graph)
    return model


def compiled(model: ir.Model, tmp_path, monkeypatch, sparsity: float):
    entry = BreakEven(
        op="matmul", weights="fp32", dense="fp32", inputs=K, outputs=N, rows=ROWS, threads=1, sparsity=sparsity
    )
    target = TvmCpu()
    about = dataclasses.replace(target.capabilities(), break_even=(entry,))
    monkeypatch.setattr(target, "capabilities", lambda: about)
    return target, target.compile(model, tmp_path / "out")


def test_a_product_that_leaves_out_too_little_is_dense_and_computes_the_same(tmp_path, monkeypatch):
    model = thresholded(0.3)
    target, artifact = compiled(model, tmp_path, monkeypatch, 0.6)
    assert "SparseMatMul" not in artifact.audit.executed_ops
    row = next(r for r in artifact.audit.rows if r.node == "down")
    assert "of its inputs are dropped" in row.reason
    assert "faster from 60% on" in row.reason
    feed = {"x": np.random.default_rng(2).standard_normal((ROWS, 16)).astype(np.float32)}
    wanted = reference_runner(model, ["y"])(feed)["y"]
    found = target.load(artifact).run(feed)["y"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_that_pays_stays_sparse(tmp_path, monkeypatch):
    _, artifact = compiled(thresholded(0.8), tmp_path, monkeypatch, 0.6)
    assert artifact.audit.executed_ops["SparseMatMul"] == 2
    assert all(not row.reason for row in artifact.audit.rows)


def test_not_a_number_stays_one_in_a_dense_product(tmp_path, monkeypatch):
    target, artifact = compiled(thresholded(0.3), tmp_path, monkeypatch, 0.6)
    x = np.zeros((ROWS, 16), np.float32)
    x[1, 2] = np.nan
    found = target.load(artifact).run({"x": x})["y"]
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()


def gated(one_sided: int) -> ir.Model:
    """`GatedMLP(gates, x, up, down, threshold)`, of which calibration said that 30 % of the neurons are dropped."""
    rng = np.random.default_rng(3)

    def value(name: str, *shape: int) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    def constant(name: str, array: np.ndarray) -> ir.Value:
        found = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
        found.type = ir.TensorType(ir.DataType.FLOAT)
        return found

    gates, x, y = value("gates", ROWS, K), value("x", ROWS, 16), value("y", ROWS, N)
    weights = [
        constant("up", rng.standard_normal((16, K)).astype(np.float32)),
        constant("down", rng.standard_normal((K, N)).astype(np.float32)),
        constant("limit", np.float32(0.4)),
    ]
    attributes = {"one_sided": one_sided}
    node = ir.node("GatedMLP", [gates, x, *weights], attributes, domain=DOMAIN, outputs=[y], name="mlp")
    node.metadata_props[SPARSITY] = "0.3"
    graph = ir.Graph([gates, x], [y], nodes=[node], initializers=weights, opset_imports={"": 21}, name="m")
    model = ir.Model(graph, ir_version=10)
    OPS["GatedMLP"].install(model)
    return model


@pytest.mark.parametrize("one_sided", [0, 1])
def test_a_gated_mlp_becomes_two_products_that_the_audit_counts(tmp_path, monkeypatch, one_sided):
    model, target = gated(one_sided), TvmCpu()
    entry = BreakEven(
        op="gated_mlp", weights="fp32", dense="fp32", inputs=16, outputs=K, rows=ROWS, threads=1, sparsity=0.6
    )
    about = dataclasses.replace(target.capabilities(), break_even=(entry,))
    monkeypatch.setattr(target, "capabilities", lambda: about)
    artifact = target.compile(model, tmp_path / "out")
    assert "GatedMLP" not in artifact.audit.executed_ops
    assert sum(row.macs for row in artifact.audit.rows) == ROWS * (16 * K + K * N)
    assert all("neurons are dropped" in row.reason for row in artifact.audit.rows)
    rng = np.random.default_rng(4)
    feed = {n: rng.standard_normal((ROWS, s)).astype(np.float32) for n, s in (("gates", K), ("x", 16))}
    wanted = reference_runner(model, ["y"])(feed)["y"]
    np.testing.assert_allclose(target.load(artifact).run(feed)["y"], wanted, rtol=1e-4, atol=1e-4)
