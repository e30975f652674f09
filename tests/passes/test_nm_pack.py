"""Packed weights compute what the dense ones did, in every form of product and weight, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from onnxcomp.edit import constant
from onnxcomp.errors import RecipeError
from onnxcomp.model import load, save
from onnxcomp.ops import unpack_nm
from onnxcomp.passes import _disk_weights
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.recipe import parse_recipe
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass


def sparse(seed: int, k: int, n: int, kept: int = 2, size: int = 4, dtype=np.float32) -> np.ndarray:
    """(K, N), exactly so many nonzeros in every whole group of rows."""
    random = np.random.default_rng(seed)
    order = random.random((-(-k // size), size, n)).argsort(axis=1).argsort(axis=1)
    weight = random.normal(size=(k, n)).astype(dtype)
    return np.where((order < kept).reshape(-1, n)[:k], np.where(weight == 0, 1, weight), 0).astype(dtype)


def unpacked(model: ir.Model, node: ir.Node) -> np.ndarray:
    """What a packed product multiplies by."""
    values, indices, *scale = (constant(v) for v in node.inputs[1:])
    m, k = (node.attributes[name].as_int() for name in ("m", "k"))
    weight = unpack_nm(values, indices, m=m, k=k)
    return weight * scale[0] if scale else weight


def packed_nodes(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type.startswith("NMMatMul")]


@pytest.fixture
def stock(run, tmp_path):
    """Saves a model, has the checker look at it, and runs it in stock ONNX Runtime."""

    def outputs(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        path = tmp_path / "stock.onnx"
        save(model, path)
        onnx.checker.check_model(path, full_check=True)
        return run(path, feed)

    return outputs


FORMS = ["matmul", "transposed", "gemm", "gemm transB", "gemm bias", "gemm alpha beta", "gemm no C with beta"]


def product(b, form: str, dtype=np.float32, *, k: int = 37, n: int = 6) -> tuple[ir.Model, dict[str, np.ndarray]]:
    weight = sparse(0, k, n, dtype=dtype)
    turned = "trans" in form
    w = b.const(np.ascontiguousarray(weight.T) if turned else weight, "w")
    kind = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    shape = ["n", k] if "gemm" in form else ["a", "n", k]
    x = b.input("x", shape, kind)
    if "gemm" in form:
        more = [b.const(np.linspace(-1, 1, n, dtype=dtype))] if "bias" in form or "alpha" in form else []
        attributes = {"transB": 1} if turned else {}
        if "alpha" in form:
            attributes |= {"alpha": -0.5, "beta": 3.0}
        if "no C" in form:
            attributes |= {"alpha": 2.0, "beta": 0.25}
        y = b.op("Gemm", x, w, *more, name="layer", **attributes)
    else:
        y = b.op("MatMul", x, b.op("Transpose", w, perm=[1, 0]) if turned else w, name="layer")
    b.outputs.append(onnx.helper.make_tensor_value_info(y, kind, [*shape[:-1], n]))
    feed = np.random.default_rng(1).normal(size=[{"a": 2, "n": 3}.get(s, s) for s in shape]).astype(dtype)
    return b.model(), {"x": feed}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_product(form, dtype, b, run_passes, outputs, stock):
    model, feed = product(b, form, dtype)
    expected = outputs(model, feed)[0]
    stored = constant(model.graph.initializers["w"])
    report = run_passes(model, NmPack())
    (node,) = packed_nodes(model)
    weight = stored.T if "trans" in form else stored
    alpha = dtype({"gemm alpha beta": -0.5, "gemm no C with beta": 2.0}.get(form, 1.0))
    found = unpacked(model, node)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, weight * alpha)
    assert "w" not in model.graph.initializers
    assert not any(n.op_type in ("Transpose", "MatMul", "Gemm") for n in model.graph)
    held = sum(constant(v).nbytes for v in node.inputs[1:])
    (edit,) = report.edits
    assert (edit.action, edit.node, edit.op_type) == ("applied", "layer", "NMMatMul")
    assert edit.detail == f"2:4 {np.dtype(dtype).name}: {stored.nbytes:,} -> {held:,} bytes"
    tolerance = 1e-5 if dtype == np.float32 else 1e-2
    for result in (
        outputs(model, feed)[0],
        stock(model, feed)[0],
        ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0],
    ):
        assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_any_number_of_rows(rows, b, run_passes, stock):
    model, _ = product(b, "gemm bias")
    dense = model.clone()
    run_passes(model, NmPack())
    feed = {"x": np.ones((rows, 37), np.float32)}
    np.testing.assert_allclose(stock(model, feed)[0], stock(dense, feed)[0], rtol=1e-5, atol=1e-5)


def test_bias_that_is_computed(b, run_passes, outputs):
    w, c = b.const(sparse(0, 16, 5), "w"), b.input("c", ["n", 1])
    b.op("Gemm", b.input("x", ["n", 16]), w, c, name="layer", beta=-2.0)
    b.op("Gemm", "x", w, c, name="without", beta=0.0)
    model = b.output("layer_out").output("without_out").model()
    feed = {"x": np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32), "c": np.float32([[1], [2], [3]])}
    expected = outputs(model, feed)
    run_passes(model, NmPack())
    assert [v.name for v in model.graph.outputs] == ["layer_out", "without_out"]
    assert [n.op_type for n in model.graph] == ["CastLike", "Mul", "NMMatMul", "Add", "NMMatMul"]
    for found, wanted in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_sum_with_the_bias_has_the_name_of_the_output(b, run_passes):
    y = b.op("Gemm", b.input("x", ["n", 16]), b.const(sparse(0, 16, 5)), b.floats(5), name="layer")
    model = b.output(b.op("Relu", y)).model()
    run_passes(model, NmPack())
    assert [n.op_type for n in model.graph] == ["NMMatMul", "Add", "Relu"]
    assert model.graph[2].inputs[0].name == "layer_out"


PATTERNS = ["1:2", "2:4", "1:4", "4:8", "2:8", "1:8", "1:16", "2:16", "4:16", "8:16", "1:32", "16:32"]


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern_is_recognised(pattern, bits, b, run_passes):
    """A weight that is no more regular than the pattern says is packed in that, in as many bits as the formula has."""
    kept, size = map(int, pattern.split(":"))
    y = b.op("MatMul", b.input("x", ["n", 256]), b.const(sparse(0, 256, 64, kept, size), "w"), name="layer")
    model = b.output(y).model()
    (edit,) = run_passes(model, NmPack(values={32: "keep", 16: "float16", 8: "int8"}[bits])).edits
    assert edit.detail.split()[0] == pattern
    values, indices, *_ = (constant(v) for v in packed_nodes(model)[0].inputs[1:])
    index_bits = {2: 1, 4: 2, 8: 3, 16: 4, 32: 5}[size]
    assert 8 * (values.nbytes + indices.nbytes) == 256 * 64 * kept * (bits + index_bits) / size


def test_given_pattern(b, run_passes, outputs):
    """Only that one is packed, though not of the powers of two, and though another would be smaller."""
    for name, kept, size in (("three", 3, 8), ("two", 2, 8), ("four", 4, 8), ("dense", 8, 8)):
        b.op("MatMul", "x", b.const(sparse(1, 44, 3, kept, size)), name=name)
        b.output(f"{name}_out")
    b.input("x", ["n", 44])
    model = b.model()
    feed = {"x": np.random.default_rng(0).normal(size=(2, 44)).astype(np.float32)}
    expected = outputs(model, feed)
    edits = {e.node: e for e in run_passes(model, NmPack(pattern="3:8")).edits}
    assert {n for n, e in edits.items() if e.action == "applied"} == {"three", "two"}
    assert edits["two"].detail.startswith("3:8 float32: 528 -> ")
    assert edits["four"].detail == edits["dense"].detail == "its weight is not 3:8 sparse"
    for found, wanted in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("values", ["float16", "int8"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_values_are_rounded_and_zeros_are_not(values, dtype, b, run_passes, outputs, stock):
    model, feed = product(b, "gemm alpha beta", dtype)
    weight = constant(model.graph.initializers["w"]).copy()
    weight[:, 2] = 0
    weight[:, 3] = np.where(weight[:, 3] == 0, 0, 1e-7)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    run_passes(model, NmPack(values=values))
    (node,) = packed_nodes(model)
    assert (node.op_type == "NMMatMulInt8") == (values == "int8")
    assert constant(node.inputs[1]).dtype == (np.int8 if values == "int8" else np.float16)
    found, wanted = unpacked(model, node).astype(np.float64), weight.astype(np.float64) * -0.5
    assert (found[weight == 0] == 0).all()
    step = np.abs(wanted).max(axis=0) / 127 if values == "int8" else np.abs(wanted) * 2**-10 + 2**-24
    assert (np.abs(found - wanted) <= 0.501 * step).all()
    if values == "int8":
        assert np.abs(constant(node.inputs[1])).max(axis=0).tolist() == [127, 127, 0, 127, 127, 127]
    expected = feed["x"].astype(np.float64) @ found + 3 * np.linspace(-1, 1, 6, dtype=dtype)
    np.testing.assert_allclose(stock(model, feed)[0], expected, rtol=1e-2, atol=1e-4 if dtype == np.float32 else 2e-2)


def quantized(b, dtype=np.int8, scale: str = "column", *, turned: bool = False) -> ir.Model:
    weight = np.rint(np.clip(sparse(0, 24, 5) * 40, -127, 127))
    zero = 0 if dtype == np.int8 else 128
    stored = (weight + zero).astype(dtype)
    scales = np.linspace(0.01, 0.02, 5, dtype=np.float32) if scale == "column" else np.float32(0.03)
    parts = [b.const(stored.T if turned else stored, "q"), b.const(scales, "s")]
    if dtype == np.uint8 or scale == "column":
        parts.append(b.const(np.full(np.shape(scales), zero, dtype), "z"))
    y = b.op("DequantizeLinear", *parts, axis=0 if turned else 1)
    y = b.op("Transpose", y, perm=[1, 0]) if turned else y
    return b.output(b.op("MatMul", b.input("x", ["n", 24]), y, name="layer")).model(opset=21)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("scale", ["column", "tensor"])
@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_integers_stay_what_they_are(dtype, scale, turned, b, run_passes, outputs):
    model = quantized(b, dtype, scale, turned=turned)
    feed = {"x": np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)}
    # Not ONNX Runtime's, which rounds the inputs of such a product to 8 bits.
    expected = ReferenceEvaluator(ir.to_proto(model)).run(None, feed)[0]
    stored = sum(constant(model.graph.initializers[n]).nbytes for n in "qsz" if n in model.graph.initializers)
    (edit,) = run_passes(model, NmPack(values="float16")).edits
    (node,) = model.graph
    assert node.op_type == "NMMatMulInt8"
    assert edit.detail.startswith(f"2:4 int8: {stored} -> {sum(constant(v).nbytes for v in node.inputs[1:])} bytes")
    assert [constant(v).dtype for v in node.inputs[1:]] == [np.int8, np.uint8, np.float32]
    assert set(model.graph.initializers) == {v.name for v in node.inputs[1:]}
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("values", ["keep", "int8"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
def test_after_nm_mask(pattern, values, attention_example, run_passes, outputs, capabilities):
    model, feed = attention_example
    run_passes(model, NmMask(pattern=pattern, method="wanda", include_ends=True), data=[feed])
    expected = outputs(model, feed)[0]
    weights = {
        n.name: constant(n.inputs[1])
        for n in model.graph
        if n.op_type == "MatMul" and constant(n.inputs[1]) is not None
    }
    check_pass(NmPack(values=values), model, capabilities=capabilities)
    report = run_passes(model, NmPack(values=values))
    assert {e.node for e in report.edits if e.action == "applied"} == set(weights) == {"qkv", "proj", "fc1", "fc2"}
    for node in packed_nodes(model):
        if values == "keep":
            assert unpacked(model, node).tobytes() == weights[node.name].tobytes()
    run_passes(model, Cleanup())
    assert len(packed_nodes(model)) == 4
    found = outputs(model, feed)[0]
    tolerance = 1e-5 if values == "keep" else 0.05 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_shared_weight_is_packed_once(b, run_passes, outputs):
    w = b.const(sparse(0, 16, 16), "w")
    y = b.op("MatMul", b.op("Gemm", b.input("x", ["n", 16]), w, name="one"), w, name="two")
    model = b.output(y).model()
    feed = {"x": np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)}
    expected = outputs(model, feed)[0]
    (edit,) = run_passes(model.clone(), NmPack(where=Select(name=("one",)))).edits
    assert (edit.action, edit.detail) == ("refused", "MatMul 'two' reads its weight, too, and is not selected")
    report = run_passes(model, NmPack())
    assert [e.node for e in report.edits] == ["one", "two"]
    assert all(e.detail.endswith("bytes, shared by 2 nodes") for e in report.edits)
    assert len(model.graph.initializers) == 2
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5)


def test_weight_of_a_constant_node(b, run_passes, outputs):
    w = b.op("Constant", value=onnx.numpy_helper.from_array(sparse(0, 16, 4)))
    model = b.output(b.op("MatMul", b.input("x", ["n", 16]), w, name="layer")).model()
    feed = {"x": np.ones((2, 16), np.float32)}
    expected = outputs(model, feed)[0]
    run_passes(model, NmPack())
    assert [n.op_type for n in model.graph] == ["NMMatMul"]
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5)


def test_contract_on_models_of_every_kind(example, capabilities):
    model, feed = example
    check_pass(NmPack(), model, capabilities=capabilities, runner=reference_runner, data=[feed])
    check_pass(NmPack(values="int8"), model, capabilities=capabilities, runner=reference_runner, data=[feed])


def test_the_model_is_raised_to_the_opset_of_the_body(b, run_passes, outputs):
    y = b.op("MatMul", b.input("x", ["n", 16]), b.const(sparse(0, 16, 4)), name="layer")
    model = b.output(y).model(opset=13)
    run_passes(model, NmPack())
    assert model.opset_imports == {"": 16, "onnxcomp": 1}
    assert outputs(model, {"x": np.ones((1, 16), np.float32)})[0].shape == (1, 4)


def test_weights_on_disk(b, run_passes, outputs, tmp_path, monkeypatch):
    """They are packed to what they would be in memory, and wait in a file until they are saved."""
    monkeypatch.setattr(_disk_weights, "_SMALL", 64)
    y = b.op("MatMul", b.input("x", ["n", 40]), b.const(sparse(0, 40, 24), "first"), name="one")
    y = b.op("Gemm", y, b.const(sparse(1, 24, 30).T.copy(), "second"), name="two", transB=1)
    memory = b.output(b.op("MatMul", y, b.const(np.ones((30, 2), np.float32), "dense"), name="three")).model()
    onnx.save(ir.to_proto(memory), tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    disk = load(tmp_path / "m.onnx")
    assert isinstance(disk.graph.initializers["first"].const_value, ir.ExternalTensor)
    assert run_passes(disk, NmPack()).edits == run_passes(memory, NmPack()).edits
    for name, value in memory.graph.initializers.items():
        other = disk.graph.initializers[name].const_value
        assert isinstance(other, ir.ExternalTensor if name == "dense" else ir.LazyTensor)
        assert other.tobytes() == value.const_value.tobytes()
    save(disk, tmp_path / "m.onnx")
    Path(tmp_path / "w.bin").unlink(missing_ok=True)
    feed = {"x": np.ones((2, 40), np.float32)}
    np.testing.assert_array_equal(outputs(load(tmp_path / "m.onnx"), feed)[0], outputs(memory, feed)[0])


def test_recipe():
    text = 'version = 1\n[[passes]]\npass = "nm_pack"\n'
    for pattern in ("2:2", "2:4:8", "0:4", "x"):
        with pytest.raises(RecipeError, match="is not N:M with N < M"):
            NmPack(pattern=pattern)
    with pytest.raises(RecipeError, match="indices reach 256, so M can be no larger"):
        NmPack(pattern="1:257")
    with pytest.raises(RecipeError, match="values"):
        parse_recipe(text + 'values = "int4"')
