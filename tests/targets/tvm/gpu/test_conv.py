"""Convolution and pooling of float32 on a GPU, by the emulator."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels import conv as gpu_conv
from onnxcomp.targets.tvm.gpu.kernels import depthwise as gpu_depthwise
from onnxcomp.targets.tvm.gpu.kernels import pool as gpu_pool
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import conv, depthwise
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window


def _gpu(multiprocessors):
    return Gpu(
        name="small",
        triple="x86_64-linux-gnu",
        cpu="x86-64",
        lanes=32,
        registers=64,
        dot="dp4a",
        arch="sm_87",
        multiprocessors=multiprocessors,
    )


SMALL, LARGE = _gpu(1), _gpu(64)


def _window(height, width, channels, kernel, strides=(1, 1), pads=(0, 0, 0, 0), dilations=(1, 1)):
    return Window(
        height=height,
        width=width,
        channels=channels,
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )


CONVS = [
    # machine, batch as compiled, images, window, outputs, groups, residual
    (SMALL, 1, 1, _window(11, 13, 3, (3, 3), (2, 2), (0, 1, 1, 0)), 5, 1, False),
    (SMALL, 2, 2, _window(9, 8, 12, (1, 1)), 40, 1, True),
    (LARGE, 2, 2, _window(6, 7, 8, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2)), 70, 1, True),
    (LARGE, 1, 1, _window(7, 7, 36, (3, 3), pads=(1, 1, 1, 1)), 33, 1, False),  # the window is split
    (LARGE, None, 2, _window(5, 6, 12, (3, 3), (2, 2), (1, 1, 1, 1)), 20, 4, False),
    (SMALL, 1, 1, _window(6, 5, 6, (3, 3), (1, 1), (2, 1, 2, 1), (2, 1)), 12, 3, True),
    (SMALL, 1, 1, _window(1, 1, 130, (1, 1)), 66, 1, False),  # few rows
    (SMALL, 1, 1, _window(1, 30, 5, (1, 4), (1, 1), (0, 3, 0, 0)), 8, 1, False),
    (LARGE, None, 3, _window(1, 2, 8, (1, 1)), 7, 1, True),
]

DEPTHWISE = [
    # machine, batch as compiled, images, window, residual
    (SMALL, 2, 2, _window(9, 15, 20, (3, 3), pads=(1, 1, 1, 1)), True),
    (SMALL, None, 2, _window(60, 49, 6, (5, 5), (2, 2), (1, 1, 2, 2)), False),  # 4 pixels a thread
    (LARGE, 1, 1, _window(3, 2, 7, (5, 5), pads=(2, 2, 2, 2)), False),
    (SMALL, 1, 1, _window(8, 30, 4, (3, 3), (1, 2), (1, 0, 2, 2), (2, 2)), True),
    (SMALL, 1, 1, _window(8, 150, 8, (1, 19), pads=(0, 9, 0, 9)), False),
]

POOLS = [
    # machine, batch as compiled, images, window, largest, counted, dtype
    (SMALL, 2, 2, _window(9, 11, 21, (3, 2), (2, 2), (1, 0, 1, 1)), True, None, "float32"),
    (SMALL, 1, 1, _window(9, 11, 12, (3, 3), (1, 2), (1, 1, 1, 1), (2, 1)), True, None, "int8"),
    (SMALL, None, 2, _window(6, 5, 3, (2, 2), (2, 2)), True, None, "uint8"),
    (LARGE, 1, 1, _window(9, 10, 12, (3, 3), (1, 2), (1, 1, 1, 1)), False, None, "float32"),
    (LARGE, 1, 1, _window(9, 10, 12, (3, 3), (2, 2), (1, 1, 1, 1)), False, (1, 1, 1, 1), "float32"),
    (LARGE, None, 2, _window(9, 11, 132, (9, 11)), False, None, "float32"),  # threads share the window
    (LARGE, 1, 1, _window(40, 41, 10, (40, 41)), False, None, "float32"),  # blocks do
    (LARGE, 1, 1, _window(40, 41, 8, (40, 41)), True, None, "int8"),
]


def _conv(machine, batch, window, n, group, epilogue):
    sizes = tuple(conv.choose(machine, conv.row_of(window), n // group))
    return gpu_conv.conv(machine, batch=batch, window=window, n=n, group=group, sizes=sizes, epilogue=epilogue)


def _pool(machine, batch, window, largest, counted, dtype):
    return gpu_pool.pool(machine, batch=batch, window=window, largest=largest, counted=counted, dtype=dtype)


def _clip(residual):
    return Epilogue(residual=residual, activation="clip", alpha=-0.5, beta=1)


def cases():
    """Name and kernel of each, to compile."""
    for i, (machine, batch, _, window, n, group, residual) in enumerate(CONVS):
        yield f"conv_{i}", _conv(machine, batch, window, n, group, _clip(residual))
    for i, (machine, batch, _, window, residual) in enumerate(DEPTHWISE):
        yield (
            f"depthwise_{i}",
            gpu_depthwise.depthwise(machine, batch=batch, window=window, epilogue=_clip(residual)),
        )
    for i, (machine, batch, _, *rest) in enumerate(POOLS):
        yield f"pool_{i}", _pool(machine, batch, *rest)
    yield "conv_large", _conv(SMALL, 8, _window(56, 56, 64, (3, 3), pads=(1, 1, 1, 1)), 128, 1, _clip(True))


def _reference(kind, inputs, **attributes):
    """What onnxruntime makes of NCHW images, as NHWC."""
    names = [f"x{i}" for i in range(len(inputs))]
    graph = helper.make_graph(
        [helper.make_node(kind, names, ["y"], **attributes)],
        "g",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in zip(names, inputs, strict=True)
        ],
        [helper.make_tensor_value_info("y", helper.np_dtype_to_tensor_dtype(inputs[0].dtype), None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(names, inputs, strict=True)))[0].transpose(0, 2, 3, 1)


def _slid(window):
    return {"strides": window.strides, "pads": window.pads, "dilations": window.dilations}


def _flat(images):
    return images.transpose(0, 2, 3, 1).reshape(len(images), -1)


def _check_convolution(function, window, images, weight, packed, bias, padded_bias, group, residual):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, window.channels, window.height, window.width)).astype(np.float32)
    expected = _reference("Conv", [x, weight, bias], group=group, **_slid(window)).reshape(images, -1)
    added = rng.standard_normal(expected.shape).astype(np.float32)
    expected = np.clip(expected + added * residual, -0.5, 1)
    inputs = [_flat(x), packed, padded_bias, *([added] if residual else [])]
    *_, got = cuda_emulator.run_kernel(function, *inputs, np.full(expected.shape, 77, np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=3e-6)


def _weights(*shape):
    rng = np.random.default_rng(1)
    weight = (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    return weight, rng.standard_normal(shape[0]).astype(np.float32)


@pytest.mark.parametrize("case", CONVS)
def test_kernel_convolves(case):
    cuda_emulator.require()
    machine, batch, images, window, n, group, residual = case
    weight, bias = _weights(n, window.channels // group, *window.kernel)
    sizes = tuple(conv.choose(machine, conv.row_of(window), n // group))
    packed = conv.pack(machine, sizes, weight, group)
    padded = conv.pack_bias(machine, sizes, bias, n, group)
    function = _conv(machine, batch, window, n, group, _clip(residual))
    _check_convolution(function, window, images, weight, packed, bias, padded, group, residual)


@pytest.mark.parametrize("case", DEPTHWISE)
def test_kernel_convolves_each_channel(case):
    cuda_emulator.require()
    machine, batch, images, window, residual = case
    weight, bias = _weights(window.channels, 1, *window.kernel)
    function = gpu_depthwise.depthwise(machine, batch=batch, window=window, epilogue=_clip(residual))
    packed = depthwise.pack(weight)
    _check_convolution(function, window, images, weight, packed, bias, bias, window.channels, residual)


@pytest.mark.parametrize("case", POOLS)
def test_kernel_pools(case):
    cuda_emulator.require()
    machine, batch, images, window, largest, counted, dtype = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((images, window.channels, window.height, window.width)).astype(np.float32)
    if dtype != "float32":
        x = rng.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, x.shape, dtype=dtype, endpoint=True)
    attributes = {"kernel_shape": window.kernel, **_slid(window)}
    if not largest:
        attributes["count_include_pad"] = int(counted is not None)
    expected = _reference("MaxPool" if largest else "AveragePool", [x], **attributes).reshape(images, -1)
    function = _pool(machine, batch, window, largest, counted, dtype)
    *_, got = cuda_emulator.run_kernel(function, _flat(x), np.full(expected.shape, 77, dtype))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=0 if largest else 1e-6)
