"""What the pass leaves in float, and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.select import Select
from onnxcomp.testing import check_pass


def gemm(b, **attributes):
    return b.op("Gemm", b.input("x", ["n", 32]), b.floats(32, 32), name="node", **attributes)


CASES = {
    "alpha": (lambda b: gemm(b, alpha=2.0), "alpha"),
    "two activations": (
        lambda b: b.op("MatMul", b.input("x", ["n", 32]), b.input("y", [32, "m"]), name="node"),
        "another activation",
    ),
    "first operand": (
        lambda b: b.op("MatMul", b.floats(32, 32), b.input("x", [32, "m"]), name="node"),
        "first operand",
    ),
    "batch of matrices": (
        lambda b: b.op("MatMul", b.input("x", [2, "n", 32]), b.floats(2, 32, 32), name="node"),
        "3 dimensions",
    ),
    "small": (lambda b: b.op("MatMul", b.input("x", ["n", 4]), b.floats(4, 4), name="node"), "min_weights = 1000"),
    "vector": (lambda b: b.op("MatMul", b.input("x", [32]), b.floats(32, 32), name="node"), "vector"),
    "bias of a row a token": (
        lambda b: b.op("Gemm", b.input("x", [2, 32]), b.floats(32, 32), b.floats(2, 32), name="node"),
        "bias",
    ),
    "double": (
        lambda b: b.op(
            "MatMul", b.input("x", ["n", 32], TensorProto.DOUBLE), b.const(b.rng.normal(size=(32, 32))), name="node"
        ),
        "double, not float32",
    ),
    "not finite": (
        lambda b: b.op("MatMul", b.input("x", ["n", 32]), b.const(np.full((32, 32), np.nan, np.float32)), name="node"),
        "NaN",
    ),
}


@pytest.mark.parametrize("form", ["matmulnbits", "qdq"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_reason(case, form, b, capabilities):
    build, reason = CASES[case]
    kind = TensorProto.DOUBLE if case == "double" else TensorProto.FLOAT
    edits = check_pass(
        WeightOnly(form=form, min_weights=1000), b.output(build(b), kind).model(21), capabilities=capabilities
    )
    assert [(e.action, e.node) for e in edits] == [("refused", "node")]
    assert reason in edits[0].detail


def test_function(capabilities):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}> { y = local.F(x, w) }
        <domain: "local", opset_import: ["" : 21]> F (p, q) => (r) { r = MatMul(p, q) }""")
    (edit,) = check_pass(WeightOnly(min_weights=0), model, capabilities=capabilities)
    assert edit.action == "refused"
    assert "cleanup" in edit.detail


def test_a_weight_that_another_op_needs(b, capabilities):
    shared = b.floats(32, 32)
    y = b.op("MatMul", b.input("x", ["n", 32]), shared, name="product")
    model = b.output(y).output(b.op("Relu", shared, name="relu")).model()
    (edit,) = check_pass(WeightOnly(min_weights=0), model, capabilities=capabilities)
    assert edit.action == "refused"
    assert "Relu 'relu'" in edit.detail


def test_a_weight_that_a_node_left_out_reads(b, capabilities):
    shared = b.floats(32, 32)
    x = b.op("MatMul", b.input("x", ["n", 32]), shared, name="taken")
    model = b.output(b.op("MatMul", x, shared, name="left")).model()
    step = WeightOnly(min_weights=0, where=Select(name=("taken",)))
    (edit,) = check_pass(step, model, capabilities=capabilities)
    assert (edit.action, edit.node) == ("refused", "taken")
    assert "MatMul 'left'" in edit.detail


def test_a_weight_along_both_axes(b, capabilities):
    shared = b.floats(32, 32)
    x = b.op("MatMul", b.input("x", ["n", 32]), shared, name="one")
    model = b.output(b.op("Gemm", x, shared, name="two", transB=1)).model()
    edits = check_pass(WeightOnly(min_weights=0), model, capabilities=capabilities)
    assert [e.action for e in edits] == ["refused", "refused"]
    assert all("different axes" in e.detail for e in edits)


def test_an_overridable_weight_is_no_constant(b, capabilities):
    weight = b.floats(32, 32)
    model = b.output(b.op("MatMul", b.input("x", ["n", 32]), weight, name="node")).model()
    model.graph.inputs.append(model.graph.initializers[weight])
    (edit,) = check_pass(WeightOnly(min_weights=0), model, capabilities=capabilities)
    assert edit.action == "refused"


def test_a_quantized_model(b, capabilities):
    model = b.output(b.matmul(b.qdq(b.input("x", ["n", 16])))).model(21)
    (edit,) = check_pass(WeightOnly(min_weights=0), model, capabilities=capabilities)
    assert edit.detail == "it is quantized already"
