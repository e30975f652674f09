"""Odd forms of Q/DQ, ranges that follow from the graph, and what is left with a reason."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.edit import attribute
from onnxcomp.passes._legalize.graph import Work
from onnxcomp.passes._legalize.ranges import known_range
from onnxcomp.passes.legalize import Legalize
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu, reference_runner

ROWS = {"x": np.random.default_rng(4).normal(size=(6, 16)).astype(np.float32)}


def as_written(model: ir.Model) -> np.ndarray:
    name = model.graph.outputs[0].name
    return reference_runner(model, [name], optimize=False)(ROWS)[name]


def refusals(report) -> dict[str, str]:
    return {e.node: e.detail for e in report.edits if e.action == "refused"}


@pytest.fixture
def same(run_passes):
    """Legalizes a model of `ROWS` and demands equal outputs."""

    def run(model: ir.Model):
        before = as_written(model)
        report = run_passes(model, Legalize())
        np.testing.assert_array_equal(as_written(model), before)
        return report

    return run


def test_domain_of_microsoft(b, same):
    x, parameters = b.input("x", [6, 16]), (b.const(np.float32(0.05)), b.const(np.uint8(128)))
    domain = "com.microsoft"
    y = b.op("DequantizeLinear", b.op("QuantizeLinear", x, *parameters, domain=domain), *parameters, domain=domain)
    model = b.output(b.matmul(y)).model()
    model.opset_imports[domain] = 1
    same(model)
    assert {n.domain for n in model.graph} == {""}


def test_sixteen_bits_of_microsoft_stay_at_an_old_opset(b, run_passes):
    parameters = b.const(np.float32(0.05)), b.const(np.uint16(128))
    q = b.op("QuantizeLinear", b.input("x", [6, 16]), *parameters, domain="com.microsoft", name="q")
    model = b.output(b.matmul(b.op("DequantizeLinear", q, *parameters, domain="com.microsoft"))).model()
    model.opset_imports["com.microsoft"] = 1
    assert "uint16" in refusals(run_passes(model, Legalize()))["q"]


def test_parameters_of_shape_one_and_no_zero_point(b, same):
    scale = b.const(np.float32([0.05]))
    y = b.op("DequantizeLinear", b.op("QuantizeLinear", b.op("Abs", b.input("x", [6, 16])), scale), scale)
    model = b.output(b.matmul(y)).model()
    next(n for n in model.graph if n.op_type == "QuantizeLinear").outputs[0].dtype = ir.DataType.UINT8
    same(model)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            assert len(node.inputs) == 3
            assert node.inputs[1].const_value.shape == []


def test_negative_axis(b, same):
    q, scale = b.const(b.rng.integers(-127, 128, (16, 4)).astype(np.int8)), b.rng.uniform(0.01, 0.02, 4)
    weight = b.op("DequantizeLinear", q, b.const(scale.astype(np.float32)), axis=-1, name="w")
    model = b.output(b.op("MatMul", b.qdq(b.input("x", [6, 16])), weight)).model()
    same(model)
    assert attribute(next(n for n in model.graph if n.name == "w"), "axis") == 1


@pytest.mark.parametrize("order", [("Min", "Max"), ("Max", "Min")])
def test_clip_as_min_and_max(order, b, same):
    y = b.matmul(b.qdq(b.input("x", [6, 16])))
    for op in order:
        y = b.op(op, y, b.const(np.float32(6 if op == "Min" else 0)))
    model = b.output(b.qdq(y, 6 / 255, 0)).model()
    same(model)
    assert not {"Min", "Max", "Clip"} & {n.op_type for n in model.graph}


def test_unsorted_graph(b, run_passes):
    model = b.output(b.matmul(b.qdq(b.input("x", [6, 16])))).model()
    expected = as_written(model)
    first = model.graph.node(0)
    model.graph.remove(first)
    model.graph.append(first)
    report = run_passes(model, Legalize(), check="none")
    assert any("sorted" in e.detail for e in report.edits)
    np.testing.assert_array_equal(as_written(model), expected)


def work(model: ir.Model, capabilities) -> Work:
    return Work(model=model, capabilities=capabilities, where=Select())


def test_ranges_that_follow_from_the_graph(b, capabilities):
    """Sum of a bounded and an unbounded value in front of a quantizer of -12.8..12.7 (scale 0.1)."""
    x = b.input("x", [4])
    bounded = b.op("Sigmoid", x, name="bounded")
    free = b.op("Mul", x, x, name="free")
    b.output(b.qdq(b.op("Add", bounded, free, name="sum"), 0.1))
    b.output(
        b.op(
            "Neg",
            b.op(
                "LeakyRelu",
                b.op("Clip", x, b.const(np.float32(-2)), b.const(np.float32(3)), name="clip"),
                alpha=0.5,
                name="leaky",
            ),
        )
    )
    b.output(b.qdq(b.op("Concat", b.op("Relu", b.op("Exp", x, name="exp"), name="relu"), bounded, axis=0), 0.1))
    model = b.model()
    given = {n.name: known_range(work(model, capabilities), n.outputs[0]) for n in model.graph}
    assert given["bounded"] == (0.0, 1.0)
    assert given["free"] == pytest.approx((-13.8, 12.7))
    assert given["clip"] == (-2.0, 3.0)
    assert given["leaky"] == (-1.0, 3.0)
    assert given["relu"] == given["exp"] == pytest.approx((0.0, 12.7))
    assert known_range(work(model, capabilities), model.graph.inputs[0]) is None


def test_range_is_open_where_someone_else_reads(b, capabilities):
    y = b.op("Exp", b.input("x", [4]), name="exp")
    b.output(b.qdq(y, 0.1))
    model = b.output(b.op("Neg", y)).model()
    assert known_range(work(model, capabilities), model.graph.node(0).outputs[0]) is None


def test_weight_only_models_are_left_alone(b, run_passes):
    model = b.output(b.matmul(b.input("x", [6, 16]))).model()
    assert run_passes(model, Legalize()).edits == ()


def test_reasons(b, run_passes):
    x = b.qdq(b.input("x", [16, 16]))
    scale = b.const(b.rng.uniform(0.01, 0.02, 16).astype(np.float32))
    along_inputs = b.op("DequantizeLinear", b.const(np.ones((16, 4), np.int8)), scale, axis=0)
    b.output(b.op("MatMul", x, along_inputs, name="axis"))
    b.output(b.op("Gemm", x, b.weight((16, 4), 1), name="alpha", alpha=2.0))
    dynamic = b.op("DequantizeLinear", b.const(np.ones((16, 4), np.int16)), b.const(np.float32(0.1)))
    b.output(b.op("MatMul", x, dynamic, name="bits"))
    integers = b.op("QuantizeLinear", b.input("image", [1, 2, 4, 4]), b.const(np.float32(0.1)), b.const(np.uint8(0)))
    b.output(b.op("ConvInteger", integers, b.const(np.ones((2, 2, 1, 1), np.int8)), name="dynamic"), TensorProto.INT32)
    reasons = refusals(run_passes(b.model(opset=21), Legalize()))
    assert "along axis 0" in reasons["axis"]
    assert "alpha or beta" in reasons["alpha"]
    assert "8 bits" in reasons["bits"]
    assert "anew in every run" in reasons["dynamic"]


def test_subgraph_is_refused(run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3, 4] x, bool c) => (float[3, 4] y)
        <float s = {0.1}, uint8 z = {128}> {
            y = If (c) <
                then_branch = t () => (float[3, 4] p) { q = QuantizeLinear(x, s, z)  p = DequantizeLinear(q, s, z) },
                else_branch = e () => (float[3, 4] r) { r = Identity(x) }>
        }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    report = run_passes(model, Legalize())
    assert [e.action for e in report.edits] == ["refused"]
    assert "subgraph" in report.edits[0].detail


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize("axis", [None, 1])
def test_weight_without_zero_point(b, same, tmp_path, op_type, axis):
    """An integer kernel needs one."""
    scale = np.full(32 if axis else (), 0.01, np.float32)
    x, integers = b.qdq(b.input("x", [6, 16])), b.const(b.rng.integers(-90, 90, (16, 32)).astype(np.int8))
    weight = b.op("DequantizeLinear", integers, b.const(scale), **({"axis": axis} if axis else {}))
    bias = b.const(b.rng.integers(-90, 90, 32).astype(np.int32)), b.const((scale * np.float32(0.05)).astype(np.float32))
    bias = b.op("DequantizeLinear", *bias, **({"axis": 0} if axis else {}))
    y = b.op("Gemm", x, weight, bias) if op_type == "Gemm" else b.op("Add", b.op("MatMul", x, weight), bias)
    model = b.output(b.op("Tanh", y)).model()
    same(model)
    audit = OrtCpu().compile(model, tmp_path / "artifact").audit
    assert audit.integer_mac_share == 1.0
