"""Ops with N:M sparse weights: what is packed comes out again, and body and reference multiply by just that.

The functions are run by ONNX Runtime and by ONNX's own evaluator. Tolerances are those of a float sum of K terms.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions
from onnx.reference import ReferenceEvaluator

from onnxcomp.errors import GraphError
from onnxcomp.ops import (
    DOMAIN,
    MIN_OPSET,
    NM_OPS,
    OPS,
    index_bits,
    keeps_to,
    nm_matmul,
    pack_nm,
    packed_bytes,
    smallest_pattern,
    unpack_nm,
)
from onnxcomp.ops import _nm_packing as packing
from onnxcomp.ops import _nm_patterns as patterns

NEWEST = onnx.defs.onnx_opset_version()
RUN_NEWEST = 23  # what the ONNX Runtime at hand is sure to know
TOLERANCE = {np.float16: 2e-2, np.float32: 1e-5, np.float64: 1e-5}


def sparse(seed: int, k: int, columns: int, n: int, m: int) -> np.ndarray:
    """Up to `n` nonzeros in each group of `m` rows, none at all in every third column."""
    random = np.random.default_rng(seed)
    groups = -(-k // m)
    order = random.random((groups, m, columns)).argsort(axis=1).argsort(axis=1)
    kept = order < random.integers(0, n + 1, (groups, 1, columns))
    kept[:, :, 2::3] = False
    return np.where(kept.reshape(-1, columns)[:k], random.normal(size=(k, columns)), 0.0)


def call(op_type: str, weights: list[np.ndarray], x: type, *, m: int, k: int, opset: int = 18, rank: int = 2) -> bytes:
    """A model that is one call, of any leading sizes, checked."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(x))
    lead = [f"d{i}" for i in range(rank - 1)]
    node = helper.make_node(op_type, ["x", *(f"w{i}" for i in range(len(weights)))], ["y"], domain=DOMAIN, m=m, k=k)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, [*lead, k])],
        [helper.make_tensor_value_info("y", kind, [*lead, weights[0].shape[1]])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))
    NM_OPS[op_type].install(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString()


def everywhere(model: bytes, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [session.run(None, {"x": x})[0], ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"x": x})[0]]


# K, columns, N, M: K that M does not divide, slots that 8 does not divide, one column, more slots than rows.
CASES = [
    (16, 5, 1, 2), (17, 1, 1, 2), (4, 3, 2, 4), (37, 6, 2, 4), (36, 1, 1, 4), (2, 3, 2, 4), (40, 7, 4, 8),
    (37, 3, 3, 8), (9, 3, 1, 8), (100, 4, 8, 16), (50, 3, 5, 16), (48, 2, 1, 16), (96, 3, 16, 32), (65, 3, 2, 32),
    (70, 3, 7, 64), (130, 3, 9, 128), (300, 3, 5, 256), (1, 1, 1, 2), (30, 3, 3, 5), (40, 3, 4, 20), (24, 3, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize("op_type", ["NMMatMul", "NMMatMulInt8"])
@pytest.mark.parametrize(("k", "columns", "n", "m"), CASES)
def test_body_and_reference_equal_the_dense_product(op_type, k, columns, n, m):
    weight = sparse(k, k, columns, n, m)
    if op_type == "NMMatMul":
        weight = weight.astype(np.float32)
        weights = [*pack_nm(weight, n, m)]
    else:
        integers = np.rint(np.clip(weight * 50, -128, 127)).astype(np.int8)
        scale = np.linspace(0.5, 2.0, columns, dtype=np.float32)
        weights = [*pack_nm(integers, n, m), scale]
        weight = integers * scale
    x = np.random.default_rng(1).normal(size=(5, k)).astype(np.float32)
    found = [
        NM_OPS[op_type].reference(x, *weights, m=m, k=k),
        *everywhere(call(op_type, weights, np.float32, m=m, k=k), x),
    ]
    for result in found:
        assert (result.dtype, result.shape) == (np.float32, (5, columns))
        np.testing.assert_allclose(result, x @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("opset", [MIN_OPSET, 21, RUN_NEWEST])
@pytest.mark.parametrize("x_type", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value_type", [np.float16, np.float32, np.int8])
def test_types(value_type, x_type, opset):
    """Whatever values are stored as, the product is one of the type of the inputs."""
    weight = sparse(0, 37, 6, 3, 8)
    weight = np.rint(weight * 30).astype(np.int8) if value_type == np.int8 else weight.astype(value_type)
    weights, op_type = [*pack_nm(weight, 3, 8)], "NMMatMul"
    dense = weight.astype(np.float64)
    if value_type == np.int8:
        weights, op_type = [*weights, np.linspace(0.01, 0.03, 6, dtype=np.float32)], "NMMatMulInt8"
        dense = dense * weights[-1]
    assert weights[0].dtype == value_type
    x = np.random.default_rng(1).normal(size=(2, 37)).astype(x_type)
    found = [NM_OPS[op_type].reference(x, *weights, m=8, k=37)]
    found += everywhere(call(op_type, weights, x_type, m=8, k=37, opset=opset), x)
    for result in found:
        assert result.dtype == x_type
        np.testing.assert_allclose(result, x.astype(np.float64) @ dense, rtol=0, atol=2 * TOLERANCE[x_type])


@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 3), (2, 1, 4)])
def test_leading_dimensions(shape):
    weights = [*pack_nm(sparse(0, 13, 4, 2, 4).astype(np.float32), 2, 4)]
    x = np.random.default_rng(0).normal(size=(*shape, 13)).astype(np.float32)
    expected = nm_matmul(x, *weights, m=4, k=13)
    assert expected.shape == (*shape, 4)
    for result in everywhere(call("NMMatMul", weights, np.float32, m=4, k=13, rank=x.ndim), x):
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_body_is_valid_in_every_opset():
    for opset in range(MIN_OPSET, NEWEST + 1):
        call(
            "NMMatMulInt8",
            [*pack_nm(np.eye(8, dtype=np.int8), 1, 4), np.ones(8, np.float32)],
            np.float32,
            m=4,
            k=8,
            opset=opset,
        )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("x_type", [np.float32, np.float16])
@pytest.mark.parametrize("inlined", [False, True])
def test_runtimes_unpack_once(inlined, x_type, dtype, tmp_path):
    """ONNX Runtime computes the dense weight when it loads the model; nothing of the unpacking is left."""
    weights = [*pack_nm((sparse(0, 64, 16, 2, 4) * 20).astype(dtype), 2, 4)]
    weights += [np.ones(16, np.float32)] if dtype == np.int8 else []
    op_type = "NMMatMulInt8" if dtype == np.int8 else "NMMatMul"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = call(op_type, weights, x_type, m=4, k=64)
    if inlined:
        model = inline_local_functions(onnx.load_from_string(model)).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert {n.op_type for n in graph.node} <= {"MatMul", "Cast"}
    assert [n.op_type for n in graph.node].count("MatMul") == 1
    assert [list(i.dims) for i in graph.initializer] == [[64, 16]]


@settings(deadline=None)
@given(st.data())
def test_packed_weights_come_out_again(data):
    m = data.draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 100, 128, 256])), "m")
    n = data.draw(st.integers(1, m), "n")
    k, columns = data.draw(st.integers(1, 3 * m), "k"), data.draw(st.integers(1, 5), "columns")
    dtype = data.draw(st.sampled_from([np.float32, np.float16, np.int8]))
    weight = (sparse(data.draw(st.integers(0, 99)), k, columns, n, m) * 40).astype(dtype)
    values, indices = pack_nm(weight, n, m)
    slots, bits = -(-k // m) * n, index_bits(m)
    assert (values.dtype, values.shape) == (dtype, (slots, columns))
    assert (indices.dtype, indices.shape) == (np.uint8, (-(-slots // 8) * bits, columns))
    assert values.nbytes + indices.nbytes == packed_bytes(weight.shape, n, m, 8 * values.itemsize)
    np.testing.assert_array_equal(unpack_nm(values, indices, m=m, k=k), weight)
    places = by_bits(indices, bits, slots).reshape(-1, n, columns)
    assert (np.diff(places, axis=1) > 0).all()
    assert places.max() < m
    assert not by_bits(indices, bits, len(indices) // bits * 8)[slots:].any()


def by_bits(indices: np.ndarray, bits: int, slots: int) -> np.ndarray:
    """Reads indices one by one, as the format is told: words of eight slots, low bits and low bytes first."""
    words = indices.reshape(-1, bits, indices.shape[1]).astype(object)
    whole = sum(words[:, r] << (8 * r) for r in range(bits))
    return np.stack([whole[s // 8] >> (s % 8 * bits) & ((1 << bits) - 1) for s in range(slots)]).astype(int)


def test_format_of_two_of_four():
    """Two bits an index, four slots a byte, low bits first; groups follow each other."""
    weight = np.float32([[0, 1, 0, 2], [3, 0, 0, 4], [5, 6, 0, 0], [0, 0, 0, 7], [8, 9, 0, 0]]).T
    weight = np.concatenate([weight] * 3)
    values, indices = pack_nm(weight, 2, 4)
    # A slot to spare has the first of the zeros.
    assert values[:2].tolist() == [[1, 3, 5, 0, 8], [2, 4, 6, 7, 9]]
    one = lambda low, high: low | high << 2  # noqa: E731
    pairs = [one(1, 3), one(0, 3), one(0, 1), one(0, 3), one(0, 1)]
    assert indices.tolist() == [[p | p << 4 for p in pairs], pairs]


def test_weights_are_packed_in_parts(monkeypatch):
    weight = sparse(0, 1000, 7, 3, 8).astype(np.float32)
    whole = pack_nm(weight, 3, 8)
    found = smallest_pattern(weight, 32)
    for module in (packing, patterns):
        monkeypatch.setattr(module, "_CHUNK", 100)
    for part, wanted in zip(pack_nm(weight, 3, 8), whole, strict=True):
        np.testing.assert_array_equal(part, wanted)
    np.testing.assert_array_equal(unpack_nm(*whole, m=8, k=1000), weight)
    assert smallest_pattern(weight, 32) == found
    assert keeps_to(weight, 3, 8)
    weight[-8:] = 1
    assert not keeps_to(weight, 3, 8)
    with pytest.raises(GraphError, match="have up to 8 nonzeros, more than 3"):
        pack_nm(weight, 3, 8)


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 1), (1, 257)])
def test_no_such_pattern(n, m):
    with pytest.raises(GraphError, match=f"{n}:{m} is no pattern"):
        pack_nm(np.zeros((8, 2), np.float32), n, m)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 3, 4)])
def test_no_matrix(shape):
    with pytest.raises(GraphError, match="cannot be packed; it has to be a matrix"):
        pack_nm(np.zeros(shape, np.float32), 1, 2)


@given(st.integers(0, 9999), st.integers(1, 80), st.integers(1, 4), st.sampled_from([8, 16, 32]))
def test_smallest_pattern_is_one_that_holds(seed, k, columns, bits):
    random = np.random.default_rng(seed)
    weight = np.where(random.random((k, columns)) < random.choice([0.02, 0.1, 0.3]), 1.0, 0.0)
    all_of_them = [(1 << i, 1 << j) for j in range(1, 6) for i in range(j)]
    held = [p for p in all_of_them if keeps_to(weight, *p)]
    takes = {p: packed_bytes(weight.shape, *p, bits) for p in held}
    found = smallest_pattern(weight, bits)
    if found is None:
        assert all(8 * size >= weight.size * bits for size in takes.values())
    else:
        assert takes[found] == min(takes.values()) < weight.size * bits / 8
        pack_nm(weight, *found)


def test_zero_may_be_another_integer():
    weight = np.uint8([[3, 5], [3, 9], [7, 5], [3, 5]] * 8)
    assert smallest_pattern(weight, 8) is None
    zero: Any = np.broadcast_to(np.uint8([[3, 5]]), weight.shape)
    assert smallest_pattern(weight, 8, zero) == (1, 4)
    assert keeps_to(weight, 1, 4, zero)


def test_their_names_are_free():
    assert NM_OPS.keys() == {"NMMatMul", "NMMatMulInt8"}
    for name, op in NM_OPS.items():
        assert op.name == name
        assert name not in OPS or OPS[name] is op
