"""What the quantized graph computes, in both forms, in onnxruntime, against the weights that the integers stand for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.blockwise import quantize_blocks
from onnxcomp.edit import constant
from onnxcomp.model import load, save
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.testing import check_pass

FORMS = ("matmulnbits", "qdq")
EXACT = {"accuracy_level": 0, "min_weights": 0}


def rounded(weight: np.ndarray, bits: int = 4, block_size: int = 32, symmetric: bool = False) -> np.ndarray:
    """What quantization makes of a matrix (N, K)."""
    return quantize_blocks(weight, bits, block_size, symmetric=symmetric, method="rtn").dequantize()


def x_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    assert found.shape == expected.shape
    atol = tolerance * float(np.abs(expected).max())
    np.testing.assert_allclose(found.astype(np.float32), expected, rtol=0, atol=atol)


def ops(model: ir.Model) -> Counter:
    return Counter(n.op_type for n in model.graph.all_nodes())


@pytest.fixture
def executed(tmp_path):
    """Op types of the graph that onnxruntime runs."""
    return lambda model: OrtCpu().compile(model, tmp_path / "artifact").audit.executed_ops


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [64, 33, 20])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_matmul(bits, symmetric, columns, form, b, run_passes, outputs, executed):
    """Odd N, and K that is no multiple of the block. The standard form is fused, so its activations have 8 bits."""
    model = b.output(b.op("MatMul", b.input("x", [2, "n", columns]), b.floats(columns, 7), name="only")).model()
    weight = constant(model.graph.initializers["c0"])
    x = x_of(2, 3, columns)
    run_passes(model, WeightOnly(bits=bits, symmetric=symmetric, method="rtn", form=form, **EXACT))
    expected = x @ rounded(weight.T, bits, 32, symmetric).T
    close(outputs(model, {"x": x})[0], expected, 1e-5 if form == "matmulnbits" else 0.02)
    assert executed(model) == {"MatMulNBits": 1}
    assert "c0" not in model.graph.initializers


@pytest.mark.parametrize("bits", [4, 8])
def test_accuracy_level_4_rounds_activations_to_8_bits(bits, b, run_passes, outputs):
    model = b.output(b.op("MatMul", b.input("x", ["n", 256]), b.floats(256, 32))).model()
    weight, x = constant(model.graph.initializers["c0"]), x_of(9, 256)
    run_passes(model, WeightOnly(bits=bits, method="rtn", min_weights=0))
    expected = x @ rounded(weight.T, bits).T
    found = outputs(model, {"x": x})[0]
    close(found, expected, 0.02)
    assert np.abs(found - expected).max() > 1e-4 * np.abs(expected).max(), "nothing was rounded"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_with_bias(transposed, columns, form, b, run_passes, outputs, executed):
    weight = b.floats(6, columns) if transposed else b.floats(columns, 6)
    y = b.op("Gemm", b.input("x", ["n", columns]), weight, b.floats(6), name="only", transB=int(transposed))
    model = b.output(y).model()
    matrix, bias = (constant(model.graph.initializers[n]) for n in ("c0", "c1"))
    x = x_of(4, columns)
    run_passes(model, WeightOnly(method="rtn", form=form, **EXACT))
    expected = x @ rounded(matrix if transposed else matrix.T).T + bias
    close(outputs(model, {"x": x})[0], expected, 1e-5 if form == "matmulnbits" else 0.03)
    assert executed(model)["MatMulNBits"] == 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 40])
def test_float16(columns, bits, run_passes, outputs):
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float16[n, {columns}] x) => (float16[n, 5] y) {{ y = MatMul(x, w) }}"""
    )
    weight = (x_of(columns, 5) * 0.1).astype(np.float16)
    value = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    value.shape, value.dtype = ir.Shape(weight.shape), ir.DataType.FLOAT16
    node = next(iter(model.graph))
    node.replace_input_with(1, value)
    node.name = "only"
    model.graph.register_initializer(value)
    x = x_of(3, columns).astype(np.float16)
    run_passes(model, WeightOnly(bits=bits, method="rtn", **EXACT))
    assert ops(model) == {"MatMulNBits": 1}
    assert model.graph.initializers["w_scale"].dtype == ir.DataType.FLOAT16
    close(outputs(model, {"x": x})[0], x.astype(np.float32) @ rounded(weight.T, bits).T, 5e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_shared_weight_is_stored_once(form, b, run_passes, outputs):
    shared = b.floats(32, 32)
    y = b.op(
        "MatMul", b.op("Tanh", b.op("MatMul", b.input("x", ["n", 32]), shared, name="first")), shared, name="second"
    )
    model = b.output(y).model()
    weight, x = constant(model.graph.initializers["c0"]), x_of(4, 32)
    report = run_passes(model, WeightOnly(method="rtn", form=form, **EXACT))
    matrix = rounded(weight.T).T
    close(outputs(model, {"x": x})[0], np.tanh(x @ matrix) @ matrix, 1e-5 if form == "matmulnbits" else 0.03)
    assert sum(v.const_value.size >= 512 for v in model.graph.initializers.values()) == 1
    assert all("shared by 2 nodes" in e.detail for e in report.edits if e.op_type != "model")


def tied(b, width: int = 64, head: str = "Gemm") -> ir.Model:
    """An embedding whose weight is the output layer's, too."""
    table = b.floats(50, width)
    rows = b.op("Gather", table, b.input("ids", [1, "t"], TensorProto.INT64), name="embed")
    x = b.op("Tanh", rows)
    if head == "Gemm":
        x = b.op("Reshape", x, b.const(np.array([-1, width])))
        return b.output(rows).output(b.op("Gemm", x, table, name="head", transB=1)).model()
    transposed = b.op("Transpose", table, perm=[1, 0])
    return b.output(rows).output(b.op("MatMul", x, transposed, name="head")).model()


@pytest.mark.parametrize("head", ["Gemm", "MatMul"])
@pytest.mark.parametrize("width", [96, 40])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_tied_embedding(form, bits, symmetric, width, head, b, run_passes, outputs, executed):
    """One table for both; rows are looked up as integers, in the standard form always of 8 bits.

    With three blocks a row, 4 bits have no zero points, which older runtimes would misread.
    """
    model = tied(b, width, head)
    table, ids = constant(model.graph.initializers["c0"]), np.array([[3, 0, 49, 7]])
    run_passes(model, WeightOnly(bits=bits, symmetric=symmetric, method="rtn", form=form, **EXACT))
    bits = 8 if form == "qdq" else bits
    matrix = rounded(table, bits, 32, symmetric or (bits == 4 and width == 96))
    rows, logits = outputs(model, {"ids": ids})
    np.testing.assert_allclose(rows, matrix[ids], rtol=0, atol=1e-6)
    expected = np.tanh(matrix[ids]) @ matrix.T
    close(logits.reshape(expected.shape), expected, 1e-5 if form == "matmulnbits" else 0.03)
    tables = [v.const_value.size for v in model.graph.initializers.values() if v.const_value.size >= 500]
    assert len(tables) == 1
    run = executed(model)
    assert run["MatMulNBits"] == 1
    assert "Transpose" not in run
    assert ("GatherBlockQuantized" if form == "matmulnbits" else "DequantizeLinear") in run


@pytest.mark.parametrize("form", FORMS)
def test_a_table_by_itself(form, b, run_passes, outputs):
    model = b.output(b.op("Gather", b.floats(70, 64), b.input("ids", ["t"], TensorProto.INT64), name="embed")).model()
    table, ids = constant(model.graph.initializers["c0"]), np.array([69, 1])
    report = run_passes(model, WeightOnly(bits=8, form=form))
    assert [(e.action, 'embeddings = "all"' in e.detail) for e in report.edits] == [("refused", True)]
    run_passes(model, WeightOnly(bits=8, form=form, method="rtn", embeddings="all"))
    np.testing.assert_allclose(outputs(model, {"ids": ids})[0], rounded(table, 8)[ids], rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_branches(form, branching_example, run_passes, outputs):
    """A weight of the main graph that a node inside an If reads."""
    model, feed = branching_example
    expected = outputs(model, feed)[0]
    report = run_passes(model, WeightOnly(bits=8, form=form, **EXACT))
    nodes = [e.node for e in report.edits if e.action == "applied" and e.op_type != "model"]
    assert len(nodes) == 3
    for condition in (True, False):
        feed["c"] = np.array(condition)
        assert outputs(model, feed)[0].shape == expected.shape
    feed["c"] = np.array(True)
    close(outputs(model, feed)[0], expected, 0.03)


def test_a_weight_inside_a_branch(run_passes, outputs):
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[2, 2] x, bool c) => (float[2, 3] y) {
            y = If (c) <
                then_branch = t () => (float[2, 3] p) <float[2, 3] w = {1,2,3,4,5,6}> { p = MatMul(x, w) },
                else_branch = e () => (float[2, 3] q)
                    { v = Constant<value = float[2, 3] {6,5,4,3,2,1}>() q = MatMul(x, v) }>
        }""")
    for i, node in enumerate(model.graph.all_nodes()):
        node.name = f"n{i}"
    feeds = [{"x": np.eye(2, dtype=np.float32), "c": np.array(c)} for c in (True, False)]
    expected = [outputs(model, feed)[0] for feed in feeds]
    for form in FORMS:
        copy = model.clone()
        run_passes(copy, WeightOnly(bits=8, form=form, **EXACT))
        assert ops(copy)["MatMulNBits" if form == "matmulnbits" else "DequantizeLinear"] == 2
        for feed, before in zip(feeds, expected, strict=True):
            close(outputs(copy, feed)[0], before, 0.02)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", FORMS)
def test_contract(form, bits, example, capabilities):
    model, _ = example
    step = WeightOnly(bits=bits, form=form, min_weights=0, where=Select(skip=("n2",)))
    check_pass(step, model, capabilities=capabilities)
    check_pass(WeightOnly(bits=bits, form=form, min_weights=0), model, capabilities=capabilities)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [64, 40])
def test_contract_of_a_tied_embedding(form, width, b, capabilities):
    edits = check_pass(WeightOnly(form=form, min_weights=0), tied(b, width), capabilities=capabilities)
    assert sum(e.action == "applied" and e.op_type != "model" for e in edits) == 2


def test_names_stay_and_the_graph_output_too(b, run_passes):
    model = b.output(b.op("Gemm", b.input("x", ["n", 32]), b.floats(32, 8), b.floats(8), name="layer")).model()
    run_passes(model, WeightOnly(**EXACT))
    (node,) = model.graph
    assert (node.name, node.op_type, node.domain) == ("layer", "MatMulNBits", "com.microsoft")
    assert model.graph.outputs[0] is node.outputs[0]
    assert model.graph.outputs[0].name == "layer_out"
    assert {k: a.value for k, a in node.attributes.items()} == {
        "K": 32, "N": 8, "bits": 4, "block_size": 32, "accuracy_level": 0,
    }  # fmt: skip


def test_both_forms_hold_the_same_weights(b, run_passes, outputs):
    """In the optimised graph and in the one as it stands, which dequantizes in float."""
    from onnxcomp.targets.ort import reference_runner

    model = b.output(b.op("MatMul", b.input("x", ["n", 80]), b.floats(80, 16))).model()
    other, x = model.clone(), x_of(5, 80)
    run_passes(model, WeightOnly(**EXACT))
    run_passes(other, WeightOnly(form="qdq", **EXACT))
    first = outputs(model, {"x": x})[0]
    second = reference_runner(other, ["MatMul_0_out"], optimize=False)({"x": x})["MatMul_0_out"]
    close(second, first, 1e-5)
    run_passes(standard := other.clone(), WeightOnly(form="qdq", **EXACT))
    assert ops(standard) == {"DequantizeLinear": 1, "MatMul": 1}
    level_4 = b.output(b.op("Neg", "MatMul_0_out")).model()
    run_passes(level_4, WeightOnly(min_weights=0))
    close(outputs(other, {"x": x})[0], outputs(level_4, {"x": x})[0], 1e-5)


def test_weights_on_disk(b, run_passes, outputs, tmp_path):
    """They are read one by one, and the model may be saved over the file that they come from."""
    import onnx

    y = b.op("MatMul", b.input("x", ["n", 64]), b.floats(64, 48), name="first")
    model = b.output(b.op("MatMul", y, b.floats(48, 8), name="second")).model()
    path, feed = tmp_path / "model.onnx", {"x": x_of(3, 64)}
    expected = outputs(model, feed)[0]
    onnx.save(ir.to_proto(model), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = load(path)
    run_passes(model, WeightOnly(bits=8, **EXACT))
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    save(model, path)
    (tmp_path / "weights.bin").unlink()
    close(outputs(load(path), feed)[0], expected, 0.03)
