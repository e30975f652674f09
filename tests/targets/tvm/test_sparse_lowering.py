"""Sparse portable ops, lowered and compiled by TVM, against their references."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

from sparse_ops import EXACT, FORMATS, OP_TYPES, Call, assert_close, make_call, portable  # noqa: E402
from tvm_harness import AVX512, Compiled, lowered, machines  # noqa: E402

from onnxcomp.ops import DOMAIN, NM_OPS, pack_nm  # noqa: E402
from onnxcomp.targets.tvm.lower.nm import Nm  # noqa: E402
from onnxcomp.targets.tvm.lower.products import Products  # noqa: E402
from onnxcomp.targets.tvm.lower.sparse import Sparse  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402

BEST = machines()[-1]


def stored(call: Call) -> ir.Model:
    """A model whose threshold is a weight, as the passes write it."""
    model = portable(call)
    for value in [v for v in model.graph.inputs if v.name == "threshold"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(call.inputs["threshold"], name="threshold")
        model.graph.register_initializer(value)
    return model


def run(call: Call, machine: Machine = BEST) -> np.ndarray:
    """What a call gives, compiled."""
    return Compiled(stored(call), [Sparse(machine=machine)], machine).run({**call.activations})[0]


@pytest.mark.parametrize("op_type", OP_TYPES)
def test_every_op_matches_its_reference(op_type: str) -> None:
    call = make_call(op_type, 70, 96, count=20, batch=(2,), f=90)
    assert_close(run(call), call, EXACT)


@pytest.mark.parametrize("op_type", ["ThresholdMatMulInt4", "GatedMLPInt4"])
@pytest.mark.parametrize("variant", [1, 2, 3])
def test_int4_scales_and_zero_points_of_each_kind(op_type: str, variant: int) -> None:
    call = make_call(op_type, 64, 160, variant=variant)
    assert_close(run(call), call, EXACT)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_threshold_for_each_input_and_one_side(suffix: str) -> None:
    call = make_call(f"ThresholdMatMul{suffix}", 64, 64, one_sided=1)
    rng = np.random.default_rng(1)
    call = call.with_inputs(threshold=rng.uniform(-1, 1, 64).astype(np.float32))
    assert_close(run(call), call, EXACT)


def test_any_number_of_rows() -> None:
    call = make_call("ThresholdMatMulInt8", 64, 96)
    model = stored(call)
    model.graph.inputs[0].shape = ir.Shape(["rows", 64])
    compiled = Compiled(model, [Sparse(machine=BEST)], BEST)
    for rows in (1, 3, 50):
        x = np.random.default_rng(rows).standard_normal((rows, 64)).astype(np.float32)
        given = call.with_inputs(X=x)
        assert_close(compiled.run(given.activations)[0], given, EXACT)


def test_nan_is_kept_and_nothing_is_a_product_of_nothing() -> None:
    call = make_call("ThresholdMatMul", 8, 40, threshold=2.0)
    x = np.zeros((1, 8), np.float32)
    compiled = Compiled(stored(call), [Sparse(machine=BEST)], BEST)
    feed = {**call.activations, "X": x}
    assert not compiled.run(feed)[0].any()
    x[0, 3] = np.nan
    assert np.isnan(compiled.run({**feed, "X": x})[0]).all()


def test_of_equal_magnitudes_the_first_count() -> None:
    call = make_call("TopKMatMul", 9, 32, count=4)
    x = np.array([[1, -2, 2, np.inf, 2, -2, 0, 2, 1]], np.float32)
    w = np.eye(9, 32, dtype=np.float32)
    call = call.with_inputs(X=x, W=w)
    places = np.flatnonzero(np.nan_to_num(run(call)[0], nan=0, posinf=9))
    assert set(places) <= {1, 2, 3, 4}


def test_the_function_goes_with_its_last_call() -> None:
    model = lowered(portable(make_call("TopKMatMulInt8", 16, 16, count=3)), [Sparse(machine=BEST)])
    assert not [key for key in model.functions if key[0] == DOMAIN]
    assert [node.op_type for node in model.graph] == ["SparseMatMul"]


def test_a_weight_that_is_computed_is_left_alone() -> None:
    model = portable(make_call("ThresholdMatMul", 16, 16))
    weight = model.graph.initializers.pop("W")
    weight.const_value = None
    model.graph.inputs.append(weight)
    left = lowered(model, [Sparse(machine=BEST)])
    assert [node.domain for node in left.graph] == [DOMAIN]


def nm_model(weight: np.ndarray, kept: int, m: int, rows: int, **attributes: int) -> ir.Model:
    """`x (rows, K)` times a weight of which `kept` of `m` are stored; integers with a scale of 0.02."""
    k, n = weight.shape
    values, indices = pack_nm(weight, n=kept, m=m)
    arrays = [values, indices] + [np.full(n, 0.02, np.float32)] * (weight.dtype == np.int8)
    op = "NMMatMulInt8" if weight.dtype == np.int8 else "NMMatMul"
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, k]))
    weights = [ir.Value(name=f"w{i}", const_value=ir.tensor(a, name=f"w{i}")) for i, a in enumerate(arrays)]
    for value, array in zip(weights, arrays, strict=True):
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    node = ir.node(op, [x, *weights], attributes={"m": m, "k": k, **attributes}, domain=DOMAIN, name="nm")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([rows, n])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    NM_OPS[op].install(model)
    return model


def nm_weight(kept: int, m: int, k: int, n: int, dtype: str) -> np.ndarray:
    """Normal weights, all but `kept` of each `m` zero."""
    rng = np.random.default_rng(kept)
    weight = rng.standard_normal((-(-k // m), m, n)) * 50
    weight[rng.random(weight.shape).argsort(axis=1) >= kept] = 0
    return weight.reshape(-1, n)[:k].astype(dtype)


@pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)
@pytest.mark.parametrize(
    ("kept", "m", "rows", "dtype"),
    [(1, 4, 1, "float32"), (2, 4, 6, "float16"), (1, 4, 5, "int8"), (2, 4, 1, "int8"), (1, 2, 1, "float32")],
)
def test_nm_product(machine: Machine, dtype: str, kept: int, m: int, rows: int) -> None:
    weight = nm_weight(kept, m, 70, 37, dtype)
    x = np.random.default_rng(0).standard_normal((rows, 70)).astype(np.float32)
    passes = [Nm(machine=machine), Products(machine=machine)]
    found = Compiled(nm_model(weight, kept, m, rows), passes, machine).run({"x": x})[0]
    expected = x.astype(np.float64) @ weight.astype(np.float64) * (0.02 if dtype == "int8" else 1)
    rounded = dtype == "int8" and machine.dot == "vnni512"
    np.testing.assert_allclose(found, expected, rtol=0, atol=(0.02 if rounded else 1e-5) * np.abs(expected).max())


def test_an_nm_product_that_a_dense_one_computes_better() -> None:
    for model in (
        nm_model(nm_weight(3, 4, 64, 32, "float32"), 3, 4, 1),
        nm_model(nm_weight(2, 4, 64, 32, "int8"), 2, 4, 1, exact=1),
        nm_model(nm_weight(2, 4, 64, 32, "float32"), 2, 4, 500),
    ):
        left = lowered(model, [Nm(machine=AVX512)])
        assert [(node.domain, node.op_type) for node in left.graph] == [("", "MatMul")]
        assert not left.functions
