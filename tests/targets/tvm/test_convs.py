"""Convolution and pooling by TVM: kernels, and the nodes that become them."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

tvm = pytest.importorskip("tvm")

from tvm_harness import AVX512, X86, Compiled, lowered, machines, run_kernel  # noqa: E402

from onnxcomp.model import name_nodes  # noqa: E402
from onnxcomp.targets.ort import reference_runner  # noqa: E402
from onnxcomp.targets.tvm.kernels import conv, depthwise, pool  # noqa: E402
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue  # noqa: E402
from onnxcomp.targets.tvm.kernels._window import Window, blocks  # noqa: E402
from onnxcomp.targets.tvm.lower.convs import Convolutions  # noqa: E402
from onnxcomp.targets.tvm.lower.pools import Pools  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402
from onnxcomp.targets.tvm.nodes import DOMAIN  # noqa: E402

A76 = Machine(
    name="a76",
    triple="aarch64-linux-gnu",
    cpu="cortex-a76",
    features=("+dotprod",),
    lanes=4,
    registers=32,
    dot="sdot",
)


def _graph(nodes, x, weights=(), dtype=onnx.TensorProto.FLOAT, opset=18):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", dtype, x)],
        [helper.make_tensor_value_info("y", dtype, None)],
        [numpy_helper.from_array(array, name) for name, array in weights],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8))
    name_nodes(model)
    return model


def _reference(model, feed):
    return reference_runner(model, ["y"])(feed)["y"]


def _conv_model(x, weight, **attributes):
    rng = np.random.default_rng(1)
    w = (rng.standard_normal(weight) / np.sqrt(np.prod(weight[1:]))).astype(np.float32)
    b = rng.standard_normal(weight[0]).astype(np.float32)
    return _graph([helper.make_node("Conv", ["x", "w", "b"], ["y"], **attributes)], x, [("w", w), ("b", b)]), w, b


CASES = [
    # batch, height, width, channels, outputs, group, kernel, strides, pads, dilations, residual
    (1, 5, 7, 3, 5, 1, (3, 3), (2, 2), (0, 1, 1, 0), (1, 1), False),
    (2, 9, 11, 7, 40, 1, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), True),
    (2, 9, 11, 6, 23, 1, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), True),
    (None, 9, 11, 12, 20, 4, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), False),
    (1, 6, 5, 4, 8, 4, (3, 3), (1, 1), (1, 1, 1, 1), (2, 1), True),
]


@pytest.mark.parametrize("case", CASES)
def test_kernel_convolves(case):
    _check_kernel(case, machines() if case[0] else machines()[-1:])


def test_kernel_multiplies_by_lanes_where_that_is_cheaper():
    lanewise = Machine(name="lanewise", triple=X86, cpu="x86-64", lanes=4, registers=32, dot="none")
    _check_kernel((1, 9, 11, 8, 23, 1, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True), [lanewise])
    _check_kernel((2, 9, 11, 16, 16, 2, (3, 3), (1, 2), (1, 1, 1, 1), (2, 2), False), [lanewise])


def test_kernel_pads_a_large_image_in_parts():
    case = (1, 151, 163, 12, 16, 2, (5, 3), (1, 1), (1, 1, 2, 1), (2, 1), True)
    _check_kernel(case, machines()[-1:])


def _check_kernel(case, machines):
    batch, height, width, channels, n, group, kernel, strides, pads, dilations, residual = case
    window = Window(
        height=height,
        width=width,
        channels=channels,
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    images = batch or 2
    model, weight, bias = _conv_model(
        [images, channels, height, width],
        (n, channels // group, *kernel),
        group=group,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, channels, height, width)).astype(np.float32)
    expected = _reference(model, {"x": x}).transpose(0, 2, 3, 1).reshape(images, -1)
    added = rng.standard_normal(expected.shape).astype(np.float32)
    expected = np.clip(expected + added * residual, -0.5, 1)
    epilogue = Epilogue(residual=residual, activation="clip", alpha=-0.5, beta=1)
    for machine in machines:
        sizes = tuple(conv.choose(machine, conv.row_of(window), n // group))
        function = conv.conv(machine, batch=batch, window=window, n=n, group=group, sizes=sizes, epilogue=epilogue)
        packed = conv.pack(machine, sizes, weight, group), conv.pack_bias(machine, sizes, bias, n, group)
        inputs = [x.transpose(0, 2, 3, 1).reshape(images, -1), *packed, *([added] if residual else [])]
        got = run_kernel(function, machine, *inputs, shape=expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
    "case",
    [
        (2, 9, 15, 21, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), True),
        (None, 9, 31, 20, (5, 5), (2, 2), (1, 1, 2, 2), (1, 1), False),
        (1, 3, 2, 16, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), False),
        (1, 8, 10, 4, (3, 3), (1, 2), (1, 0, 2, 2), (2, 2), True),
    ],
)
def test_kernel_convolves_each_channel(case):
    batch, height, width, channels, kernel, strides, pads, dilations, residual = case
    window = Window(
        height=height,
        width=width,
        channels=channels,
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    images = batch or 2
    model, weight, bias = _conv_model(
        [images, channels, height, width],
        (channels, 1, *kernel),
        group=channels,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, channels, height, width)).astype(np.float32)
    expected = _reference(model, {"x": x}).transpose(0, 2, 3, 1).reshape(images, -1)
    added = rng.standard_normal(expected.shape).astype(np.float32)
    expected = np.maximum(expected + added * residual, 0)
    for machine in machines() if batch else machines()[-1:]:
        epilogue = Epilogue(residual=residual, activation="relu")
        function = depthwise.depthwise(machine, batch=batch, window=window, epilogue=epilogue)
        inputs = [x.transpose(0, 2, 3, 1).reshape(images, -1), depthwise.pack(weight), bias]
        got = run_kernel(function, machine, *inputs, *([added] if residual else []), shape=expected.shape)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)


def test_kernels_compile_for_aarch64():
    window = Window(height=8, width=10, channels=6, kernel=(3, 3), pads=(1, 1, 1, 1))
    epilogue = Epilogue(residual=True, activation="relu")
    sizes = tuple(conv.choose(A76, 10, 7))
    for function in (
        conv.conv(A76, batch=1, window=window, n=7, group=1, sizes=sizes, epilogue=epilogue),
        depthwise.depthwise(A76, batch=None, window=window, epilogue=epilogue),
        pool.pool(A76, batch=1, window=window, largest=False),
    ):
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        assert ".4s" in tvm.compile(module, target=A76.target()).mod.inspect_source("s")


def test_rows_are_cut_into_blocks_of_almost_equal_size():
    for length in range(1, 60):
        size, many, less = blocks(length, 14)
        assert size <= 14
        assert many * size + less * (size - 1) == length


def test_panels_cover_the_output_channels_in_order():
    for n in (1, 3, 8, 16, 17, 24, 40, 80, 112, 255, 1000):
        for machine in (*machines(), A76):
            sizes = conv.choose(machine, 14, n)
            column = 0
            for run in conv.panels(machine, sizes, n):
                assert run.column == column
                column += run.width * run.count
            assert n <= column < n + machine.lanes
            assert column == conv.columns(machine, sizes, n)


@pytest.mark.parametrize(
    ("op", "x", "attributes"),
    [
        ("MaxPool", [2, 23, 9, 8], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ("MaxPool", [1, 5, 9, 8], {"kernel_shape": [3, 2], "strides": [2, 3], "ceil_mode": 1, "dilations": [2, 1]}),
        ("MaxPool", [1, 5, 11], {"kernel_shape": [3], "auto_pad": "SAME_LOWER", "strides": [2]}),
        ("AveragePool", [2, 70, 9, 8], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}),
        (
            "AveragePool",
            [1, 5, 9, 8],
            {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "count_include_pad": 1},
        ),
        ("AveragePool", [1, 5, 8, 8], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
        ("GlobalAveragePool", ["n", 20, 5, 6], {}),
        ("GlobalMaxPool", [2, 3, 5], {}),
        ("ReduceMean", [2, 20, 5, 6], {"axes": [2, 3]}),
        ("ReduceMean", ["n", 20, 5, 6], {"axes": [-1, -2], "keepdims": 0}),
    ],
)
def test_pools_like_onnxruntime(op, x, attributes):
    model = _graph([helper.make_node(op, ["x"], ["y"], **attributes)], x, opset=17)
    feed = {"x": np.random.default_rng(0).standard_normal([2 if d == "n" else d for d in x]).astype(np.float32)}
    expected = _reference(model, feed)
    assert [n.op_type for n in lowered(model, [Pools()]).graph].count("Pool") == 1
    for machine in machines()[-1:]:
        (got,) = Compiled(model, [Pools()], machine).run(feed)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_pools_integers():
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    model = _graph([node], [1, 70, 4, 6], dtype=onnx.TensorProto.INT8)
    x = np.random.default_rng(0).integers(-128, 128, (1, 70, 4, 6)).astype(np.int8)
    expected = _reference(model, {"x": x})
    for machine in machines():
        np.testing.assert_array_equal(Compiled(model, [Pools()], machine).run({"x": x})[0], expected)


@pytest.mark.parametrize(
    ("x", "weight", "attributes"),
    [
        ([2, 6, 9, 8], (5, 6, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
        (["n", 6, 9, 8], (6, 1, 3, 3), {"auto_pad": "SAME_LOWER", "group": 6}),
        ([2, 6, 9, 8], (12, 1, 3, 3), {"auto_pad": "VALID", "group": 6}),
        ([2, 6, 17], (8, 6, 5), {"pads": [2, 2], "strides": [2], "dilations": [1]}),
        (["n", 6, 17], (4, 3, 3), {"pads": [4, 0], "dilations": [2], "group": 2}),
        (["n", 6, 4, 4], (24, 6, 1, 1), {}),
    ],
)
def test_convolves_like_onnxruntime(x, weight, attributes):
    model, *_ = _conv_model(x, weight, **attributes)
    feed = {"x": np.random.default_rng(0).standard_normal([2 if d == "n" else d for d in x]).astype(np.float32)}
    expected = _reference(model, feed)
    for machine in machines()[-1:]:
        (got,) = Compiled(model, [Convolutions(machine=machine)], machine).run(feed)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)


def test_takes_a_quantized_weight_that_no_integer_kernel_took():
    rng = np.random.default_rng(0)
    weights = [
        ("q", rng.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)),
        ("s", rng.uniform(0.001, 0.01, 6).astype(np.float32)),
        ("z", np.zeros(6, np.int8)),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    model = _graph(nodes, [1, 4, 7, 8], weights)
    passes = [Convolutions(machine=machines()[-1])]
    assert not any(n.op_type == "DequantizeLinear" for n in lowered(model, passes).graph)
    feed = {"x": rng.standard_normal((1, 4, 7, 8)).astype(np.float32)}
    (got,) = Compiled(model, passes, machines()[-1]).run(feed)
    np.testing.assert_allclose(got, _reference(model, feed), rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (_conv_model([1, 4, 8, 8, 8], (4, 4, 3, 3, 3))[0], "not of a sequence or image of fixed size"),
        (_conv_model([1, 4, "h", 8], (4, 4, 3, 3))[0], "not of a sequence or image of fixed size"),
        (_graph([helper.make_node("Conv", ["x", "x"], ["y"])], [4, 4, 3, 3]), "its weight is not constant"),
    ],
)
def test_refuses_what_has_no_kernel(model, reason):
    working = model.clone()
    (edit,) = Convolutions(machine=AVX512).apply(working, None)
    assert (edit.action, edit.detail) == ("refused", reason)
    assert not any(node.domain == DOMAIN for node in working.graph)
