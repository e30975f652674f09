"""What is not packed, and why."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.select import Select
from onnxcomp.testing import check_pass

SPARSE = np.tile(np.float32([[1], [0], [0], [2]]), (4, 8))
"""2:4, (16, 8)."""


def floats(b) -> ir.Model:
    x = b.input("x", ["n", 16])
    b.op("MatMul", x, b.floats(16, 8), name="dense")
    b.op("MatMul", x, b.op("Softmax", b.input("z", [16, 4])), name="activation")
    b.op("MatMul", b.const(SPARSE.T), b.op("Transpose", x, perm=[1, 0]), name="first operand")
    b.op("MatMul", x, b.const(SPARSE[None]), name="batch")
    b.op("Gemm", b.input("t", [16, 3]), b.const(SPARSE), name="transA", transA=1)
    b.op("MatMul", b.op("Cast", x, to=TensorProto.DOUBLE), b.const(SPARSE.astype(np.float64)), name="double")
    b.op("Conv", b.input("image", [1, 16, 4, 4]), b.const(SPARSE.T[..., None, None]), name="conv")
    b.op("MatMul", b.input("one", ["n", 1]), b.const(SPARSE[:1]), name="one input")
    b.op("MatMul", x, b.const(np.zeros((16, 0), np.float32)), name="empty")
    shared = b.const(np.kron(np.eye(4, dtype=np.float32), np.float32(np.eye(4))))
    b.op("MatMul", x, shared, name="along rows")
    b.op("Gemm", x, shared, name="along columns", transB=1)
    scaled = b.const(SPARSE)
    b.op("Gemm", x, scaled, name="alpha 1")
    b.op("Gemm", x, scaled, name="alpha 2", alpha=2.0)
    out = b.const(SPARSE)
    b.op("MatMul", x, out, name="put out")
    other = b.const(SPARSE)
    b.op("MatMul", x, other, name="read elsewhere")
    b.op("Neg", other, name="neg")
    table = b.const(SPARSE)
    b.op("Gather", table, b.const(np.array([1, 2])), name="lookup")
    b.op("MatMul", x, table, name="tied")
    square = b.const(np.kron(np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32)))
    b.op("MatMul", square, square, name="by itself")
    big = b.const(np.where(SPARSE > 0, np.float32(3e38), 0).astype(np.float32))
    b.op("Gemm", x, big, name="overflow", alpha=4.0)
    given = b.const(SPARSE, "given")
    b.input(given, [16, 8])
    b.op("MatMul", x, given, name="default")
    b.op("MatMul", x, b.const(SPARSE), name="packed")
    for node in b.nodes:
        if node.name not in ("Softmax_1", "Cast_6", "Transpose_2"):
            b.output(node.output[0], TensorProto.DOUBLE if node.name == "double" else TensorProto.FLOAT)
    return b.output(out).model()


REASONS = {
    "dense": "its weight keeps to no N:M pattern that is half zeros",
    "activation": "not a constant weight but another activation",
    "first operand": "its weight is the first operand",
    "batch": "its weight has 3 dimensions",
    "transA": "Gemm with transA",
    "double": "its weight is double",
    "conv": "no packed form of a convolution's weight is known",
    "one input": "its weight keeps to no N:M pattern that is half zeros",
    "empty": "its weight is empty",
    "along rows": "along different axes",
    "along columns": "along different axes",
    "alpha 1": "nodes scale its weight by different alpha",
    "alpha 2": "nodes scale its weight by different alpha",
    "put out": "an output of the model",
    "read elsewhere": "Neg 'neg' reads its weight, too, and needs it as it is",
    "lookup": "it looks up rows of an embedding",
    "tied": "Gather 'lookup' looks up rows of its weight and needs it as it is",
    "by itself": "its weight is another of its inputs as well",
    "overflow": "its weight times alpha is not finite",
    "default": "not a constant weight but another activation",
}


def test_reasons(b, run_passes):
    model = floats(b)
    edits = {e.node: e for e in run_passes(model, NmPack()).edits}
    assert {n: e.detail for n, e in edits.items() if e.action == "applied"}.keys() == {"packed"}
    assert edits.keys() == REASONS.keys() | {"packed"}
    for name, reason in REASONS.items():
        assert reason in edits[name].detail, name


@pytest.mark.parametrize(("pattern", "before", "after"), [("1:2", 32, 40), ("2:4", 32, 80)])
def test_what_would_not_get_smaller(pattern, before, after, b, run_passes):
    y = b.op("MatMul", b.input("x", ["n", 1]), b.const(SPARSE[:1]), name="layer")
    (edit,) = run_passes(b.output(y).model(), NmPack(pattern=pattern)).edits
    assert edit.detail == f"packed {pattern} it would take {after} bytes, and it takes {before} as it is"


def test_contract(b, capabilities):
    check_pass(NmPack(), floats(b), capabilities=capabilities)


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_values_that_cannot_be_rounded(values, b, run_passes):
    for name, value in (("nan", np.nan), ("infinity", np.inf), ("large", 7e4)):
        b.op("MatMul", "x", b.const(np.where(SPARSE > 0, np.float32(value), 0).astype(np.float32)), name=name)
        b.output(f"{name}_out")
    b.input("x", ["n", 16])
    edits = {e.node: e for e in run_passes(b.model(), NmPack(values=values)).edits}
    assert edits["nan"].detail == edits["infinity"].detail == "its weight holds NaN or infinity"
    if values == "float16":
        assert edits["large"].detail == "its weight reaches 7e+04, more than float16 holds"
    else:
        assert edits["large"].action == "applied"


def test_nan_is_kept_with_the_bits_of_the_others(b, run_passes):
    weight = SPARSE.copy()
    weight[0, 0] = np.nan
    model = b.output(b.op("MatMul", b.input("x", ["n", 16]), b.const(weight), name="layer")).model()
    (edit,) = run_passes(model, NmPack()).edits
    assert edit.action == "applied"


QUANTIZED = {
    "int16": ("its weight is int16; of integers, those of 8 bits are packed", np.int16, {}),
    "zero point": ("the zero point of its weight is not the middle of its integers", np.int8, {"zero": np.int8(3)}),
    "uint8 without zero point": ("the zero point of its weight is not the middle of its integers", np.uint8, {}),
    "by input": ("a scale for every input", np.int8, {"scale": np.ones(16, np.float32), "axis": 0}),
    "in blocks": (
        "a scale for every block", np.int8, {"scale": np.ones((4, 8), np.float32), "axis": 0, "block_size": 4}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_grids(case, b, run_passes):
    reason, dtype, more = QUANTIZED[case]
    more = {"scale": np.float32(0.1), **more}
    parts = [b.const(SPARSE.astype(dtype)), b.const(more.pop("scale"))]
    parts += [b.const(more.pop("zero"))] if "zero" in more else []
    y = b.op("MatMul", b.input("x", ["n", 16]), b.op("DequantizeLinear", *parts, **more), name="layer")
    (edit,) = run_passes(b.output(y).model(opset=21), NmPack()).edits
    assert edit.action == "refused"
    assert reason in edit.detail


@pytest.mark.parametrize("moved", [False, True])
def test_products_of_integers_stay(moved, b, run_passes):
    """A weight behind DequantizeLinear is one of an integer product only if the other operand is quantized, too."""
    for name, x in (("static", b.qdq(b.input("x", ["n", 16]))), ("weight only", "x")):
        x = b.op("Reshape", x, b.const(np.array([-1, 16]))) if moved else x
        weight = b.op("DequantizeLinear", b.const(SPARSE.astype(np.int8)), b.const(np.float32(0.1)))
        b.output(b.op("MatMul", x, weight, name=name))
    edits = {e.node: e for e in run_passes(b.model(), NmPack()).edits}
    assert edits["weight only"].action == "applied"
    reason = "its input is quantized as well: with a packed weight it would no longer be computed in integers"
    assert (edits["static"].action, edits["static"].detail) == ("refused", reason)


def test_statically_quantized_model(b, run_passes):
    y = b.op("Relu", b.op("MatMul", b.input("x", ["n", 16]), b.const(SPARSE), name="layer"))
    model = b.output(b.op("MatMul", y, b.floats(8, 3), name="next")).model()
    data = [{"x": np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)}]
    run_passes(model, Quantize(), data=data)
    edits = {e.node: e for e in run_passes(model, NmPack()).edits}
    assert all("no longer be computed in integers" in e.detail for e in edits.values())
    assert edits.keys() == {"layer", "next"}


def test_blocks_of_weight_only(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", ["n", 32]), b.floats(32, 32), name="layer")).model()
    run_passes(model, WeightOnly(min_weights=0, form="matmulnbits"))
    (edit,) = run_passes(model, NmPack()).edits
    assert edit.detail == "its weight is packed in blocks already, zeros included"


def test_subgraphs(branching_example, run_passes):
    model, _ = branching_example
    weight = np.kron(np.eye(2, dtype=np.float32), np.float32([[1, 0], [0, 2]]))
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    found = {e.node: e.detail for e in run_passes(model, NmPack()).edits}
    assert found["n3"] == "it stands in a subgraph or function; only weights of the main graph are packed"
    assert found["n0"] == found["n1"] == "MatMul 'n3' reads its weight, too, and needs it as it is"


def test_functions(b, run_passes):
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
        g (float[n, 4] x) => (float[n, 2] y) { y = local.Layer(x) }
        <domain: "local", opset_import: ["" : 17]> Layer (p) => (s) {
            q = Constant <value = float[4, 2] {1, 0, 0, 1, 0, 0, 0, 0}> ()
            s = MatMul(p, q) }""")
    (edit,) = run_passes(model, NmPack()).edits
    assert "it stands in a subgraph or function" in edit.detail


def test_nodes_that_are_not_selected_are_not_reported(b, run_passes):
    report = run_passes(floats(b), NmPack(where=Select(name=("dense", "packed"))))
    assert [(e.action, e.node) for e in report.edits] == [("refused", "dense"), ("applied", "packed")]
