"""Sparse portable ops, lowered and compiled for a GPU, against their references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from sparse_ops import EXACT, Call, assert_close, make_call, portable  # noqa: E402
from tvm import relax  # noqa: E402
from tvm_harness import lowered, machines  # noqa: E402

cuda_emulator.require()

from onnxcomp.ops import DOMAIN, NM_OPS, pack_nm  # noqa: E402
from onnxcomp.rewrite import Pass  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.importing import to_relax  # noqa: E402
from onnxcomp.targets.tvm.lower.nm import Nm  # noqa: E402
from onnxcomp.targets.tvm.lower.sparse import Sparse  # noqa: E402
from onnxcomp.targets.tvm.pipeline import build  # noqa: E402

CPU = machines()[-1]
GPU = replace(gpu("jetson-orin", frozenset()), triple=CPU.triple, cpu=CPU.cpu, features=CPU.features)


def run(
    model: ir.Model, passes: Sequence[Pass], kind: str, feeds: Sequence[Mapping[str, np.ndarray]]
) -> list[np.ndarray]:
    """What a model of one op, a `kind` once it is lowered, gives for each of some inputs."""
    working = lowered(model, passes)
    assert [node.op_type for node in working.graph] == [kind]
    names = [str(v.name) for v in working.graph.inputs]
    imported = to_relax(working, GPU)
    machine = relax.VirtualMachine(build(imported.module, GPU), tvm.cuda())
    weights = [tvm.runtime.tensor(w.numpy(), tvm.cuda()) for w in imported.weights.values()]
    found = []
    for feed in feeds:
        given = [tvm.runtime.tensor(np.ascontiguousarray(feed[name]), tvm.cuda()) for name in names]
        found.append(machine["main"](*given, *weights).numpy())
    return found


def stored(call: Call) -> ir.Model:
    """A model whose threshold is a weight, as the passes write it."""
    model = portable(call)
    for value in [v for v in model.graph.inputs if v.name == "threshold"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(call.inputs["threshold"], name="threshold")
        model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("op_type", ["ThresholdMatMulInt4", "TopKMatMul", "GatedMLPInt8", "GatedMLPInt4"])
def test_ops_match_their_references(op_type: str) -> None:
    call = make_call(op_type, 70, 96, count=20, batch=(2,), f=90)
    kind = "GatedMLP" if op_type.startswith("Gated") else "SparseMatMul"
    assert_close(run(stored(call), [Sparse(machine=GPU)], kind, [call.activations])[0], call, EXACT)


def test_any_number_of_rows() -> None:
    call = make_call("ThresholdMatMulInt8", 64, 96)
    model = stored(call)
    model.graph.inputs[0].shape = ir.Shape(["rows", 64])
    rng = np.random.default_rng(0)
    calls = [call.with_inputs(X=rng.standard_normal((rows, 64)).astype(np.float32)) for rows in (1, 3, 50)]
    found = run(model, [Sparse(machine=GPU)], "SparseMatMul", [one.activations for one in calls])
    for one, other in zip(calls, found, strict=True):
        assert_close(other, one, EXACT)


@pytest.mark.parametrize(("kept", "rows", "dtype"), [(1, 1, "float32"), (2, 3, "int8")])
def test_products_of_some_of_four_weights(kept: int, rows: int, dtype: str) -> None:
    rng = np.random.default_rng(kept)
    k, n = 72, 37
    weight = rng.standard_normal((k // 4, 4, n)) * 50
    weight[rng.random(weight.shape).argsort(axis=1) >= kept] = 0
    weight = weight.reshape(k, n).astype(dtype)
    op, arrays = ("NMMatMulInt8" if dtype == "int8" else "NMMatMul"), list(pack_nm(weight, n=kept, m=4))
    arrays += [np.full(n, 0.02, np.float32)] * (dtype == "int8")
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([rows, k]))
    weights = [ir.Value(name=f"w{i}", const_value=ir.tensor(a, name=f"w{i}")) for i, a in enumerate(arrays)]
    for value, array in zip(weights, arrays, strict=True):
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    node = ir.node(op, [x, *weights], attributes={"m": 4, "k": k}, domain=DOMAIN, name="nm")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([rows, n])
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 18}, name="g")
    model = ir.Model(graph, ir_version=9)
    NM_OPS[op].install(model)
    given = rng.standard_normal((rows, k)).astype(np.float32)
    (found,) = run(model, [Nm(machine=GPU)], "NmMatMul", [{"x": given}])
    expected = given.astype(np.float64) @ weight.astype(np.float64) * (0.02 if dtype == "int8" else 1)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
