"""The reference runner shows values from inside a model and leaves the model alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcomp.errors import CalibrationError, DataError
from onnxcomp.targets.ort import reference_runner


def test_intermediate_values(small_model, feed):
    before = ir.to_proto(small_model).SerializeToString(deterministic=True)
    run = reference_runner(small_model, ["conv1_out", "classify_out", "x", "conv1_out"])
    values = run(feed)
    assert sorted(values) == ["classify_out", "conv1_out", "x"]
    assert values["conv1_out"].shape == (1, 8, 16, 16)
    np.testing.assert_array_equal(values["x"], feed["x"])
    assert ir.to_proto(small_model).SerializeToString(deterministic=True) == before


def test_optimised_and_plain_agree(small_model, feed):
    a, b = (reference_runner(small_model, ["classify_out"], optimize=o)(feed)["classify_out"] for o in (True, False))
    np.testing.assert_allclose(a, b, rtol=0.05, atol=0.05)


def test_untyped_values(b):
    y = b.op("Relu", b.input("x", [2, 3]))
    model = b.output(b.op("Exp", y)).model()
    assert model.graph[0].outputs[0].dtype is None
    found = reference_runner(model, ["Relu_0_out"])({"x": np.full((2, 3), -1, np.float32)})
    np.testing.assert_array_equal(found["Relu_0_out"], np.zeros((2, 3), np.float32))


def test_what_the_outputs_do_not_need_is_not_run(b):
    y = b.op("Relu", b.input("x", ["n"]))
    b.op("Reshape", y, b.const(np.array([2, 2], np.int64)), name="fails")
    run = reference_runner(b.output("fails_out").model(), ["Relu_0_out"])
    run({"x": np.zeros(3, np.float32)})


@pytest.mark.parametrize("optimize", [True, False])
def test_large_weights_are_shared(b, tmp_path, optimize, monkeypatch):
    monkeypatch.setattr("onnxcomp.targets.ort.probe.SHARE_ABOVE", 0)
    weight = np.random.default_rng(0).normal(size=(256, 200)).astype(np.float32)
    y = b.op("MatMul", b.input("x", ["n", 256]), b.const(weight, "w"), name="mm")
    model = b.output(y).model()
    x = np.ones((2, 256), np.float32)
    expected = reference_runner(model, ["mm_out"], optimize=optimize)({"x": x})["mm_out"]
    np.testing.assert_allclose(expected, x @ weight, rtol=1e-4, atol=1e-4)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    external = ir.load(tmp_path / "m.onnx")
    assert isinstance(external.graph.initializers["w"].const_value, ir.ExternalTensor)
    run = reference_runner(external, ["mm_out", "w"], optimize=optimize)
    external.graph.initializers["w"].const_value.release()
    found = run({"x": x})
    np.testing.assert_array_equal(found["mm_out"], expected)
    np.testing.assert_array_equal(found["w"], weight)


def test_large_quantized_weights_are_shared(b, monkeypatch):
    monkeypatch.setattr("onnxcomp.targets.ort.probe.SHARE_ABOVE", 0)
    y = b.op("MatMul", b.qdq(b.input("x", ["n", 256])), b.weight((256, 512), 1), name="mm")
    model = b.output(b.op("Tanh", y)).model()
    x = np.random.default_rng(0).normal(size=(2, 256)).astype(np.float32)
    a, b_ = (reference_runner(model, ["mm_out"], optimize=o)({"x": x})["mm_out"] for o in (True, False))
    np.testing.assert_allclose(a, b_, rtol=1e-4, atol=1e-4)


def test_shared_weights_that_an_optimizer_would_read(b, monkeypatch):
    monkeypatch.setattr("onnxcomp.targets.ort.probe.SHARE_ABOVE", 0)
    weight = b.const(np.ones((64, 64, 3, 3), np.float32), "w")
    y = b.op("Mul", b.op("Conv", b.input("x", [1, 64, 8, 8]), weight), b.const(np.full((64, 1, 1), 2, np.float32)))
    model = b.output(y).model()
    name = model.graph.outputs[0].name
    found = reference_runner(model, [name])({"x": np.ones((1, 64, 8, 8), np.float32)})[name]
    np.testing.assert_array_equal(found, np.full((1, 64, 6, 6), 2 * 64 * 9, np.float32))


def test_lazy_weight(b):
    y = b.op("MatMul", b.input("x", ["n", 256]), b.const(np.zeros((256, 256), np.float32), "w"), name="mm")
    model = b.output(y).model()
    model.graph.initializers["w"].const_value = ir.LazyTensor(
        lambda: ir.tensor(np.full((256, 256), 2, np.float32)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape([256, 256]),
        name="w",
    )
    found = reference_runner(model, ["mm_out"])({"x": np.ones((1, 256), np.float32)})["mm_out"]
    np.testing.assert_array_equal(found, np.full((1, 256), 512, np.float32))


def test_values_that_cannot_be_outputs():
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, bool c) => (float[2] y) {
            y = If (c) <then_branch = t () => (float[2] p) { inside = Abs(x) p = Neg(inside) },
                        else_branch = e () => (float[2] q) { q = Relu(x) }>
        }""")
    with pytest.raises(CalibrationError, match=r"\['inside'\] stand inside an If"):
        reference_runner(model, ["y", "inside"])
    with pytest.raises(CalibrationError, match=r"no values named \['nowhere'\]"):
        reference_runner(model, ["nowhere"])


def test_model_that_cannot_run(b):
    b.op("NoSuchOp", b.input("x", [1]), name="strange")
    with pytest.raises(CalibrationError, match="NoSuchOp"):
        reference_runner(b.output("strange_out").model(), ["strange_out"])


def test_state_is_carried(streaming_model):
    run = reference_runner(streaming_model, ["total_out", "after_out"])
    one = {"x": np.ones(3, np.float32)}
    assert [run(one)["after_out"][0] for _ in range(3)] == [1.0, 2.0, 3.0]


def test_feed_is_checked(small_model):
    with pytest.raises(DataError, match="lacks input 'x'"):
        reference_runner(small_model, ["conv1_out"])({})


def test_functions_are_run():
    model = ir.from_onnx_text("""<ir_version: 8, opset_import: ["" : 17, "onnxcomp" : 1]>
        g (float[2] x) => (float[2] y) { a = onnxcomp.Twice(x) y = Relu(a) }
        <domain: "onnxcomp", opset_import: ["" : 17]> Twice (u) => (o) { o = Add(u, u) }""")
    found = reference_runner(model, ["a"])({"x": np.ones(2, np.float32)})
    np.testing.assert_array_equal(found["a"], np.full(2, 2, np.float32))
