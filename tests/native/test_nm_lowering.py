"""N:M products of the portable ops on their way to native kernels or to dense products."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp import api, native
from onnxcomp.break_even import BreakEven
from onnxcomp.ops import DOMAIN, NM_OPS, pack_nm
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.nm_lowering import NativeNm, nm_blocks
from onnxcomp.targets.ort.runtime import make_session, session_options

needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built")
ROUNDED, EXACT = 0.01, 2e-5


def sparse(k: int, n: int, kept: int, m: int, dtype: type, seed: int = 0, density: float = 1.0) -> np.ndarray:
    """A weight that keeps `kept` of every `m`, some of them zero all the same."""
    rng = np.random.default_rng(seed)
    scores = rng.random((-(-k // m), m, n))
    mask = (scores.argsort(axis=1).argsort(axis=1) < kept).reshape(-1, n)[:k]
    mask &= rng.random(mask.shape) < density
    w = rng.integers(-128, 128, (k, n)) if dtype is np.int8 else rng.standard_normal((k, n))
    return np.where(mask, w, 0).astype(dtype)


def portable(
    w: np.ndarray, kept: int, m: int, *, rows: object = "rows", bias: bool = False, exact: int = 0
) -> ir.Model:
    k, n = w.shape
    values, indices = pack_nm(w, kept, m)
    arrays = {"values": values, "indices": indices}
    if w.dtype == np.int8:
        arrays["scale"] = np.linspace(0.01, 0.02, n, dtype=np.float32)
    weights = [ir.Value(name=name, const_value=ir.tensor(a, name=name)) for name, a in arrays.items()]
    for value in weights:
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    x = ir.Value(name="x", shape=ir.Shape([rows, k]), type=ir.TensorType(ir.DataType.FLOAT))
    op = NM_OPS["NMMatMulInt8" if "scale" in arrays else "NMMatMul"]
    attributes = {"m": m, "k": k, **({"exact": exact} if exact else {})}
    nodes = [ir.node(op.name, [x, *weights], domain=DOMAIN, attributes=attributes, name="product")]
    if bias:
        added = ir.Value(name="b", const_value=ir.tensor(np.linspace(-3, 3, n, dtype=np.float32), name="b"))
        weights.append(added)
        nodes.append(ir.node("Add", [nodes[0].outputs[0], added], name="add"))
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([rows, n]), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], [y], nodes=nodes, initializers=weights, opset_imports={"": 20, DOMAIN: 1}, name="g")
    model = ir.Model(graph, ir_version=9)
    op.install(model)
    return model


def lower(model: ir.Model, table: tuple[BreakEven, ...] = ()) -> list[tuple[str, str]]:
    capabilities = dataclasses.replace(OrtCpu().capabilities(), break_even=table)
    return [(e.action, e.detail) for e in NativeNm().apply(model, Context(capabilities=capabilities))]


def run(model: ir.Model, x: np.ndarray, threads: int = 1) -> np.ndarray:
    options = session_options(threads=threads, domains=model.opset_imports)
    return make_session(ir.to_proto(model).SerializeToString(), options).run(None, {"x": x})[0]


def dense(w: np.ndarray) -> np.ndarray:
    scale = np.linspace(0.01, 0.02, w.shape[1], dtype=np.float32) if w.dtype == np.int8 else 1.0
    return w.astype(np.float64) * scale


def assert_close(y: np.ndarray, x: np.ndarray, w: np.ndarray, tolerance: float, bias: float | np.ndarray = 0.0) -> None:
    x64, expected = x.astype(np.float64), dense(w)
    spread = np.sqrt(x64**2 @ expected**2) + 1e-6
    # What is rounded is rounded beside the largest of 128 inputs, whether its weight is zero or not.
    largest = np.abs(x64).max(axis=-1, keepdims=True) * np.sqrt((expected**2).sum(axis=0))
    np.testing.assert_array_less(np.abs(y - (x64 @ expected + bias)), tolerance * (spread + largest) + 1e-4)


def entry(weights: str, sparsity: float) -> BreakEven:
    return BreakEven(
        op="nm_matmul", weights=weights, dense=weights, inputs=64, outputs=64, rows=1, threads=1, sparsity=sparsity
    )


@needs_library
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize(("k", "n", "rows"), [(64, 48, 1), (131, 37, 5), (7, 1, 2), (600, 200, 19), (128, 16, 0)])
def test_kernel_equals_the_dense_product(dtype, kept, k, n, rows):
    w = sparse(k, n, kept, 4, dtype, density=0.9)
    model = portable(w, kept, 4, bias=True)
    assert lower(model) == [("applied", f"runs in the native library, {kept} of 4 weights stored")]
    assert [node.domain for node in model.graph] == [native.DOMAIN], "the bias is added by the kernel"
    assert not model.functions
    x = np.random.default_rng(1).standard_normal((rows, k)).astype(np.float32)
    y = run(model, x)
    assert_close(y, x, w, ROUNDED if dtype is np.int8 else EXACT, np.linspace(-3, 3, n))
    np.testing.assert_array_equal(run(model, x, threads=2), y)
    for row in range(rows):
        np.testing.assert_allclose(run(model, x[row : row + 1])[0], y[row], rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize(("kept", "m", "stored"), [(1, 8, 1), (2, 8, 2), (1, 16, 1), (1, 2, 2), (1, 12, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_sparser_patterns_run_by_the_same_kernels(kept, m, stored, dtype):
    w = sparse(147, 33, kept, m, dtype)
    model = portable(w, kept, m)
    assert lower(model) == [("applied", f"runs in the native library, {stored} of 4 weights stored")]
    x = np.random.default_rng(1).standard_normal((3, 147)).astype(np.float32)
    assert_close(run(model, x), x, w, ROUNDED if dtype is np.int8 else EXACT)


@pytest.mark.parametrize(("dtype", "op"), [(np.float32, "MatMul"), (np.float16, "MatMul"), (np.int8, "MatMulNBits")])
@pytest.mark.parametrize("why", ["no kernel", "slower", "no library"])
def test_dense_where_there_is_no_kernel_or_it_is_slower(dtype, op, why, monkeypatch):
    if why == "no library":
        monkeypatch.setattr(native, "library_path", lambda: None)
    elif why == "slower" and not native.available():
        pytest.skip("the native library was not built")
    kept, m = (4, 8) if why == "no kernel" else (2, 4)
    w = sparse(131, 37, kept, m, dtype)
    model = portable(w, kept, m)
    table = (entry("int8", 0.75), entry("fp32", 0.75)) if why == "slower" else ()
    ((action, detail),) = lower(model, table)
    assert action == "applied"
    assert detail.startswith("runs as a dense product: ")
    assert {"no kernel": "not for 4:8", "slower": "is slower", "no library": "native library"}[why] in detail
    assert [node.op_type for node in model.graph] == [op]
    assert not model.functions
    x = np.random.default_rng(1).standard_normal((5, 131)).astype(np.float32)
    assert_close(run(model, x), x, w, ROUNDED if dtype is np.int8 else EXACT)


@needs_library
def test_one_pattern_may_be_faster_where_another_is_not():
    table = (entry("fp32", 0.75),)
    for kept, word in ((1, "native"), (2, "dense")):
        ((_, detail),) = lower(portable(sparse(64, 64, kept, 4, np.float32), kept, 4), table)
        assert word in detail


def test_exact_calls_keep_their_body():
    w = sparse(64, 32, 2, 4, np.int8)
    model = portable(w, 2, 4, exact=1)
    assert lower(model)[0][0] == "refused"
    x = np.random.default_rng(1).standard_normal((2, 64)).astype(np.float32)
    assert_close(run(model, x), x, w, EXACT)


@needs_library
def test_a_weight_that_two_nodes_read_is_stored_once():
    model = portable(sparse(64, 64, 1, 4, np.float32), 1, 4)
    (node,) = model.graph
    again = ir.node("NMMatMul", [node.outputs[0], *node.inputs[1:]], domain=DOMAIN, attributes={"m": 4, "k": 64})
    again.outputs[0].name, again.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(again)
    model.graph.outputs.append(again.outputs[0])
    assert len(lower(model)) == 2
    assert node.inputs[1] is again.inputs[1]
    assert {"values", "indices"}.isdisjoint(model.graph.initializers)


@needs_library
def test_an_add_that_is_no_bias_stays():
    w = sparse(64, 48, 2, 4, np.float32)
    model = portable(w, 2, 4, bias=True)
    model.graph.outputs.append(model.graph[0].outputs[0])
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    lower(model)
    assert [node.op_type for node in model.graph] == ["NMMatMul", "Add"]


@needs_library
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_what_is_not_finite_reaches_the_output_and_no_other_row(odd, dtype):
    w = sparse(64, 48, 2, 4, dtype)
    model = portable(w, 2, 4)
    lower(model)
    x = np.ones((3, 64), np.float32)
    x[1, 5] = odd
    y = run(model, x)
    assert not np.isfinite(y[1, w[5] != 0]).any()
    assert np.isfinite(y[[0, 2]]).all()


@needs_library
def test_artifact(tmp_path):
    w = sparse(256, 96, 1, 4, np.int8)
    api.compile(portable(w, 1, 4, rows=1), tmp_path / "artifact", target="ort-cpu")
    target = OrtCpu()
    artifact = target.open(tmp_path / "artifact")
    x = np.random.default_rng(1).standard_normal((1, 256)).astype(np.float32)
    assert_close(target.load(artifact).run({"x": x})["y"], x, w, ROUNDED)


@pytest.mark.parametrize("kept", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_blocks_hold_every_weight_at_its_place(kept, dtype):
    k, n = 83, 21
    w = sparse(k, n, kept, 4, dtype, density=0.7)
    values, places = nm_blocks(w, kept)
    quads = -(-k * kept // 16)
    assert values.shape == (2, quads, 64)
    assert places.shape == (2, quads, 16)
    again = np.zeros((quads * 16 // kept, 32), dtype)
    for block, quad, column, slot in np.ndindex(2, quads, 16, 4):
        at = column * 4 + slot if dtype is np.int8 else slot * 16 + column
        place = places[block, quad, column] >> (2 * slot) & 3
        again[(quad * 4 + slot) // kept * 4 + place, block * 16 + column] += values[block, quad, at]
    np.testing.assert_array_equal(again[:k, :n], w)
