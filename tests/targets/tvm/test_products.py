"""Products with a constant matrix, and tables that are the weight of a product as well."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

from builder import Builder  # noqa: E402
from tvm_harness import BY_LANE, Compiled, lowered, machines, run_kernel  # noqa: E402

from onnxcomp.targets.tvm.kernels import gemm  # noqa: E402
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue  # noqa: E402
from onnxcomp.targets.tvm.kernels.table import table_rows  # noqa: E402
from onnxcomp.targets.tvm.lower.matmuls import MatMuls  # noqa: E402
from onnxcomp.targets.tvm.lower.products import Products  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402

BEST = machines()[-1]
each_machine = pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)


@each_machine
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_rows_of_a_packed_table(machine: Machine, dtype: str) -> None:
    table = np.random.default_rng(0).standard_normal((77, 13)).astype(np.float32)
    indices = np.array([0, 76, 31, -1, -77, 32], dtype)
    function = table_rows(machine, rows=None, k=13, n=77, dtype=dtype)
    found = run_kernel(function, machine, gemm.pack(machine, table.T), indices, shape=(6, 13))
    np.testing.assert_array_equal(found, table[indices])
    function = table_rows(machine, rows=1, k=13, n=77, dtype=dtype)
    found = run_kernel(function, machine, gemm.pack(machine, table.T), np.array([99], dtype), shape=(1, 13))
    np.testing.assert_array_equal(found[0], table[76])  # there is no such row, and nothing else is read


@pytest.mark.parametrize("machine", [*machines(), BY_LANE], ids=lambda m: m.name)
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 5, 1), (13, 33, 70), (29, 16, 97)])
@pytest.mark.parametrize("residual", [False, True])
def test_products(machine: Machine, rows: int, k: int, n: int, residual: bool) -> None:
    rng = np.random.default_rng(0)
    x, w, r = (rng.standard_normal(s).astype(np.float32) for s in ((rows, k), (k, n), (rows, n)))
    bias = rng.standard_normal(n).astype(np.float32)
    function = gemm.gemm(machine, rows=None, k=k, n=n, epilogue=Epilogue(residual=residual, activation="relu"))
    packed = [gemm.pack(machine, w), gemm.pack_bias(machine, bias, n)]
    found = run_kernel(function, machine, x, *packed, *[r] * residual, shape=(rows, n))
    np.testing.assert_allclose(found, np.maximum(0, x @ w + bias + r * residual), rtol=1e-5, atol=1e-5)


def tied(rows: object = 3, **gemm: float) -> ir.Model:
    """A table that is looked up, and a product with it."""
    b = Builder()
    table = b.floats(50, 24)
    x = b.op("Relu", b.op("Gather", table, b.input("ids", [2, rows], ir.DataType.INT64)))
    y = b.op("Gemm", b.op("Reshape", x, b.const(np.array([-1, 24]))), table, transB=1, **gemm)
    return b.output(y).model()


def ours(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in lowered(model, [Products(machine=BEST)]).graph if n.domain == "onnxcomp.tvm")


def test_a_tied_table_is_stored_once() -> None:
    model = tied()
    ids = np.array([[0, 49, 7], [-1, 3, 3]])
    table = model.graph.initializers[next(n for n in model.graph if n.op_type == "Gather").inputs[0].name]
    matrix = table.const_value.numpy()
    assert ours(model) == {"Gemm": 1, "TableRows": 1}
    compiled = Compiled(model, [Products(machine=BEST)], BEST)
    wanted = np.maximum(matrix[ids], 0).reshape(6, 24) @ matrix.T
    np.testing.assert_allclose(compiled.run({"ids": ids})[0], wanted, rtol=1e-5, atol=1e-5)
    weights = lowered(model, [Products(machine=BEST)]).graph.initializers.values()
    assert sum(math.prod(v.shape) >= matrix.size for v in weights if v.uses()) == 1


@pytest.mark.parametrize("folded", [False, True])
def test_a_table_is_tied_to_its_transpose(folded: bool) -> None:
    b = Builder()
    matrix = b.rng.standard_normal((50, 24)).astype(np.float32)
    table = b.const(matrix)
    x = b.op("Relu", b.op("Gather", table, b.input("ids", [2, 3], ir.DataType.INT64)))
    turned = b.const(matrix.T) if folded else b.op("Transpose", table, perm=[1, 0])
    model = b.output(b.op("MatMul", x, turned)).model()
    passes = [MatMuls(), Products(machine=BEST)]
    found = Counter(n.op_type for n in lowered(model, passes).graph)
    assert found == {"TableRows": 1, "Relu": 1, "Gemm": 1}
    ids = np.array([[0, 49, 7], [-1, 3, 3]])
    wanted = np.maximum(matrix[ids], 0) @ matrix.T
    np.testing.assert_allclose(Compiled(model, passes, BEST).run({"ids": ids})[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_table_that_others_read_stays() -> None:
    model = tied()
    gather = next(n for n in model.graph if n.op_type == "Gather")
    assert ours(tied(alpha=2.0)) == {"Gemm": 1}
    gather.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert ours(model) == {"Gemm": 1}
