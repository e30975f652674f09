"""Patterns in every form of weight, what is left alone and why, weights of several readers, and integer weights."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from onnxcomp.edit import constant
from onnxcomp.errors import CalibrationError, RecipeError
from onnxcomp.model import load
from onnxcomp.passes.gptq import Gptq
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.recipe import parse_recipe
from onnxcomp.select import Select
from onnxcomp.targets.ort import reference_runner
from onnxcomp.testing import check_pass

PLAIN = {"method": "magnitude", "include_ends": True}


def expected_mask(rows: np.ndarray, kept: int, size: int) -> np.ndarray:
    """Largest magnitudes of each group of the last axis, group by group."""
    mask = np.zeros(rows.shape, bool)
    for index in np.ndindex(rows.shape[:-1]):
        for start in range(0, rows.shape[-1], size):
            order = np.argsort(-np.abs(rows[index][start : start + size]), kind="stable")[:kept]
            mask[index][start + order] = True
    return mask


# Form of the op, shape of the weight as stored.
FORMS = {
    "matmul": (24, 10),
    "matmul, odd": (37, 5),
    "matmul, fewer than a group": (2, 5),
    "transposed": (10, 24),
    "gemm": (24, 10),
    "gemm transB": (10, 24),
    "gemm transB, odd": (3, 19),
    "conv 1x1": (6, 16, 1, 1),
    "conv 3x3": (6, 16, 3, 3),
    "conv uneven": (5, 8, 3, 2),
    "conv grouped": (6, 8, 3, 3),
    "conv 1d": (6, 16, 5),
}


def layer(b, form: str, shape: tuple[int, ...], dtype=np.float32) -> tuple[ir.Model, dict[str, np.ndarray]]:
    kind = form.split()[0].strip(",")
    weight = b.const(b.rng.normal(size=shape).astype(dtype), "w")
    onnx_type = TensorProto.FLOAT if dtype == np.float32 else TensorProto.FLOAT16
    if kind == "conv":
        group = 2 if "grouped" in form else 1
        sizes = [3, shape[1] * group, *[9] * (len(shape) - 2)]
        y = b.op("Conv", b.input("x", sizes, onnx_type), weight, name="layer", group=group)
    else:
        turned = "trans" in form
        sizes = [7, shape[1] if turned else shape[0]]
        x = b.input("x", sizes, onnx_type)
        if kind == "gemm":
            y = b.op("Gemm", x, weight, name="layer", **({"transB": 1} if turned else {}))
        else:
            y = b.op("MatMul", x, b.op("Transpose", weight, perm=[1, 0]) if turned else weight, name="layer")
    feed = np.random.default_rng(0).normal(size=sizes).astype(dtype)
    return b.output(y, onnx_type).model(), {"x": feed}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "1:8", "1:2"])
@pytest.mark.parametrize("form", FORMS)
def test_pattern_is_exact(form, pattern, dtype, b, run_passes):
    model, _ = layer(b, form, FORMS[form], dtype)
    before = constant(model.graph.initializers["w"]).copy()
    report = run_passes(model, NmMask(pattern=pattern, **PLAIN))
    after = constant(model.graph.initializers["w"])
    axis = 1 if "trans" in form or "conv" in form else 0
    kept, size = map(int, pattern.split(":"))
    mask = np.moveaxis(expected_mask(np.moveaxis(before, axis, -1), kept, size), -1, axis)
    if form == "matmul, fewer than a group" and kept == 2:
        assert [e.detail for e in report.edits] == ["its weight is 2:4 sparse already"]
    elif form == "matmul, fewer than a group" and kept == 4:
        assert [e.detail for e in report.edits] == ["its weight is 4:8 sparse already"]
    else:
        assert [(e.action, e.node) for e in report.edits] == [("applied", "layer")]
        share = np.abs(before.astype(np.float64))
        assert f"keeps {share[mask].sum() / share.sum():.1%} of the sum of magnitudes" in report.edits[0].detail
    assert after.dtype == dtype
    np.testing.assert_array_equal(after, np.where(mask, before, 0))


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("form", FORMS)
def test_data_dependent_masks_have_the_pattern(form, method, b, run_passes, capabilities):
    model, feed = layer(b, form, FORMS[form])
    data = [{"x": feed["x"] * (i + 1)} for i in range(3)]
    step = NmMask(method=method, reconstruct=method != "wanda", include_ends=True)
    check_pass(step, model, capabilities=capabilities, runner=reference_runner, data=data)
    run_passes(model, step, data=data)
    rows = np.moveaxis(constant(model.graph.initializers["w"]), 1 if "trans" in form or "conv" in form else 0, -1)
    padded = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 4)])
    nonzero = (padded.reshape(*rows.shape[:-1], -1, 4) != 0).sum(axis=-1)
    assert nonzero.max() == 2
    assert nonzero[..., : rows.shape[-1] // 4].min(initial=2) == 2


@pytest.mark.parametrize("form", ["matmul, odd", "gemm transB", "conv 3x3"])
def test_half_precision_with_data(form, b, run_passes, outputs):
    model, feed = layer(b, form, FORMS[form], np.float16)
    data = [{"x": np.random.default_rng(i).normal(size=feed["x"].shape).astype(np.float16)} for i in range(6)]
    dense, errors = outputs(model, feed)[0].astype(np.float32), {}
    for method in ("magnitude", "sparsegpt"):
        sparse = model.clone()
        run_passes(sparse, NmMask(method=method, reconstruct=method == "sparsegpt", include_ends=True), data=data)
        weight = constant(sparse.graph.initializers["w"])
        assert weight.dtype == np.float16
        assert np.isfinite(weight).all()
        errors[method] = np.linalg.norm(outputs(sparse, feed)[0].astype(np.float32) - dense) / np.linalg.norm(dense)
    assert errors["sparsegpt"] < 1.05 * errors["magnitude"] < 0.7


def test_ends_are_left_alone_unless_included(cnn_example, attention_example, b, run_passes):
    b.output(b.op("Conv", b.op("Conv", b.input("x", [1, 4, 8, 8]), b.floats(8, 4, 3, 3), name="stem"),
                  b.floats(8, 8, 3, 3), name="inner"))  # fmt: skip
    y = b.op("Gemm", b.op("Flatten", "inner_out"), b.floats(128, 8), name="hidden")
    model = b.output(b.op("Gemm", y, b.floats(8, 3), name="head")).model()
    report = run_passes(model.clone(), NmMask(method="magnitude"))
    found = {e.node: (e.action, e.detail) for e in report.edits}
    assert found["stem"] == ("refused", "it is the first convolution; include_ends = true makes it sparse, too")
    assert found["head"][0] == "refused"
    assert found["head"][1].startswith("it is the last layer, whose output no other layer reads")
    assert found["inner"][0] == found["hidden"][0] == "applied"
    report = run_passes(model, NmMask(**PLAIN))
    assert {e.node for e in report.edits if e.action == "applied"} == {"stem", "inner", "hidden", "head"}
    attention, _ = attention_example
    done = run_passes(attention, NmMask(method="magnitude")).edits
    assert {e.node for e in done if e.action == "applied"} == {"qkv", "proj", "fc1"}


def test_a_layer_inside_an_if_counts_as_one_behind(branching_example, run_passes):
    model, _ = branching_example
    other = ir.tensor(np.arange(16, dtype=np.float32).reshape(4, 4), name="v")
    model.graph.initializers["v"] = ir.Value(name="v", const_value=other)
    second = next(n for n in model.graph if n.name == "n1")
    second.replace_input_with(1, model.graph.initializers["v"])
    found = {e.node: e for e in run_passes(model, NmMask(method="magnitude")).edits}
    assert found["n1"].action == "applied"
    assert found["n0"].detail == "MatMul 'n3' reads its weight, too, and is not made sparse"
    assert found["n3"].detail == "it stands in a subgraph or function; only layers of the main graph are made sparse"


def refusals(b) -> ir.Model:
    x = b.input("x", [1, 8, 6, 6])
    b.op("Conv", x, b.floats(8, 1, 3, 3), name="depthwise", group=8)
    b.op("Conv", x, b.floats(4, 8, 6, 6), name="divides")
    b.op("Conv", b.input("odd", [1, 6, 6, 6]), b.floats(4, 6, 3, 3), name="ragged")
    y = b.input("y", [3, 16])
    b.op("MatMul", y, b.op("Softmax", b.input("z", [16, 4])), name="activation")
    b.op("MatMul", b.floats(8, 3), y, name="first operand")
    b.op("MatMul", y, b.floats(2, 16, 3), name="batch")
    b.op("Gemm", b.input("t", [16, 3]), b.floats(16, 2), name="transA", transA=1)
    b.op("MatMul", y, b.const(np.full((16, 2), np.nan, np.float32)), name="nan")
    b.op("MatMul", b.op("Cast", y, to=TensorProto.DOUBLE), b.const(np.ones((16, 2))), name="double")
    b.op("Gather", b.floats(10, 8), b.const(np.array([1, 2])), name="table")
    shared = b.floats(16, 16)
    b.op("MatMul", y, shared, name="along rows")
    b.op("Gemm", y, shared, name="along columns", transB=1)
    out = b.floats(16, 4)
    b.op("MatMul", y, out, name="put out")
    other = b.floats(16, 4)
    b.op("MatMul", y, other, name="read elsewhere")
    b.op("Neg", other, name="neg")
    names = [n.output[0] for n in b.nodes if n.name not in ("Softmax_0",)]
    for name in names:
        b.output(name, TensorProto.DOUBLE if name.startswith("double") else TensorProto.FLOAT)
    return b.output(out).model()


REASONS = {
    "depthwise": "a depthwise convolution sums over the kernel only",
    "ragged": "6 channels of a group do not divide into groups of 4",
    "activation": "not a constant weight but another activation",
    "first operand": "its weight is the first operand",
    "batch": "its weight has 3 dimensions",
    "transA": "Gemm with transA",
    "nan": "NaN or infinity",
    "double": "its weight is double",
    "table": "it looks up rows of an embedding",
    "along rows": "along different axes",
    "along columns": "along different axes",
    "put out": "an output of the model",
    "read elsewhere": "Neg 'neg' reads its weight, too",
}


def test_reasons(b, run_passes):
    edits = {e.node: e for e in run_passes(refusals(b), NmMask(**PLAIN)).edits}
    for name, reason in REASONS.items():
        assert edits[name].action == "refused"
        assert reason in edits[name].detail
    assert {n for n, e in edits.items() if e.action == "applied"} == {"divides"}


def test_packed_weights_are_refused(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", [1, 64]), b.floats(64, 64), name="layer")).model()
    run_passes(model, WeightOnly(min_weights=0, form="matmulnbits"))
    (edit,) = run_passes(model, NmMask(**PLAIN)).edits
    assert "packed in blocks already; nm_mask goes before weight_only" in edit.detail


def test_tied_head(b, run_passes):
    table = b.floats(50, 16)
    rows = b.op("Gather", table, b.input("ids", [1, "t"], TensorProto.INT64), name="embed")
    x = b.op("Tanh", b.op("MatMul", rows, b.floats(16, 16), name="inner"))
    y = b.op("MatMul", x, b.op("Transpose", table, perm=[1, 0]), name="head")
    model = b.output(b.op("MatMul", y, b.floats(50, 4), name="last")).model()
    found = {e.node: e for e in run_passes(model.clone(), NmMask(method="magnitude")).edits}
    assert "Gather 'embed' looks up rows of its weight" in found["head"].detail
    found = {e.node: e for e in run_passes(model, NmMask(**PLAIN)).edits}
    assert found["head"].action == "applied"
    table = constant(model.graph.initializers["c0"])
    assert ((table.reshape(50, 4, 4) != 0).sum(axis=-1) == 2).all()


@pytest.mark.parametrize("stored_first", [False, True])
def test_shared_weight_is_masked_once_by_the_inputs_of_all_readers(stored_first, b, run_passes):
    """Channel 0 is large for the first reader only, channel 3 for the second."""
    weight = b.const(np.ones((4, 4), np.float32), "w")
    form = {"transB": 1} if stored_first else {}
    y = b.op("Gemm", b.input("x", ["n", 4]), weight, name="one", **form)
    z = b.op("Gemm", b.input("z", ["n", 4]), weight, name="two", **form)
    model = b.output(b.op("Add", y, z)).model()
    data = [{"x": np.float32([[9, 2, 1, 1]]), "z": np.float32([[1, 2, 1, 9]])}] * 2
    report = run_passes(model, NmMask(method="wanda", include_ends=True), data=data)
    assert [e.node for e in report.edits] == ["one", "two"]
    assert all("shared by 2 nodes" in e.detail for e in report.edits)
    found = constant(model.graph.initializers["w"])
    np.testing.assert_array_equal((found if stored_first else found.T), np.tile(np.float32([1, 0, 0, 1]), (4, 1)))


def test_shared_weight_is_refused_unless_all_readers_are_selected(b, run_passes):
    weight = b.floats(8, 8)
    y = b.op("MatMul", b.op("MatMul", b.input("x", ["n", 8]), weight, name="one"), weight, name="two")
    (edit,) = run_passes(b.output(y).model(), NmMask(where=Select(name=("one",)), **PLAIN)).edits
    assert (edit.node, edit.detail) == ("one", "MatMul 'two' reads its weight, too, and is not selected")


def integers(b, kind: str) -> tuple[ir.Model, int]:
    """A MatMul (32, 12) by a dequantized weight, and where groups lie."""
    x, zero = b.input("x", ["n", 32]), 0
    if kind == "int8 by channel":
        y = b.op("MatMul", x, b.weight((32, 12), 1, "q"), name="layer")
    elif kind == "uint8":
        q = b.const(b.rng.integers(0, 256, (32, 12)).astype(np.uint8), "q")
        zero = 131
        y = b.op("DequantizeLinear", q, b.const(np.float32(0.02)), b.const(np.uint8(zero)))
        y = b.op("MatMul", x, y, name="layer")
    elif kind == "uint8 by channel":
        q = b.const(b.rng.integers(0, 256, (32, 12)).astype(np.uint8), "q")
        scale, zero = b.const(np.linspace(0.01, 0.1, 12, dtype=np.float32)), np.arange(12).astype(np.uint8) + 120
        y = b.op("DequantizeLinear", q, scale, b.const(zero), axis=1)
        y = b.op("MatMul", x, y, name="layer")
    else:
        stored = b.rng.integers(-8, 8, (32, 12)).astype(ml_dtypes.int4)
        b.weights.append(onnx.numpy_helper.from_array(stored, "q"))
        zeros = b.rng.integers(-2, 3, (2, 12)).astype(ml_dtypes.int4)
        b.weights.append(onnx.numpy_helper.from_array(zeros, "zeros"))
        scale = b.const(b.rng.uniform(0.01, 0.1, (2, 12)).astype(np.float32))
        y = b.op("DequantizeLinear", "q", scale, "zeros", axis=0, block_size=16)
        y = b.op("MatMul", x, y, name="layer")
        zero = np.repeat(zeros.astype(np.int32), 16, axis=0)
    return b.output(y).model(opset=21), zero


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "sparsegpt"])
@pytest.mark.parametrize("kind", ["int8 by channel", "uint8", "uint8 by channel", "int4 in blocks"])
def test_integer_weights(kind, method, b, run_passes, capabilities):
    model, zero = integers(b, kind)
    q = model.graph.initializers["q"]
    before, dtype = constant(q).astype(np.int32), q.const_value.dtype
    data = [{"x": np.random.default_rng(i).normal(size=(6, 32)).astype(np.float32)} for i in range(4)]
    step = NmMask(method=method, include_ends=True, reconstruct=method == "ria")
    check_pass(step, model, capabilities=capabilities, runner=reference_runner, data=data)
    (edit,) = run_passes(model, step, data=data).edits
    assert edit.action == "applied"
    q = model.graph.initializers["q"]
    after = constant(q).astype(np.int32)
    assert q.const_value.dtype == dtype
    nonzero = (after != zero).T.reshape(12, 8, 4).sum(axis=-1)
    assert nonzero.max() <= 2
    assert nonzero.mean() > 1.8
    assert before.min() <= after.min()
    assert after.max() <= before.max()
    if method in ("magnitude", "wanda"):
        np.testing.assert_array_equal(after, np.where(after != zero, before, zero))
    if method == "magnitude":
        steps = np.abs(before - zero).T
        np.testing.assert_array_equal(after != zero, (expected_mask(steps, 2, 4) & (steps != 0)).T)


def test_what_quantizes_afterwards_keeps_zeros(b, run_passes):
    y = b.op("MatMul", b.input("x", ["n", 64]), b.const(b.rng.normal(size=(64, 64)).astype(np.float32), "w"), name="a")
    model = b.output(b.op("MatMul", b.op("Relu", y), b.floats(64, 64), name="b")).model()
    data = [{"x": np.random.default_rng(i).normal(size=(1, 64)).astype(np.float32)} for i in range(8)]
    run_passes(model, NmMask(), data=data)
    zeros = constant(model.graph.initializers["w"]) == 0
    int8 = model.clone()
    edits = run_passes(int8, Quantize(), Gptq(), data=data).edits
    assert {e.node: e.detail for e in edits}["a"] == "nm_mask chose its integers already"
    (stored,) = [v for n, v in int8.graph.initializers.items() if n.startswith("w_q")]
    assert not constant(stored)[zeros].any()
    for config in ({"method": "rtn"}, {"method": "mse"}, {"method": "hqq"}, {"method": "mse", "symmetric": True}):
        blocks = model.clone()
        run_passes(blocks, WeightOnly(min_weights=0, form="qdq", **config))
        value = next(n for n in blocks.graph if n.name == "a").inputs[1].name
        dequantized = reference_runner(blocks, [value])(data[0])[value]
        assert not dequantized[zeros].any()


def test_second_run_changes_nothing_and_a_tighter_pattern_does(b, run_passes):
    model, feed = layer(b, "gemm", (32, 8))
    data = [feed, {"x": -2 * feed["x"]}]
    run_passes(model, NmMask(include_ends=True), data=data)
    once = constant(model.graph.initializers["w"]).copy()
    for pattern in ("2:4", "4:8", "3:4"):
        (edit,) = run_passes(model, NmMask(include_ends=True, pattern=pattern, reconstruct=True), data=data).edits
        assert (edit.action, edit.detail) == ("refused", f"its weight is {pattern} sparse already")
        np.testing.assert_array_equal(constant(model.graph.initializers["w"]), once)
    (edit,) = run_passes(model, NmMask(include_ends=True, pattern="1:4"), data=data).edits
    assert edit.action == "applied"
    assert np.mean(constant(model.graph.initializers["w"]) != 0) == 0.25


def test_recipe():
    text = 'version = 1\n[[passes]]\npass = "nm_mask"\npattern = "{}"\nmethod = "ria"\n'
    (step,) = parse_recipe(text.format("4:8")).passes
    assert step == NmMask(pattern="4:8", method="ria")
    with pytest.raises(RecipeError, match=r"passes\[0\]: pattern '8:4' is not N:M"):
        parse_recipe(text.format("8:4"))


NEED_DATA = [{"method": "wanda"}, {"method": "ria"}, {}, {"method": "magnitude", "reconstruct": True}]


@pytest.mark.parametrize("config", NEED_DATA)
def test_without_data(config, b, run_passes):
    model, _ = layer(b, "gemm", (32, 8))
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(CalibrationError, match="pass 'nm_mask': it needs calibration data; give some with --data"):
        run_passes(model, NmMask(include_ends=True, **config))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    run_passes(model, NmMask(**config))  # the only layer is an end, so there is nothing to do


def test_one_sample(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", [1, "t", 32]), b.floats(32, 8), name="layer")).model()
    feed = {"x": np.random.default_rng(0).normal(size=(1, 9, 32)).astype(np.float32)}
    with pytest.raises(CalibrationError, match="two samples"):
        run_passes(model, NmMask(include_ends=True), data=[feed])
    (edit,) = run_passes(model, NmMask(include_ends=True, method="wanda"), data=[feed]).edits
    assert edit.action == "applied"


def test_second_moments_that_take_too_much_memory(b, run_passes):
    model = b.output(b.op("MatMul", b.input("x", ["n", 512]), b.floats(512, 4), name="layer")).model()
    data = [{"x": np.random.default_rng(i).normal(size=(1, 512)).astype(np.float32)} for i in range(4)]
    (edit,) = run_passes(model, NmMask(include_ends=True, memory_mb=1), data=data).edits
    assert (edit.action, edit.detail) == ("refused", "second moments of its inputs take 4 MiB; raise memory_mb")
    (edit,) = run_passes(model, NmMask(include_ends=True, memory_mb=1, method="ria"), data=data).edits
    assert edit.action == "applied"


def test_weight_of_a_constant_node(b, run_passes):
    weight = onnx.numpy_helper.from_array(b.rng.normal(size=(8, 4)).astype(np.float32))
    model = b.output(b.op("MatMul", b.input("x", ["n", 8]), b.op("Constant", value=weight), name="layer")).model()
    run_passes(model, NmMask(**PLAIN))
    node = next(n for n in model.graph if n.name == "layer")
    assert np.mean(constant(node.inputs[1]) != 0) == 0.5


def test_weights_on_disk(b, run_passes, tmp_path):
    y = b.op(
        "MatMul", b.input("x", ["n", 256]), b.const(b.rng.normal(size=(256, 128)).astype(np.float32), "w"), name="a"
    )
    proto = ir.to_proto(b.output(y).model())
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    model = load(tmp_path / "m.onnx")
    before = constant(model.graph.initializers["w"]).copy()
    run_passes(model, NmMask(**PLAIN))
    assert isinstance(model.graph.initializers["w"].const_value, ir.LazyTensor)
    mask = expected_mask(before.T, 2, 4).T
    np.testing.assert_array_equal(constant(model.graph.initializers["w"]), before * mask)
