"""Portable ops on their way to native ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from sparse_ops import EXACT, OP_TYPES, assert_close, make_call, portable, session, tolerance

from onnxcomp import api, native
from onnxcomp.ops import DOMAIN
from onnxcomp.rewrite import Context
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.lowering import NativeOps

needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built")


def lower(model: ir.Model) -> list[tuple[str, str]]:
    edits = NativeOps().apply(model, Context(capabilities=OrtCpu().capabilities()))
    return [(e.action, e.detail) for e in edits]


@needs_library
@pytest.mark.parametrize("op_type", OP_TYPES)
def test_compiled_artifact_runs_the_kernel(op_type, tmp_path):
    call = make_call(op_type, 70, 64, batch=(2,), count=9, exact=1)
    api.compile(portable(call), tmp_path / "artifact", target="ort-cpu")
    stored = ir.load(tmp_path / "artifact" / "model.onnx")
    assert [n.domain for n in stored.graph] == [native.DOMAIN]
    assert not stored.functions
    target = OrtCpu()
    found = target.load(target.open(tmp_path / "artifact")).run(call.activations)
    assert_close(found["Y"], call, tolerance(call))


@needs_library
def test_lowering_twice_changes_nothing():
    model = portable(make_call("GatedMLP", 8, 4, f=6))
    assert lower(model) == [("applied", "runs in the native library")]
    before = ir.to_proto(model).SerializeToString()
    assert lower(model) == []
    assert ir.to_proto(model).SerializeToString() == before


@needs_library
def test_the_up_projection_is_turned_once_and_the_old_one_goes():
    model = portable(make_call("GatedMLP", 8, 4, f=6))
    (node,) = model.graph
    u = node.inputs[2]
    second = ir.node("GatedMLP", node.inputs, domain=DOMAIN, name="again")
    second.outputs[0].name, second.outputs[0].type = "Z", ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(second)
    model.graph.outputs.append(second.outputs[0])
    assert len(lower(model)) == 2
    assert node.inputs[2] is second.inputs[2]
    assert u.name not in model.graph.initializers
    np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), u.const_value.numpy().T)


def test_refused_without_the_library(monkeypatch):
    monkeypatch.setattr(native, "library_path", lambda: None)
    model = portable(make_call("TopKMatMul", 8, 4))
    assert lower(model) == [("refused", "onnxcomp was installed without its native library")]
    assert model.functions


@needs_library
def test_refused_for_other_types(tmp_path):
    call = make_call("ThresholdMatMul", 8, 4)
    call = call.with_inputs(**{name: array.astype(np.float64) for name, array in call.inputs.items()})
    model = portable(call)
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    ((action, reason),) = lower(model)
    assert action == "refused"
    assert "these are double" in reason
    (y,) = session(model).run(None, call.activations)
    np.testing.assert_allclose(y, call.reference(), rtol=EXACT)


@needs_library
def test_refused_where_the_up_projection_is_computed():
    call = make_call("GatedMLP", 8, 4, f=6)
    model = portable(call)
    (node,) = model.graph
    negated = ir.node("Neg", [node.inputs[2]], name="computed")
    model.graph.insert_before(node, negated)
    node.replace_input_with(2, negated.outputs[0])
    ((action, reason),) = lower(model)
    assert action == "refused"
    assert "not a constant" in reason
    assert (DOMAIN, "GatedMLP", "") in model.functions


@needs_library
def test_the_threshold_tells_the_type_of_an_untyped_input():
    model = portable(make_call("ThresholdMatMul", 8, 4))
    model.graph.inputs[0].type = None
    assert lower(model) == [("applied", "runs in the native library")]


@needs_library
def test_an_input_of_unknown_type_is_refused():
    model = portable(make_call("ThresholdMatMul", 8, 4))
    (node,) = model.graph
    for value in (node.inputs[0], node.inputs[-1]):
        value.type = None
    node.resize_inputs(2)
    node.inputs[1].type = None
    assert "unknown" in lower(model)[0][1]
