"""Kernels of 8-bit integers against numpy, code for code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm_harness import machines, run_kernel  # noqa: E402

from onnxcomp.targets.tvm.kernels import (  # noqa: E402
    int8_conv,
    int8_depthwise,
    int8_dot,
    int8_elementwise,
    int8_gemm,
)
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue  # noqa: E402
from onnxcomp.targets.tvm.kernels._int8_block import Panels  # noqa: E402
from onnxcomp.targets.tvm.kernels._int8_window import Window  # noqa: E402
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402

UNSIGNED = Codes(dtype="uint8", zero=7, low=0, high=255)
SIGNED = Codes(dtype="int8", zero=-3, low=-100, high=127)
ARM = [
    Machine(
        name="a76",
        triple="aarch64-linux-gnu",
        cpu="cortex-a76",
        features=("+dotprod",),
        lanes=4,
        registers=32,
        dot="sdot",
    ),
    Machine(name="a72", triple="aarch64-linux-gnu", cpu="cortex-a72", lanes=4, registers=32, dot="none"),
]
NARROW = Machine(name="vnni256", triple="x86_64-linux-gnu", cpu="icelake-server", lanes=8, registers=16, dot="vnni256")
MACHINES = machines() + ([NARROW] if machines()[-1].dot == "vnni512" else [])

each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda m: m.name)
each_width = pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)


def _codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8).view(dtype)


def _requantized(sums: np.ndarray, scale: np.ndarray, codes: Codes) -> np.ndarray:
    values = np.rint(sums.astype(np.float32) * scale) + codes.zero
    return np.clip(values, codes.low, codes.high).astype(codes.dtype)


def _convolved(x: np.ndarray, weight: np.ndarray, window: Window, zero: int) -> np.ndarray:
    """Sums of a convolution of centred integers; the weight has shape (O, C or 1, KH, KW)."""
    top, left, bottom, right = window.pads
    wide = np.pad(x.astype(np.int64) - zero, ((0, 0), (top, bottom), (left, right), (0, 0)))
    (high, width), (down, across) = window.output, window.strides
    total = np.zeros((x.shape[0], high, width, weight.shape[0]), np.int64)
    for i in range(window.kernel[0]):
        for j in range(window.kernel[1]):
            y, z = i * window.dilations[0], j * window.dilations[1]
            seen = wide[:, y : y + (high - 1) * down + 1 : down, z : z + (width - 1) * across + 1 : across]
            tap = weight[:, :, i, j].astype(np.int64)
            total += seen * tap[:, 0] if weight.shape[1] == 1 else seen @ tap.T
    return total


@each_machine
@pytest.mark.parametrize(
    ("rows", "k", "n", "dtype", "codes", "symbolic"),
    [
        (13, 17, 24, "uint8", UNSIGNED, False),
        (25, 34, 40, "int8", SIGNED, True),
        (1, 3, 100, "int8", UNSIGNED, False),
    ],
)
def test_product(machine: Any, rows: int, k: int, n: int, dtype: str, codes: Codes, symbolic: bool) -> None:
    rng = np.random.default_rng(0)
    x, weight = _codes(rng, (rows, k), dtype), rng.integers(-128, 128, (k, n)).astype(np.int8)
    scale, bias, zero = rng.uniform(0.001, 0.01, n).astype(np.float32), rng.integers(-1000, 1000, n), 5
    panels = Panels(machine=machine, n=n)
    wide = np.pad(weight, ((0, -k % 4), (0, 0)))
    start = bias - int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=0, dtype=np.int64)
    kernel = int8_gemm.gemm(machine, rows=None if symbolic else rows, k=k, n=n, dtype=dtype, output=codes)
    inputs = (x, panels.pack(wide), panels.offset(start), panels.affine(scale))
    found = run_kernel(kernel, machine, *inputs, shape=(rows, n), dtype=codes.dtype)
    sums = (x.astype(np.int64) - zero) @ weight.astype(np.int64) + bias
    np.testing.assert_array_equal(found, _requantized(sums, scale, codes))


@each_width
def test_product_in_floats_adds_bias_and_residual_before_the_activation(machine: Any) -> None:
    rng = np.random.default_rng(1)
    rows, k, n = 9, 20, 21
    x, weight = _codes(rng, (rows, k), "uint8"), rng.integers(-128, 128, (k, n)).astype(np.int8)
    scale, bias, residual = (rng.normal(size=s).astype(np.float32) for s in (n, n, (rows, n)))
    panels = Panels(machine=machine, n=n)
    start = -int8_dot.zero_point(machine, "uint8", 100) * weight.sum(axis=0, dtype=np.int64)
    output = Floats(epilogue=Epilogue(residual=True, activation="relu"))
    kernel = int8_gemm.gemm(machine, rows=rows, k=k, n=n, dtype="uint8", output=output)
    inputs = (x, panels.pack(weight), panels.offset(start), panels.affine(scale, bias), residual)
    found = run_kernel(kernel, machine, *inputs, shape=(rows, n))
    sums = (x.astype(np.int64) - 100) @ weight.astype(np.int64)
    np.testing.assert_allclose(found, np.maximum(sums * scale + bias + residual, 0), rtol=1e-5, atol=1e-2)


CONVOLUTIONS = [
    (Window(size=(9, 11), kernel=(3, 3), strides=(2, 2), pads=(0, 0, 1, 1)), 3, 32, "uint8", UNSIGNED, 1),
    (Window(size=(9, 7), kernel=(3, 2), pads=(1, 1, 1, 1), dilations=(1, 2)), 5, 19, "int8", SIGNED, None),
    (Window(size=(8, 8), kernel=(2, 2), strides=(2, 2)), 6, 20, "int8", UNSIGNED, 1),
]


@each_machine
@pytest.mark.parametrize(("window", "channels", "n", "dtype", "codes", "batch"), CONVOLUTIONS)
def test_convolution(
    machine: Any, window: Window, channels: int, n: int, dtype: str, codes: Codes, batch: int | None
) -> None:
    rng = np.random.default_rng(2)
    images, zero = batch or 2, 11
    x = _codes(rng, (images, *window.size, channels), dtype)
    weight = rng.integers(-128, 128, (n, channels, *window.kernel)).astype(np.int8)
    scale = rng.uniform(0.0005, 0.005, n).astype(np.float32)
    panels = Panels(machine=machine, n=n)
    start = -int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=(1, 2, 3), dtype=np.int64)
    kernel = int8_conv.conv(
        machine, batch=batch, window=window, channels=channels, n=n, dtype=dtype, zero=zero, output=codes
    )
    packed = panels.pack(int8_conv.matrix(window, weight))
    inputs = (x.reshape(images, -1), packed, panels.offset(start), panels.affine(scale))
    high, wide = window.output
    found = run_kernel(kernel, machine, *inputs, shape=(images * high * wide, n), dtype=codes.dtype)
    wanted = _requantized(_convolved(x, weight, window, zero), scale, codes)
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@each_machine
@pytest.mark.parametrize(
    ("window", "channels", "dtype", "codes", "batch"),
    [
        (Window(size=(9, 11), kernel=(3, 3), pads=(1, 1, 1, 1)), 32, "uint8", UNSIGNED, 1),
        (Window(size=(9, 11), kernel=(5, 5), strides=(2, 2), pads=(2, 2, 2, 2)), 21, "int8", SIGNED, None),
        (Window(size=(12, 9), kernel=(2, 3), dilations=(2, 1)), 8, "int8", UNSIGNED, 1),
    ],
)
def test_depthwise(machine: Any, window: Window, channels: int, dtype: str, codes: Codes, batch: int | None) -> None:
    rng = np.random.default_rng(3)
    images, zero = batch or 2, 9
    x = _codes(rng, (images, *window.size, channels), dtype)
    weight = rng.integers(-128, 128, (channels, 1, *window.kernel)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, channels).astype(np.float32)
    start = -int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=(1, 2, 3), dtype=np.int64)
    kernel = int8_depthwise.depthwise(
        machine, batch=batch, window=window, channels=channels, dtype=dtype, zero=zero, output=codes
    )
    inputs = (
        x,
        int8_depthwise.pack(machine, window, weight),
        int8_depthwise.pack_offset(machine, start),
        int8_depthwise.pack_affine(machine, channels, scale),
    )
    shape = (images, *window.output, channels)
    found = run_kernel(kernel, machine, *inputs, shape=shape, dtype=codes.dtype)
    np.testing.assert_array_equal(found, _requantized(_convolved(x, weight, window, zero), scale, codes))


@each_width
def test_quantizer_and_dequantizer(machine: Any) -> None:
    x = np.concatenate([np.linspace(-30, 30, 300), [-1e30, 1e30, 0.125, 0.375]]).astype(np.float32)
    scale = np.array([0.25], np.float32)
    kernel = int8_elementwise.quantize(machine, size=len(x), codes=SIGNED)
    codes = run_kernel(kernel, machine, x, scale, shape=x.shape, dtype="int8")
    np.testing.assert_array_equal(codes, np.clip(np.rint(x / scale) - 3, -100, 127))
    back = run_kernel(
        int8_elementwise.dequantize(machine, size=None, dtype="int8", zero=-3), machine, codes, scale, shape=x.shape
    )
    np.testing.assert_array_equal(back, (codes.astype(np.float32) + 3) * scale)


@each_width
def test_sum_product_and_table_of_codes(machine: Any) -> None:
    rng = np.random.default_rng(4)
    a, b = (_codes(rng, (2500,), "uint8") for _ in range(2))
    added = int8_elementwise.add(
        machine, size=2500, dtype="uint8", ratios=(0.71234, 0.43217), offset=-61.3, codes=UNSIGNED
    )
    found = run_kernel(added, machine, a, b, shape=a.shape, dtype="uint8")
    wanted = np.clip(np.rint(a * np.float64(np.float32(0.71234)) + b * np.float64(np.float32(0.43217)) - 61.3), 0, 255)
    assert np.abs(found - wanted).max() <= 1
    assert (found != wanted).mean() < 0.001
    times = int8_elementwise.multiply(machine, size=None, dtype="uint8", zeros=(100, 3), scale=0.01, codes=UNSIGNED)
    found = run_kernel(times, machine, a, b, shape=a.shape, dtype="uint8")
    exact = (a.astype(np.float32) - 100) * (b.astype(np.float32) - 3) * np.float32(0.01) + np.float32(7)
    np.testing.assert_array_equal(found, np.clip(np.rint(exact), 0, 255))
    table = rng.permutation(256).astype(np.uint8)
    mapped = int8_elementwise.table(machine, size=2500, dtype="int8", out="uint8")
    found = run_kernel(mapped, machine, a.view(np.int8), table, shape=a.shape, dtype="uint8")
    np.testing.assert_array_equal(found, table[a])


@each_width
def test_mean_of_an_image(machine: Any) -> None:
    x = _codes(np.random.default_rng(5), (2, 49, 37), "uint8")
    scale = np.array([0.5 / 49], np.float32)
    kernel = int8_elementwise.mean(machine, batch=None, pixels=49, channels=37, dtype="uint8", zero=20, output=UNSIGNED)
    found = run_kernel(kernel, machine, x, scale, shape=(2, 37), dtype="uint8")
    np.testing.assert_array_equal(found, _requantized((x.astype(np.int64) - 20).sum(axis=1), scale, UNSIGNED))


def test_an_image_with_channels_first_is_interleaved_on_the_way() -> None:
    rng = np.random.default_rng(6)
    window, machine = Window(size=(5, 37), kernel=(3, 3), pads=(1, 1, 1, 1)), MACHINES[-1]
    x, weight = _codes(rng, (1, 5, 37, 3), "int8"), rng.integers(-128, 128, (8, 3, 3, 3)).astype(np.int8)
    scale = np.full(8, 0.002, np.float32)
    panels = Panels(machine=machine, n=8)
    start = -int8_dot.zero_point(machine, "int8", 4) * weight.sum(axis=(1, 2, 3), dtype=np.int64)
    kernel = int8_conv.conv(
        machine, batch=1, window=window, channels=3, n=8, dtype="int8", zero=4, output=UNSIGNED, planar=True
    )
    packed = panels.pack(int8_conv.matrix(window, weight))
    inputs = (x.transpose(0, 3, 1, 2).reshape(1, -1), packed, panels.offset(start), panels.affine(scale))
    found = run_kernel(kernel, machine, *inputs, shape=(5 * 37, 8), dtype="uint8")
    wanted = _requantized(_convolved(x, weight, window, 4), scale, UNSIGNED)
    np.testing.assert_array_equal(found.reshape(wanted.shape), wanted)


@pytest.mark.parametrize(("machine", "instruction"), list(zip(ARM, ["sdot", "smull"], strict=True)), ids=["a76", "a72"])
def test_arm_multiplies_bytes(machine: Any, instruction: str) -> None:
    kernel = int8_gemm.gemm(machine, rows=5, k=18, n=20, dtype="uint8", output=UNSIGNED)
    module = tvm.IRModule({"main": kernel.with_attr("global_symbol", "main")})
    assert instruction in tvm.compile(module, target=machine.target()).mod.inspect_source("asm")
