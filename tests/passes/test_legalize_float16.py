"""Quantized models in float16, as some tools write them, get float32 around their integers."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from onnxcomp.metrics import sqnr
from onnxcomp.passes.legalize import Legalize
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.testing import check_pass

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
FEED = {"x": np.random.default_rng(4).normal(size=(6, 16)).astype(np.float16)}


def layer(b, x, name):
    """A MatMul with Q/DQ whose scales are float16, and a bias."""
    parameters = b.const(np.float16(0.05)), b.const(np.uint8(128))
    x = b.op("DequantizeLinear", b.op("QuantizeLinear", x, *parameters), *parameters)
    weight = b.const(b.rng.integers(-90, 90, (16, 16)).astype(np.int8))
    y = b.op("MatMul", x, b.op("DequantizeLinear", weight, b.const(np.float16(0.004))), name=name)
    return b.op("Add", y, b.const(b.rng.normal(size=16).astype(np.float16)))


def model(b) -> ir.Model:
    """Float16 in and out, with one part in float32 between casts and a constant in a node."""
    y = layer(b, b.input("x", [6, 16], HALF), "first")
    y = b.op("Cast", b.op("Tanh", b.op("Cast", y, to=FLOAT)), to=HALF)
    one = b.op("Constant", value=helper.make_tensor("one", HALF, [], [1.0]))
    return b.output(layer(b, b.op("Mul", y, one), "last"), HALF).model(opset=19)


def run(on: ir.Model) -> np.ndarray:
    name = on.graph.outputs[0].name
    return reference_runner(on, [name], optimize=False)(FEED)[name]


def test_computes_on_integers(b, run_passes, tmp_path):
    found = model(b)
    before = run(found)
    run_passes(found, Legalize())
    after = run(found)
    assert after.dtype == np.float16
    assert sqnr(before, after) > 40
    assert [v.dtype for v in (*found.graph.inputs, *found.graph.outputs)] == [ir.DataType.FLOAT16] * 2
    assert [n.op_type for n in found.graph].count("Cast") == 2, "the casts within the model are gone"
    audit = OrtCpu().compile(found, tmp_path / "artifact").audit
    assert audit.integer_mac_share == 1.0


def test_contract(b, capabilities):
    check_pass(Legalize(), model(b), capabilities=capabilities, runner=reference_runner)


@pytest.mark.parametrize(
    ("given", "reason"),
    [(Legalize(exact=True), "float16"), (Legalize(where=Select(name=("last",))), "float16")],
)
def test_refused(b, run_passes, given, reason):
    found = model(b)
    report = run_passes(found, given)
    refusals = {e.node: e.detail for e in report.edits if e.action == "refused"}
    assert reason in refusals["last"]
    assert next(n for n in found.graph if n.name == "last").outputs[0].dtype != ir.DataType.FLOAT


def test_subgraph(run_passes):
    """Scale 0.05 and factor 2, as the bits of float16."""
    found = ir.from_onnx_text("""<ir_version: 9, opset_import: ["" : 19]>
        g (float16[6, 16] x, bool c) => (float16[6, 16] y)
        <float16 s = {10854}, uint8 z = {128}, float16 two = {16384}> {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            y = If (c) <
                then_branch = t () => (float16[6, 16] p) { p = Mul(d, two) },
                else_branch = e () => (float16[6, 16] r) { f = Cast <to = 1> (d)  h = Tanh(f)  r = Cast <to = 10> (h) }>
        }""")
    for i, node in enumerate(found.graph.all_nodes()):
        node.name = f"n{i}"
    before = [reference_runner(found, ["y"], optimize=False)(FEED | {"c": np.array(c)})["y"] for c in (True, False)]
    run_passes(found, Legalize())
    after = [reference_runner(found, ["y"], optimize=False)(FEED | {"c": np.array(c)})["y"] for c in (True, False)]
    assert {v.dtype for n in found.graph.all_nodes() if n.op_type in ("Mul", "Tanh") for v in n.inputs} == {
        ir.DataType.FLOAT
    }
    for one, two in zip(before, after, strict=True):
        assert two.dtype == np.float16
        np.testing.assert_allclose(two, one, rtol=0, atol=0.02)


def test_foreign_op_is_refused(b, run_passes):
    y = layer(b, b.input("x", [6, 16], HALF), "first")
    found = b.output(b.op("Secret", y, domain="other"), HALF).model(opset=19)
    found.opset_imports["other"] = 1
    report = run_passes(found, Legalize(), check="none")
    assert any("other::Secret" in e.detail for e in report.edits if e.action == "refused")
    assert found.graph.outputs[0].dtype == ir.DataType.FLOAT16
