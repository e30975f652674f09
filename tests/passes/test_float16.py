"""Half precision: what becomes float16, what stays, and why."""

from __future__ import annotations

from dataclasses import replace

import kinds
import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from onnx import TensorProto

from onnxcomp.errors import CalibrationError
from onnxcomp.metrics import sqnr
from onnxcomp.model import load, save
from onnxcomp.passes.float16 import Float16
from onnxcomp.rewrite import Pipeline
from onnxcomp.select import Select
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.testing import check_pass

FULL = Float16(slow_target="convert")
WEIGHTS = Float16(weights_only=True, min_weights=1)
HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(size=shape).astype(np.float32)


def types(model):
    return {n.name: n.outputs[0].dtype for n in model.graph.all_nodes()}


def casts(model):
    return sum(n.op_type == "Cast" for n in model.graph)


def refusals(report):
    return {e.node: e.detail for e in report.edits if e.action == "refused"}


# --- everything


def test_matmul_in_numpy(b, run_passes, outputs):
    weight = normal(64, 8)
    model = b.output(b.op("MatMul", b.input("x", [4, 64]), b.const(weight), name="layer")).model()
    x = normal(4, 64)
    run_passes(model, FULL)
    expected = x.astype(np.float16).astype(np.float32) @ weight.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(outputs(model, {"x": x})[0], expected.astype(np.float16), rtol=2e-3, atol=2e-3)
    assert types(model)["layer"] == HALF
    assert {v.dtype for v in model.graph.initializers.values()} == {HALF}


@pytest.mark.parametrize("data", [False, True])
def test_whole_models(example, data, run_passes, outputs):
    model, feed = example
    expected = outputs(model, feed)[0]
    run_passes(model, FULL, data=[feed] if data else None)
    assert sqnr(expected, outputs(model, feed)[0]) > 50
    assert [v.dtype for v in model.graph.outputs if v.dtype is not None] == [FLOAT]
    assert casts(model) == 2, "at the input and the output; nothing between is cast"


def test_inputs_and_outputs(cnn_example, run_passes, outputs):
    model, feed = cnn_example
    expected = outputs(model, feed)[0]
    run_passes(model, replace(FULL, keep_io=False))
    assert [v.dtype for v in (*model.graph.inputs, *model.graph.outputs)] == [HALF, HALF]
    assert casts(model) == 0
    found = outputs(model, {"x": feed["x"].astype(np.float16)})[0]
    assert found.dtype == np.float16
    assert sqnr(expected, found.astype(np.float32)) > 50


def test_a_value_that_float32_needs_too(b, run_passes, outputs):
    """One product leaves the selection, and an output is read inside as well."""
    x = b.input("x", [4, 16])
    first = b.op("MatMul", x, b.floats(16, 16), name="first")
    second = b.op("MatMul", first, b.floats(16, 16), name="second")
    model = b.output(first).output(second).model()
    feed = {"x": normal(4, 16)}
    expected = outputs(model, feed)
    report = run_passes(model, replace(FULL, where=Select(name=("first",))))
    assert [e.node for e in report.edits] == ["first"]
    assert [types(model)[n] == HALF for n in ("first", "second")] == [True, False]
    assert [v.name for v in model.graph.outputs] == [first, second]
    for a, c in zip(expected, outputs(model, feed), strict=True):
        assert sqnr(a, c) > 55


def test_a_number_made_float_is_made_half(b, run_passes, outputs):

    x = b.op("Cast", b.input("i", [4, 16], TensorProto.INT64), to=1, name="cast")
    model = b.output(b.op("MatMul", x, b.floats(16, 4), name="layer")).model()
    run_passes(model, FULL)
    assert types(model)["cast"] == HALF
    assert casts(model) == 2, "that one and the output's"
    outputs(model, {"i": np.ones((4, 16), np.int64)})


def test_an_output_whose_type_an_attribute_says(b, run_passes, outputs):
    y = b.op("RandomUniformLike", b.op("MatMul", b.input("x", [4, 16]), b.floats(16, 4)), dtype=1, name="noise")
    model = b.output(b.op("MatMul", y, b.floats(4, 4), name="layer")).model()
    run_passes(model, FULL)
    assert [types(model)[n] == HALF for n in ("noise", "layer")] == [False, True]
    outputs(model, {"x": normal(4, 16)})


def test_contract_of_the_conversion(example, capabilities):
    model, feed = example
    for data in (None, [feed]):
        check_pass(FULL, model, capabilities=capabilities, runner=reference_runner, data=data)


# --- what float16 cannot hold


def test_large_values_are_found_by_data(b, run_passes, outputs):
    x = b.op("MatMul", b.input("x", [4, 16]), b.const(np.eye(16, dtype=np.float32) * 300), name="grown")
    x = b.op("Mul", x, x, name="square")
    x = b.op("Sqrt", x, name="root")
    model = b.output(b.op("MatMul", x, b.floats(16, 4), name="last")).model()
    feed = {"x": np.abs(normal(4, 16)) + 1}
    expected = outputs(model, feed)[0]
    report = run_passes(model, FULL, data=[feed])
    assert set(refusals(report)) == {"square", "root"}
    assert "square_out reaches" in refusals(report)["root"]
    assert [types(model)[n] == HALF for n in ("grown", "square", "root", "last")] == [True, False, False, True]
    assert sqnr(expected, outputs(model, feed)[0]) > 50


@pytest.mark.parametrize("op_type", ["Pow", "Mul"])
def test_growth_is_assumed_without_data(op_type, b, run_passes):
    y = b.op("MatMul", b.input("x", [4, 16]), b.floats(16, 16))
    y = b.op(op_type, y, b.const(np.float32(2)) if op_type == "Pow" else y, name="power")
    y = b.op("ReduceMean", y, axes=[-1], name="mean")
    model = b.output(b.op("MatMul", b.op("Sqrt", y, name="root"), b.floats(1, 4), name="last")).model()
    copy = model.clone()
    report = run_passes(model, FULL)
    assert set(refusals(report)) == {"power", "mean"}
    assert "calibration data would tell" in refusals(report)["mean"]
    assert refusals(run_passes(copy, FULL, data=[{"x": normal(4, 16)}])) == {}, "here it does not grow"


CONSTANTS = {
    "overflow": (1e5, "more than the largest float16"),
    "vanishes": (1e-8, "values below 6.1e-5 lose bits"),
    "subnormal": (1.01e-6, "values below 6.1e-5 lose bits"),
}


@pytest.mark.parametrize("case", sorted(CONSTANTS))
@pytest.mark.parametrize("step", [FULL, WEIGHTS], ids=["full", "weights"])
def test_constants_that_float16_cannot_hold(case, step, b, run_passes, outputs):
    value, reason = CONSTANTS[case]
    constant = b.const(np.full((16, 16), value, np.float32), "held")
    y = b.op("MatMul", b.op("MatMul", b.input("x", [4, 16]), b.floats(16, 16)), constant, name="layer")
    model = b.output(y).model()
    feed = {"x": normal(4, 16)}
    expected = outputs(model, feed)[0]
    report = run_passes(model, step)
    assert "held" in refusals(report)["layer"]
    assert reason in refusals(report)["layer"]
    assert model.graph.initializers["held"].dtype == FLOAT
    assert sqnr(expected, outputs(model, feed)[0]) > 45


@pytest.mark.parametrize("value", [-1e9, -np.inf, float(np.finfo(np.float32).min)])
def test_masks_stay_masks(value, b, run_passes, outputs):
    """A mask of -1e9 becomes -65504 rather than minus infinity, of which a masked row would be NaN."""
    scores = b.op("MatMul", b.input("x", [4, 16]), b.floats(16, 4))
    mask = np.triu(np.full((4, 4), value, np.float32), 1)
    mask[3] = value if np.isfinite(value) else mask[3]
    model = b.output(b.op("Softmax", b.op("Add", scores, b.const(mask), name="masked"))).model()
    feed = {"x": normal(4, 16)}
    expected = outputs(model, feed)[0]
    run_passes(model, FULL)
    found = outputs(model, feed)[0]
    assert types(model)["masked"] == HALF
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[:3], expected[:3], atol=4e-3)


def test_infinity_on_the_data(b, run_passes):
    model = b.output(b.op("MatMul", b.op("Log", b.input("x", [4, 16])), b.floats(16, 4))).model()
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        run_passes(model, FULL, data=[{"x": np.zeros((4, 16), np.float32)}])


# --- where it does not pay


def test_ort_cpu_refuses(cnn_example, capabilities):
    model, _ = cnn_example
    edits = check_pass(Float16(), model, capabilities=capabilities)
    assert [e.node for e in edits] == ["stem", "depthwise", "last", "classify"]
    assert all("would cast around every op, which is slower" in e.detail for e in edits)
    half = replace(capabilities, activation_dtypes=(HALF,))
    assert all(e.action == "applied" for e in check_pass(Float16(), model, capabilities=half))


def test_parts_without_layers_stay(b, run_passes):
    y = b.op("Resize", b.op("Relu", b.input("x", [1, 2, 8, 8])), "", b.const(np.array([1, 1, 2, 2], np.float32)))
    model = b.output(b.op("Conv", y, b.floats(2, 2, 3, 3), name="layer")).model()
    report = run_passes(model, FULL)
    assert [e.node for e in report.edits if e.action == "applied"] == ["layer"]
    (reason,) = refusals(report).values()
    assert reason == "Resize stays float32, as the field keep says"


def test_a_cast_goes_behind_what_only_moves(b, run_passes, outputs):
    """onnxruntime crashes on a Cast, Transpose of leading axes, MatMul in float16."""
    x = b.op("Transpose", b.op("Abs", b.input("x", [4, 1, 16]), name="abs"), name="turned", perm=[1, 0, 2])
    model = b.output(b.op("MatMul", x, b.floats(16, 4), name="layer")).model()
    feed = {"x": normal(4, 1, 16)}
    expected = outputs(model, feed)[0]
    run_passes(model, replace(FULL, where=Select(skip=("abs",))))
    assert [types(model)[n] == HALF for n in ("turned", "layer")] == [False, True]
    assert sqnr(expected, outputs(model, feed)[0]) > 55


def test_beside_integers(b, run_passes):
    y = b.op("Relu", b.matmul(b.qdq(b.input("x", [4, 16])), "quantized"))
    model = b.output(b.op("MatMul", y, b.floats(32, 4), name="float")).model()
    report = run_passes(model, FULL)
    assert "Q/DQ" in refusals(report)["quantized"]
    assert types(model)["float"] == HALF


# --- weights only


def test_weights_only_computes_in_float32(b, run_passes, outputs):
    weight = normal(64, 8)
    model = b.output(b.op("MatMul", b.input("x", [4, 64]), b.const(weight, "w"), name="layer")).model()
    feed = {"x": normal(4, 64)}
    (edit,) = run_passes(model, WEIGHTS).edits
    assert (edit.action, edit.node, edit.detail) == ("applied", "layer", "weight w stored in float16")
    expected = feed["x"] @ weight.astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5, atol=1e-5)
    assert [(n.op_type, n.outputs[0].dtype) for n in model.graph] == [("Cast", FLOAT), ("MatMul", FLOAT)]
    assert [v.dtype for v in model.graph.initializers.values()] == [HALF]


def test_onnxruntime_casts_weights_when_it_loads_them(b, run_passes, tmp_path):

    model = b.output(b.op("MatMul", b.input("x", [4, 64]), b.floats(64, 8))).model()
    run_passes(model, WEIGHTS)
    assert OrtCpu().compile(model, tmp_path / "a").audit.executed_ops == {"MatMul": 1}


def test_weights_only_contract(example, capabilities):
    check_pass(WEIGHTS, example[0], capabilities=capabilities)


def test_a_table_that_is_looked_up_and_multiplied_with(run_passes, outputs):
    model = kinds.decoder()
    feed = {"ids": np.arange(kinds.TOKENS, dtype=np.int64)[None]}
    expected = outputs(model, feed)[0]
    assert run_passes(model, WEIGHTS).applied >= 7
    assert sqnr(expected, outputs(model, feed)[0]) > 50


def test_a_weight_that_one_reader_needs_whole(b, run_passes):
    shared = b.floats(16, 16)
    y = b.op("MatMul", b.op("MatMul", b.input("x", [4, 16]), shared, name="taken"), shared, name="left")
    model = b.output(y).model()
    (edit,) = run_passes(model, replace(WEIGHTS, where=Select(name=("taken",)))).edits
    assert (edit.action, edit.node) == ("refused", "taken")
    assert "another node" in edit.detail


def test_small_weights_and_scales_stay(run_passes):
    b = Builder()
    model = b.output(b.matmul(b.qdq(b.input("x", [4, 16])))).model()
    assert run_passes(model, WEIGHTS).edits == ()
    b = Builder()
    model = b.output(b.op("MatMul", b.input("x", [4, 16]), b.floats(16, 16))).model()
    assert run_passes(model, replace(WEIGHTS, min_weights=257)).edits == ()


def test_half_the_bytes_of_a_model_on_disk(tmp_path, capabilities):
    """Weights that lie in another file are read one after the other."""

    b = Builder()
    model = b.output(b.op("MatMul", b.input("x", [4, 256]), b.floats(256, 256))).model()
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    model = load(tmp_path / "m.onnx")
    Pipeline(passes=[WEIGHTS], capabilities=capabilities).run(model)
    save(model, tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size < 0.51 * (tmp_path / "m.data").stat().st_size
