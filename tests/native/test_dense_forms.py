"""Sparse ops that become dense products, by sparsity or by rows, and models that are two in one."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from sparse_ops import EXACT, OP_TYPES, Call, assert_close, make_call, portable, session

from onnxcomp import api, native
from onnxcomp.break_even import AS_ACCURATE, BreakEven
from onnxcomp.errors import TargetError
from onnxcomp.ops import SPARSITY
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu, break_even
from onnxcomp.targets.ort.lowering import LOWERED, NativeOps
from onnxcomp.targets.ort.rows import find_rows, to_many_rows

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")

# 64 activations share a step, 1/127 of the largest of them, which is about 2.5 standard deviations: rounding is off by
# 0.57 % of one (step / sqrt 12), and so is a product. Weights of 4 bits, rounded to 8, add as much.
DENSE, DENSE_INT4 = 0.008, 0.012


def table(one: float, many: float) -> tuple[BreakEven, ...]:
    return tuple(
        BreakEven(
            op=op, weights=w, dense=AS_ACCURATE[w], inputs=64, outputs=64, rows=rows, threads=1,
            sparsity=one if rows == 1 else many,
        )
        for op in ("matmul", "gated_mlp") for w in ("fp32", "int8", "int4") for rows in (1, 4)
    )  # fmt: skip


def lower(model: ir.Model, one: float, many: float) -> tuple[str, str]:
    known = dataclasses.replace(OrtCpu().capabilities(), break_even=table(one, many))
    ((action, detail),) = [(e.action, e.detail) for e in NativeOps().apply(model, Context(capabilities=known))]
    return action, detail


def calls(*, batch: tuple[int, ...]) -> list[Call]:
    return [make_call(op_type, 70, 40, batch=batch, count=30, f=90, variant=2) for op_type in OP_TYPES]


def noted(call: Call, sparsity: float) -> ir.Model:
    model = portable(call)
    next(iter(model.graph)).metadata_props[SPARSITY] = str(sparsity)
    return model


def allowed(call: Call) -> float:
    share = EXACT if not call.op_type.endswith(("Int8", "Int4")) else DENSE_INT4 if "Int4" in call.op_type else DENSE
    return share * (2 if call.op_type.startswith("GatedMLP") else 1)


def run(model: ir.Model, call: Call) -> np.ndarray:
    return session(model).run(None, call.activations)[0]


@pytest.mark.parametrize("call", calls(batch=(1, 3)), ids=lambda c: c.op_type)
def test_dense_where_too_little_is_dropped(call):
    model = noted(call, 0.3)
    action, detail = lower(model, 0.0, 0.4)
    assert action == "applied"
    assert "30% of its" in detail
    assert "faster from 40% on (3 rows" in detail
    *_, last = model.graph
    assert last.op_type in ("MatMul", "MatMulNBits")
    assert last.name == "sparse"
    assert last.metadata_props[LOWERED] in detail
    assert_close(run(model, call), call, allowed(call))
    assert not model.functions


@pytest.mark.parametrize("call", calls(batch=(2, 2)), ids=lambda c: c.op_type)
def test_a_lowered_model_turned_dense_for_several_rows(call):
    model = noted(call, 0.3)
    assert lower(model, 0.0, 0.3) == ("applied", "runs in the native library")
    assert to_many_rows(model, table(0.0, 0.3)) == 0
    assert to_many_rows(model, table(0.0, 0.4)) == 1
    assert_close(run(model, call), call, allowed(call))
    assert all(v.uses() for v in model.graph.initializers.values())


def test_one_sided_thresholds_stay_so():
    call = make_call("ThresholdMatMul", 64, 32, batch=(3,), one_sided=1)
    model = noted(call, 0.1)
    lower(model, 0.0, 0.9)
    assert_close(run(model, call), call, EXACT)


@pytest.mark.parametrize(("sparsity", "attributes"), [("0.1", {"exact": 1}), ("nonsense", {}), (None, {})])
def test_what_was_not_measured_stays_sparse(sparsity, attributes):
    model = portable(make_call("ThresholdMatMulInt8", 64, 32, batch=(3,), **attributes))
    if sparsity is not None:
        next(iter(model.graph)).metadata_props[SPARSITY] = sparsity
    assert lower(model, 1.0, 1.0) == ("applied", "runs in the native library")


def test_one_row_has_a_break_even_of_its_own():
    one, several = (noted(make_call("ThresholdMatMul", 64, 32, batch=(n,)), 0.5) for n in (1, 3))
    assert "dense" not in lower(one, 0.4, 0.6)[1]
    assert "dense" in lower(several, 0.4, 0.6)[1]


# --- one artifact for both


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(break_even, "table", lambda _: table(0.0, 0.9))


def dynamic(call: Call, shape: tuple[int | str, ...], sparsity: float = 0.5) -> ir.Model:
    model = noted(call, sparsity)
    for value in model.graph.inputs:
        if value.name in ("A", "X"):
            value.shape = ir.Shape([*shape, call.inputs[value.name].shape[-1]])
    return model


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize("call", calls(batch=(1, 1)), ids=lambda c: c.op_type)
def test_an_artifact_runs_one_row_and_several(call, tmp_path):
    artifact = api.compile(dynamic(call, ("batch", "length")), tmp_path / "artifact")
    assert set(artifact.manifest["files"]) == {"model.onnx", "model.onnx.data", "many.onnx"}
    found = OrtCpu().load(OrtCpu().open(artifact.path))
    for batch in ((1, 1), (2, 1), (1, 3)):
        rng = np.random.default_rng(1)
        sizes = {name: a.shape[-1] for name, a in call.activations.items() if a.ndim}
        fresh = {name: rng.normal(size=(*batch, size)).astype(np.float32) for name, size in sizes.items()}
        given = call.with_inputs(**fresh)
        y = found.run(given.activations)["Y"]
        assert_close(y, given, allowed(given) if batch != (1, 1) else 0.02)
    ops = [{n.op_type for n in ir.load(artifact.path / name).graph} for name in ("model.onnx", "many.onnx")]
    assert ops[0] == {call.op_type}
    assert ops[1] & {"KeepAbove", "KeepLargest"}


@pytest.mark.usefixtures("measured")
def test_the_second_model_is_only_there_where_it_is_faster(tmp_path):
    call = make_call("ThresholdMatMul", 64, 32)
    for sparsity, files in ((0.95, {"model.onnx"}), (0.5, {"model.onnx", "model.onnx.data", "many.onnx"})):
        artifact = api.compile(dynamic(call, ("n",), sparsity), tmp_path / "artifact")
        assert set(artifact.manifest["files"]) == files


def test_few_rows_stay_with_the_kernels_that_serve_one(monkeypatch, tmp_path):
    needed = {1: 0.0, 2: 0.4, 8: 0.5, 128: 0.6}
    entries = [dataclasses.replace(table(0.0, 0.0)[0], rows=rows, sparsity=share) for rows, share in needed.items()]
    monkeypatch.setattr(break_even, "table", lambda _: tuple(entries))
    call = make_call("ThresholdMatMul", 64, 32)
    artifact = api.compile(dynamic(call, ("n",), 0.5), tmp_path / "artifact")
    for rows, op in ((1, "ThresholdMatMul"), (8, "ThresholdMatMul"), (9, "MatMul")):
        given = make_call("ThresholdMatMul", 64, 32, batch=(rows,))
        assert {t.op_type for t in OrtCpu().node_times(artifact, given.activations, repeat=1)} >= {op}
    (node,) = [n for n in ir.load(artifact.path / "many.onnx").graph if n.op_type == "MatMul"]
    assert "from 60% on (more than 8 rows, 64x32 fp32)" in node.metadata_props[LOWERED]


def test_the_audit_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(break_even, "table", lambda _: table(0.6, 0.6))
    artifact = api.compile(noted(make_call("ThresholdMatMulInt8", 64, 32), 0.5), tmp_path / "artifact")
    (row,) = artifact.audit.rows
    assert (row.node, row.executed_as) == ("sparse", "MatMulNBits")
    assert row.reason == (
        "50% of its inputs are dropped, and the sparse kernel is faster from 60% on (1 row, 64x32 int8)"
    )


@pytest.mark.usefixtures("measured")
def test_measured_and_profiled_with_the_model_that_runs(tmp_path):
    call = make_call("ThresholdMatMul", 64, 32)
    artifact = api.compile(dynamic(call, ("n",)), tmp_path / "artifact")
    for rows, op in ((1, "ThresholdMatMul"), (4, "MatMul")):
        feed = make_call("ThresholdMatMul", 64, 32, batch=(rows,)).activations
        assert {t.op_type for t in OrtCpu().node_times(artifact, feed, repeat=1)} >= {op}
        assert OrtCpu().peak_memory(artifact, feed) > 1 << 20


@pytest.mark.usefixtures("measured")
def test_an_artifact_whose_second_model_is_gone_is_damaged(tmp_path):
    artifact = api.compile(dynamic(make_call("ThresholdMatMul", 64, 32), ("n",)), tmp_path / "artifact")
    (artifact.path / "many.onnx").unlink()
    with pytest.raises(TargetError, match=r"many\.onnx is missing"):
        OrtCpu().open(artifact.path)


@pytest.mark.parametrize(
    ("shape", "axes", "factor"),
    [
        (("batch", "length"), [("X", 0), ("X", 1)], 1),
        ((4, "length"), [("X", 1)], 4),
        ((1, 1), None, None),
        (("n", "n"), [("X", 0)], 1),  # squared, in truth: at least more than one row is told from one
    ],
)
def test_where_the_number_of_rows_comes_from(shape, axes, factor):
    model = dynamic(make_call("ThresholdMatMul", 64, 32), shape)
    NativeOps().apply(model, Context(capabilities=OrtCpu().capabilities()))
    rows = find_rows(model)
    if axes is None:
        assert rows is None
        return
    assert [(a.input, a.axis) for a in rows.axes] == axes
    if shape != ("n", "n"):
        assert rows.factor == factor
        sizes = [s if isinstance(s, int) else 3 for s in shape]
        assert rows.count({"X": np.zeros([*sizes, 64], np.float32)}) == np.prod(sizes)
    assert rows.count({}) == 1
