"""Forms that optimizers get wrong: cleanup keeps what the model computes, whatever a caller gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, parser

from onnxcomp.api import rewrite
from onnxcomp.passes.cleanup import Cleanup
from tests.corpus.harness import differences, run_all

Feed = dict[str, np.ndarray]


def data(*shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def head(opset: int = 17) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]> '


@pytest.fixture
def cleaned(tmp_path) -> Callable[..., onnx.ModelProto]:
    """Cleans a model up, checks every feed's outputs to 1e-5 of their scale, and returns the result."""

    def run(model: str | onnx.ModelProto, *feeds: Feed) -> onnx.ModelProto:
        path, result = tmp_path / "model.onnx", tmp_path / "result.onnx"
        onnx.save(parser.parse_model(model) if isinstance(model, str) else model, path)
        expected = run_all(path, feeds)
        rewrite(path, result, recipe="cleanup")
        for optimize in (False, True):
            for before, after in zip(expected, run_all(result, feeds, optimize=optimize), strict=True):
                assert not list(differences(before, after, 1e-5))
        return onnx.load(result)

    return run


def ops(model: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in model.graph.node]


OVERRIDES = {
    "reshape": (
        "(float[2, 6] x, int64[2] s) => (float[a, b] y) <int64[2] s = {3, 4}> { y = Reshape(x, s) }",
        {"x": data(2, 6)},
        {"s": np.array([4, 3])},
    ),
    "expand": (
        "(float[1, 6] x, int64[2] s) => (float[a, b] y) <int64[2] s = {1, 6}> { y = Expand(x, s) }",
        {"x": data(1, 6)},
        {"s": np.array([4, 6])},
    ),
    "add": (
        "(float[6] x, float z) => (float[6] y) <float z = {0}> { y = Add(x, z) }",
        {"x": data(6)},
        {"z": np.array(3, np.float32)},
    ),
    "if": (
        (
            "(float[2] x, bool c) => (float[2] y) <bool c = {1}> { y = If (c) <then_branch = t () => (float[2] p) "
            "{ p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }> }"
        ),
        {"x": data(2)},
        {"c": np.array(False)},
    ),
    "conv": (
        (
            "(float[1,1,4,4] x, float[1,1,1,1] w) => (float[1,1,4,4] y) <float[1,1,1,1] w = {2}, float[1] s = {3}, "
            "float[1] b = {1}, float[1] m = {0}, float[1] v = {1}> { u = Conv(x, w) "
            "y = BatchNormalization(u, s, b, m, v) }"
        ),
        {"x": data(1, 1, 4, 4)},
        {"w": data(1, 1, 1, 1)},
    ),
    "unused": (
        "(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Neg(x) }",
        {"x": data(2)},
        {"w": data(2)},
    ),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_default_of_an_input_is_no_constant(name, cleaned):
    text, feed, override = OVERRIDES[name]
    model = cleaned(head() + "g " + text, feed, feed | override)
    assert {t.name for t in model.graph.initializer} >= set(override), "it stays a default"


RANDOM = {
    "equal draws": ("(float[2] x) => (float[2] y) { a = Bernoulli(x) b = Bernoulli(x) y = Sub(a, b) }", 2),
    "constant draw": ("(float[2] x) => (float[2] y) <float[2] k = {0.5, 0.5}> { a = Bernoulli(k) y = Sub(a, x) }", 1),
    "training": (
        (
            "(float[2] x) => (float[2] y) <float r = {0.5}, bool t = {1}> "
            "{ a = Dropout(x, r, t) b = Dropout(x, r, t) y = Sub(a, b) }"
        ),
        2,
    ),
    "unknown op": ("(float[2] x) => (float[2] y) { a = my.Random(x) b = my.Random(x) y = Sub(a, b) }", 2),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_drawn_as_often_as_before(name, tmp_path):
    text, count = RANDOM[name]
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model('<ir_version: 8, opset_import: ["" : 17, "my" : 1]> g ' + text), path)
    result = rewrite(path, None, recipe="cleanup").model
    assert [n.op_type for n in result.graph].count("Sub") == 1
    assert len(result.graph) == count + 1


def test_equal_nodes_of_which_one_has_an_output_less(cleaned):
    model = parser.parse_model(
        head() + "g (float[1, 1, 4, 4] x) => (float[a, b, c, d] y, int64[a, b, c, d] i) "
        "{ u, n = MaxPool <kernel_shape = [2, 2]> (x) y = Neg(u) "
        "v, i = MaxPool <kernel_shape = [2, 2]> (x) }"
    )
    model.graph.node[0].output[1] = ""
    cleaned(model, {"x": data(1, 1, 4, 4)})


@pytest.mark.parametrize("where", ["output", "value_info"])
def test_batch_size_that_was_made_dynamic_by_hand(where, cleaned):
    model = parser.parse_model(
        head() + "g (float[batch, 6] x) => (float[1, 6] y, int64[2] s) { t = Abs(x) s = Shape(t) y = Identity(t) }"
    )
    if where == "value_info":
        model.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [1, 6]))
    cleaned(model, {"x": data(1, 6)}, {"x": data(4, 6)})


CONV_WEIGHT = "float[1, 1, 3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}"
FORMS = {
    "Clip with attributes": (10, "(float[4] x) => (float[4] y) { a = Clip <min = -1.0, max = 0.5> (x) y = Relu(a) }"),
    "slices of odd halves": (
        18,
        (
            "(float[2, 7] x) => (float[2, 3] y, float[2, 4] z) <int64[1] b = {0}, int64[1] m = {3}, "
            "int64[1] e = {7}, int64[1] a = {1}> { y = Slice(x, b, m, a) z = Slice(x, m, e, a) }"
        ),
    ),
    "computed shape, old opset": (
        12,
        (
            "(float[2, 8] x) => (float[4, 4] y) { s = Shape(x) a = Cast <to = 1> (s) "
            "b = Relu(a) c = Cast <to = 7> (b) d = Constant <value_ints = [2, 2]> () "
            "e = Mul(d, c) f = Constant <value_ints = [4, 4]> () g = Min(e, f) y = Reshape(x, g) }"
        ),
    ),
    "scatter that adds": (
        17,
        (
            "(float[2, 3] x) => (float[2, 3] y) <int64[2, 1] i = {0, 1}, float[2, 3] u = "
            '{1, 2, 3, 4, 5, 6}> { y = ScatterND <reduction = "add"> (x, i, u) }'
        ),
    ),
    "scatter of unknown size": (
        17,
        (
            "(float[n, 3] x) => (float[n, 3] y) <int64[2, 1] i = {0, 1}, float[2, 3] u = "
            "{1, 2, 3, 4, 5, 6}> { y = ScatterND(x, i, u) }"
        ),
    ),
    "zero bias, old Gemm": (
        9,
        (
            "(float[2, 3] x) => (float[2, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}, "
            "float[2] b = {0, 0}> { y = Gemm(x, w, b) }"
        ),
    ),
    "Pad with attributes": (
        9,
        "(float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) <" + CONV_WEIGHT + "> "
        "{ p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1]> (x) y = Conv(p, w) }",
    ),
    "downsampling Resize of a constant": (
        13,
        (
            "(float[1, 1, 1, 2] x) => (float[a, b, c, d] y) <float[1, 1, 2, 4] k = "
            "{1, 2, 3, 4, 5, 6, 7, 8}, float[4] s = {1, 1, 0.6, 0.6}> { r = Resize "
            '<mode = "linear", coordinate_transformation_mode = "align_corners"> '
            '(k, "", s) y = Add(x, r) }'
        ),
    ),
    "Cast of an infinite ConstantOfShape": (
        17,
        (
            "(float[3] x) => (float[3] y) { s = Shape(x) a = ConstantOfShape "
            "<value = float[1] {-inf}> (s) b = Cast <to = 11> (a) c = Cast <to = 1> (b) "
            "y = Max(x, c) }"
        ),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name, cleaned):
    opset, text = FORMS[name]
    model = parser.parse_model(head(opset) + "g " + text)
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    cleaned(model, {"x": data(*shape)})


def test_pad_before_an_integer_conv_with_a_zero_point(cleaned):
    text = (
        "g (uint8[1, 1, 4, 4] x) => (int32[a, b, c, d] y) <u"
        + CONV_WEIGHT.replace("float", "int8")
        + ", uint8 z = {3}, "
        + "int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> { q = Pad(x, p) y = ConvInteger(q, w, z) }"
    )
    cleaned(head(13) + text, {"x": np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)})


@pytest.mark.parametrize("kind", ["empty bias", "half precision"])
def test_batch_norm_behind_an_unusual_conv(kind, cleaned):
    dtype = "float16" if kind == "half precision" else "float"
    model = parser.parse_model(
        head() + f"g ({dtype}[1,1,4,4] x) => ({dtype}[a,b,c,d] y) <{dtype}[1,1,1,1] w = {{2}}, "
        "float[1] s = {3}, float[1] b = {1}, float[1] m = {0.5}, float[1] v = {2}> "
        "{ c = Conv(x, w) y = BatchNormalization(c, s, b, m, v) }"
    )
    if kind == "empty bias":
        model.graph.node[0].input.append("")
    result = cleaned(model, {"x": data(1, 1, 4, 4).astype("float16" if dtype == "float16" else "float32")})
    assert ops(result) == (["Conv"] if kind == "empty bias" else ["Conv", "BatchNormalization"])


def test_saturation_of_a_cast_is_not_forgotten(cleaned):
    text = "g (float[3] x) => (float8e4m3fn[3] y) <float8e4m3fn[1] t = {0}> { y = CastLike <saturate = 0> (x, t) }"
    model = parser.parse_model(head(19) + text)
    model.ir_version = 9
    result = cleaned(model, {"x": np.array([1, 1e5, -1e5], np.float32)})
    assert ops(result) == ["CastLike"]


def test_what_only_the_body_of_a_dead_node_reads_is_dead(cleaned):
    """One body reads what the other reads as well, and the node in front of both."""
    model = f"""{head()} g (float[2, 3] x, bool c) => (float[2, 3] y)
        <float[3, 3] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}> {{
            product = MatMul(x, w)
            dead = If (c) <
                then_branch = t () => (float[2, 3] p) {{ p = Relu(product) }},
                else_branch = e () => (float[2, 3] r) {{ inner = If (c) <
                    then_branch = tt () => (float[2, 3] pp) {{ pp = Abs(product) }},
                    else_branch = ee () => (float[2, 3] rr) {{ rr = Neg(product) }}>
                    r = Exp(inner) }}>
            behind = Sin(dead)
            y = Tanh(x)
        }}"""
    found = cleaned(model, *({"x": data(2, 3), "c": np.array(flag)} for flag in (True, False)))
    assert ops(found) == ["Tanh"]
    assert not found.graph.initializer


def test_sequences_stay_sequences(cleaned):
    cleaned(
        head(12) + "g (float[6] x, int64[3] k) => (int64 n) { s = SplitToSequence(x, k) n = SequenceLength(s) }",
        {"x": data(6), "k": np.array([1, 2, 3])},
    )


def test_large_weights_are_transposed_when_they_are_read(b, run_passes, outputs):
    y = b.op("MatMul", b.input("x", ["n", 16]), b.op("Transpose", b.floats(8, 16), perm=[1, 0]))
    model = b.output(y).model()
    feed = {"x": data(2, 16)}
    expected = outputs(model, feed)[0]
    run_passes(model, Cleanup(max_constant=64))
    weight = model.graph.node(0).inputs[1]
    assert [n.op_type for n in model.graph] == ["MatMul"]
    assert weight is not None
    assert isinstance(weight.const_value, ir.LazyTensor), "no transposed copy is held in memory"
    np.testing.assert_allclose(outputs(model, feed)[0], expected, rtol=1e-5)


def test_what_the_checker_refused_before_is_no_reason_to_stop(cleaned):
    # The checker calls this version of the op deprecated; onnxruntime runs it.
    text = (
        "g (float[1, 4, 2, 2] x) => (float[1, 4, 2, 2] y) <float[2] s = {1, 2}, float[2] b = {0.5, 1}> "
        "{ a = Identity(x) y = GroupNormalization <num_groups = 2> (a, s, b) }"
    )
    assert ops(cleaned(head(18) + text, {"x": data(1, 4, 2, 2)})) == ["GroupNormalization"]
