"""`unrounded`: what it cuts, what it keeps, and where it cannot tell."""

import numpy as np
import onnx_ir as ir
import pytest
from builder import Builder
from foreign import TOOLS
from onnx import TensorProto, helper

from onnxcomp.metrics import sqnr
from onnxcomp.targets.ort import reference_runner
from onnxcomp.unrounded import unrounded

X = np.linspace(-9, 9, 2 * 4 * 6 * 6, dtype=np.float32).reshape(2, 4, 6, 6)


def outputs(model: ir.Model, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    names = [v.name for v in model.graph.outputs]
    run = reference_runner(model, names, optimize=False)
    found = run(feed)
    return [found[name] for name in names]


def text(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def op_types(model: ir.Model) -> list[str]:
    return [n.op_type for n in model.graph.all_nodes()]


@pytest.fixture
def b():
    return Builder()


@pytest.fixture
def x(b):
    return b.input("x", [2, 4, 6, 6])


@pytest.mark.parametrize(
    ("zero", "low", "high"),
    [
        (np.uint8(100), -100, 155),
        (np.int8(-28), -100, 155),
        (np.uint16(32768), -32768, 32767),
        (np.int16(0), -32768, 32767),
    ],
)
def test_a_pair_becomes_a_clip(b, x, zero, low, high):
    step = np.float32(8 / (high - low))
    parameters = b.const(step), b.const(zero)
    q = b.op("QuantizeLinear", b.op("Mul", x, b.const(np.float32(1))), *parameters)
    model = b.output(b.op("Neg", b.op("DequantizeLinear", q, *parameters))).model(opset=21)
    before = text(model)
    found = unrounded(model)
    assert text(model) == before
    assert op_types(found) == ["Mul", "Clip", "Identity", "Neg"]
    np.testing.assert_allclose(outputs(found, {"x": X})[0], -np.clip(X, step * low, step * high), rtol=1e-6)
    assert unrounded(found) is None, "nothing is left to cut"


def test_one_scale_a_channel(b, x):
    steps, zeros = np.float32([0.01, 0.02, 0.03, 0.04]), np.uint8([0, 50, 100, 255])
    parameters = b.const(steps), b.const(zeros)
    for axis, name in ((1, "one"), (-3, "other")):
        x = b.op("QuantizeLinear", x, *parameters, axis=axis)
        x = b.op("DequantizeLinear", x, *parameters, axis=1, name=name)
    found = unrounded(b.output(x).model())
    assert op_types(found) == ["Max", "Min", "Identity"] * 2
    low, high = ((steps * (i - zeros.astype(np.float32)))[:, None, None] for i in (0, 255))
    np.testing.assert_allclose(outputs(found, {"x": X})[0], np.clip(X, low, high), rtol=1e-6)


def test_through_ops_that_move_integers(b, x):
    parameters = b.const(np.float32(0.05)), b.const(np.uint8(100))
    q = b.op("QuantizeLinear", x, *parameters)
    q = b.op("MaxPool", q, kernel_shape=[2, 2], strides=[2, 2])
    q = b.op("Clip", q, b.const(np.uint8(90)), b.const(np.uint8(180)))
    q = b.op("Transpose", b.op("Concat", q, q, axis=1), perm=[0, 2, 3, 1])
    q = b.op("Reshape", q, b.const(np.int64([2, -1])))
    model = b.output(b.op("DequantizeLinear", q, *parameters)).model()
    found = unrounded(model)
    rounded, exact = outputs(model, {"x": X})[0], outputs(found, {"x": X})[0]
    assert 0 < np.abs(rounded - exact).max() <= 0.025 + 1e-6
    pooled = X.reshape(2, 4, 3, 2, 3, 2).max((3, 5))
    wanted = np.clip(np.concatenate([pooled] * 2, 1), -0.5, 4).transpose(0, 2, 3, 1).reshape(2, -1)
    np.testing.assert_allclose(exact, wanted, rtol=1e-6)


def test_weights_keep_their_integers(b, x):
    y = b.qdq(x)
    weight = b.op("QuantizeLinear", b.floats(4, 4, 3, 3), b.const(np.float32(0.1)), b.const(np.int8(0)), name="weight")
    weight = b.op("DequantizeLinear", weight, b.const(np.float32(0.1)), b.const(np.int8(0)), name="weight_float")
    found = unrounded(b.output(b.op("Conv", y, weight)).model())
    assert sorted(op_types(found)) == ["Clip", "Conv", "DequantizeLinear", "Identity", "QuantizeLinear"]


def test_float16(b):
    """The largest integers of this grid stand for more than float16 holds."""
    parameters = b.const(np.float16(3000)), b.const(np.int8(0))
    q = b.op("QuantizeLinear", b.input("x", [3], TensorProto.FLOAT16), *parameters)
    model = b.output(b.op("DequantizeLinear", q, *parameters), TensorProto.FLOAT16).model(opset=19)
    (found,) = outputs(unrounded(model), {"x": np.float16([-60000, 1.5, 60000])})
    np.testing.assert_array_equal(found, np.float16([-60000, 1.5, 60000]))


def test_in_a_subgraph():
    """Scale 0.5 as the bits of float32."""
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[3] x, bool c) => (float[3] y)
        <float s = {0.5}, uint8 z = {0}> {
            q = QuantizeLinear(x, s, z)
            y = If (c) <
                then_branch = t () => (float[3] p) { p = DequantizeLinear(q, s, z) },
                else_branch = e () => (float[3] r) { m = Neg(x)  k = QuantizeLinear(m, s, z)
                    r = DequantizeLinear(k, s, z) }>
        }""")
    found = unrounded(model)
    given = np.float32([-1.3, 2.2, 500])
    for flag, wanted in ((True, [0, 2.2, 127.5]), (False, [1.3, 0, 0])):
        np.testing.assert_array_equal(outputs(found, {"x": given, "c": np.array(flag)})[0], np.float32(wanted))


def linear_ops(b, x, zero):
    """QLinearConv with a bias, and QLinearMatMul; the same in float."""
    step, weights, channels = np.float32(0.05), b.rng.integers(-127, 128, (8, 4, 3, 3)).astype(np.int8), np.arange(1, 9)
    steps, bias = np.float32(0.0005) * channels.astype(np.float32), b.rng.integers(-900, 900, 8).astype(np.int32)
    columns, column_steps = b.rng.integers(0, 256, (6, 3)).astype(np.uint8), np.float32([0.003, 0.004, 0.005])
    given, between = (b.const(step), b.const(np.uint8(128))), (b.const(np.float32(0.02)), b.const(np.uint8(128)))
    weight = b.const(weights), b.const(steps), b.const(np.zeros(8, np.int8))
    q = b.op("QuantizeLinear", x, *given)
    q = b.op("QLinearConv", q, *given, *weight, *between, b.const(bias), pads=[1, 1, 1, 1], dilations=[1, 1])
    second = b.const(columns), b.const(column_steps), b.const(np.full(3, zero, np.uint8))
    q = b.op("QLinearMatMul", q, *between, *second, *between)
    b.output(b.op("DequantizeLinear", q, *between))

    f = Builder()
    floats = weights * steps[:, None, None, None], (bias * step * steps).astype(np.float32)
    limits = [[f.const(np.float32(s * (i - 128))) for i in (0, 255)] for s in (0.05, 0.02)]
    y = f.op("Clip", f.input("x", [2, 4, 6, 6]), *limits[0])
    y = f.op("Clip", f.op("Conv", y, *map(f.const, floats), pads=[1, 1, 1, 1]), *limits[1])
    y = f.op("MatMul", y, f.const(((columns.astype(np.int32) - zero) * column_steps).astype(np.float32)))
    return b.model(), f.output(f.op("Clip", y, *limits[1])).model()


def test_ops_on_integers(b, x):
    model, wanted = linear_ops(b, x, zero=100)
    found = unrounded(model)
    assert op_types(found) == ["Clip", "Conv", "Clip", "MatMul", "Clip", "Identity"]
    values = [outputs(m, {"x": X / 9})[0] for m in (found, wanted, model)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5, atol=1e-6)
    assert 20 < sqnr(values[0], values[2]) < 60


@pytest.mark.parametrize("tool", [t for t in TOOLS if t != "qoperator"])
def test_models_of_other_tools(tool):
    """Without its roundings a model is close to what it was, and different."""
    model, feed = TOOLS[tool]()
    found = unrounded(model)
    assert 25 < sqnr(outputs(found, feed)[0], outputs(model, feed)[0]) < 60
    computed = [n for n in found.graph if n.op_type == "QuantizeLinear" and not n.inputs[0].is_initializer()]
    assert computed == []


def integers_read(b, x):
    q = b.op("QuantizeLinear", x, b.const(np.float32(0.1)), b.const(np.uint8(0)))
    return b.op("Cast", q, to=TensorProto.FLOAT)


def other_parameters(b, x):
    q = b.op("QuantizeLinear", x, b.const(np.float32(0.1)), b.const(np.uint8(0)))
    return b.op("DequantizeLinear", q, b.const(np.float32(0.2)), b.const(np.uint8(0)))


def dynamic(b, x):
    b.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], ["q", "scale", "zero"]))
    return b.op("DequantizeLinear", "q", "scale", "zero")


def computed_scale(b, x):
    scale = b.op("Abs", b.input("s", []))
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale), scale)


def two_grids(b, x):
    parts = [b.op("QuantizeLinear", x, b.const(np.float32(s)), b.const(np.uint8(0))) for s in (0.1, 0.2)]
    q = b.op("Concat", *parts, axis=0)
    return b.op("DequantizeLinear", q, b.const(np.float32(0.1)), b.const(np.uint8(0)))


def not_quantized(b, x):
    return b.op("Conv", x, b.weight((8, 4, 3, 3), 0))


UNKNOWN = (integers_read, other_parameters, dynamic, computed_scale, two_grids, not_quantized)


@pytest.mark.parametrize("make", UNKNOWN, ids=lambda f: f.__name__)
def test_where_it_cannot_be_told(b, x, make):
    assert unrounded(b.output(make(b, x)).model()) is None


def test_integers_that_are_an_output(b, x):
    q = b.op("QuantizeLinear", x, b.const(np.float32(0.1)), b.const(np.uint8(0)))
    assert unrounded(b.output(q, TensorProto.UINT8).model()) is None


def test_other_ops_on_integers():
    model = TOOLS["qoperator"]()[0]
    assert "QLinearAdd" in op_types(model)
    assert unrounded(model) is None
