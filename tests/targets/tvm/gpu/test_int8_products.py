"""Products and convolutions of 8-bit integers on a GPU, code for code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator
from tvm_harness import machines
from tvm_harness import run_kernel as run_on_cpu

cuda_emulator.require()

from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.gpu.kernels import int8_conv, int8_depthwise, int8_gemm  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_conv as cpu_conv  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_depthwise as cpu_depthwise  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_dot  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_gemm as cpu_gemm  # noqa: E402
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue  # noqa: E402
from onnxcomp.targets.tvm.kernels._int8_block import Panels  # noqa: E402
from onnxcomp.targets.tvm.kernels._int8_window import Window  # noqa: E402
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats  # noqa: E402

UNSIGNED = Codes(dtype="uint8", zero=7, low=0, high=255)
SIGNED = Codes(dtype="int8", zero=-3, low=-100, high=127)
FLOATS = Floats(epilogue=Epilogue(residual=True, activation="relu"))
GPU = gpu("jetson-orin", frozenset())
SINGLE = replace(GPU, multiprocessors=1)
"""So small that even a small product makes whole tiles, and no parts of K."""
CPU = machines()[-1]


def _codes(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8).view(dtype)


def _run(kernel: Any, machine: Any, inputs: list[np.ndarray], shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if machine is CPU:
        return run_on_cpu(kernel, machine, *inputs, shape=shape, dtype=dtype)
    return cuda_emulator.run_kernel(kernel, *inputs, np.zeros(shape, dtype))[-1]


def _product(machine: Any, module: Any, rows: int, k: int, n: int, dtype: str, output: Any, known: bool) -> np.ndarray:
    rng, zero = np.random.default_rng(0), 5
    x, weight = _codes(rng, (rows, k), dtype), rng.integers(-128, 128, (k, n)).astype(np.int8)
    scale, bias, residual = (rng.normal(size=s).astype(np.float32) for s in (n, n, (rows, n)))
    panels = Panels(machine=machine, n=n)
    start = -int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=0, dtype=np.int64)
    inputs = [x, panels.pack(np.pad(weight, ((0, -k % 4), (0, 0))))]
    if isinstance(output, Floats):
        inputs += [panels.offset(start), panels.affine(scale, bias), residual]
    else:
        inputs += [
            panels.offset(start + (1000 * bias).astype(np.int64)),
            panels.affine(np.abs(scale) * np.float32(5e-3)),
        ]
    kernel = module.gemm(machine, rows=rows if known else None, k=k, n=n, dtype=dtype, output=output)
    return _run(kernel, machine, inputs, (rows, n), output.dtype)


@pytest.mark.parametrize(
    ("machine", "rows", "k", "n", "dtype", "output", "known"),
    [
        (GPU, 1, 3, 100, "int8", UNSIGNED, True),
        (GPU, 1, 600, 33, "uint8", SIGNED, True),
        (GPU, 13, 17, 24, "uint8", UNSIGNED, True),
        (SINGLE, 7, 40, 132, "int8", SIGNED, True),
        (GPU, 6, 260, 41, "int8", FLOATS, False),
        (GPU, 25, 34, 40, "int8", SIGNED, False),
        (GPU, 70, 260, 132, "uint8", UNSIGNED, True),
        (GPU, 19, 64, 20, "uint8", FLOATS, True),
        (SINGLE, 300, 36, 68, "uint8", UNSIGNED, True),
        (SINGLE, 257, 48, 23, "int8", FLOATS, True),
    ],
)
def test_product(machine: Any, rows: int, k: int, n: int, dtype: str, output: Any, known: bool) -> None:
    found = _product(machine, int8_gemm, rows, k, n, dtype, output, known)
    wanted = _product(CPU, cpu_gemm, rows, k, n, dtype, output, known)
    np.testing.assert_array_equal(found, wanted)


def test_no_rows() -> None:
    kernel = int8_gemm.gemm(GPU, rows=None, k=8, n=8, dtype="uint8", output=UNSIGNED)
    panels = Panels(machine=GPU, n=8)
    offset, affine = panels.offset(np.zeros(8)), panels.affine(np.ones(8))
    empty = np.zeros((0, 8), np.uint8)
    cuda_emulator.run_kernel(kernel, empty, panels.pack(np.zeros((8, 8), np.int8)), offset, affine, empty)


def _convolution(
    machine: Any,
    module: Any,
    window: Window,
    channels: int,
    n: int,
    dtype: str,
    output: Any,
    batch: int | None,
    planar: bool,
) -> np.ndarray:
    rng, images, zero = np.random.default_rng(1), batch or 2, 11
    x = _codes(rng, (images, *window.size, channels), dtype)
    weight = rng.integers(-128, 128, (n, channels, *window.kernel)).astype(np.int8)
    scale, pixels = rng.uniform(0.0005, 0.005, n).astype(np.float32), images * window.output[0] * window.output[1]
    panels = Panels(machine=machine, n=n)
    start = -int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=(1, 2, 3), dtype=np.int64)
    kernel = module.conv(
        machine,
        batch=batch,
        window=window,
        channels=channels,
        n=n,
        dtype=dtype,
        zero=zero,
        output=output,
        planar=planar,
    )
    flat = (x.transpose(0, 3, 1, 2) if planar else x).reshape(images, -1)
    inputs = [flat, panels.pack(cpu_conv.matrix(window, weight)), panels.offset(start)]
    if isinstance(output, Floats):
        inputs += [panels.affine(scale, 100 * scale), rng.normal(size=(pixels, n)).astype(np.float32)]
    else:
        inputs += [panels.affine(scale)]
    return _run(kernel, machine, inputs, (pixels, n), output.dtype)


@pytest.mark.parametrize(
    ("window", "channels", "n", "dtype", "output", "batch", "planar"),
    [
        (Window(size=(9, 11), kernel=(3, 3), strides=(2, 2), pads=(0, 0, 1, 1)), 3, 32, "uint8", UNSIGNED, 1, False),
        (Window(size=(9, 7), kernel=(3, 2), pads=(1, 1, 1, 1), dilations=(1, 2)), 5, 19, "int8", SIGNED, None, False),
        (Window(size=(8, 8), kernel=(2, 2), strides=(2, 2)), 8, 20, "int8", FLOATS, 2, False),
        (Window(size=(3, 3), kernel=(3, 3), pads=(1, 0, 1, 0)), 64, 40, "uint8", SIGNED, 1, False),
        (Window(size=(7, 6), kernel=(3, 3), pads=(1, 0, 1, 2)), 16, 130, "uint8", UNSIGNED, 1, False),
        (Window(size=(5, 37), kernel=(3, 3), pads=(1, 1, 1, 1)), 3, 8, "int8", UNSIGNED, 1, True),
        (Window(size=(6, 5), kernel=(2, 3), strides=(1, 2), pads=(0, 1, 1, 0)), 4, 8, "uint8", SIGNED, 2, True),
    ],
)
def test_convolution(
    window: Window, channels: int, n: int, dtype: str, output: Any, batch: int | None, planar: bool
) -> None:
    own = (window, channels, n, dtype, output, batch, planar)
    np.testing.assert_array_equal(_convolution(GPU, int8_conv, *own), _convolution(CPU, cpu_conv, *own))


def _deep(machine: Any, module: Any, window: Window, channels: int, dtype: str, output: Any, batch: int | None) -> Any:
    rng, images, zero = np.random.default_rng(2), batch or 2, 9
    x = _codes(rng, (images, *window.size, channels), dtype)
    weight = rng.integers(-128, 128, (channels, 1, *window.kernel)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, channels).astype(np.float32)
    start = -int8_dot.zero_point(machine, dtype, zero) * weight.sum(axis=(1, 2, 3), dtype=np.int64)
    kernel = module.depthwise(
        machine, batch=batch, window=window, channels=channels, dtype=dtype, zero=zero, output=output
    )
    inputs = [
        x,
        cpu_depthwise.pack(machine, window, weight),
        cpu_depthwise.pack_offset(machine, start),
        cpu_depthwise.pack_affine(machine, channels, scale, 100 * scale),
    ]
    return _run(kernel, machine, inputs, (images, *window.output, channels), output.dtype)


@pytest.mark.parametrize(
    ("machine", "window", "channels", "dtype", "output", "batch"),
    [
        (GPU, Window(size=(9, 11), kernel=(3, 3), pads=(1, 1, 1, 1)), 32, "uint8", UNSIGNED, 1),
        (GPU, Window(size=(9, 11), kernel=(5, 5), strides=(2, 2), pads=(2, 2, 2, 2)), 21, "int8", SIGNED, None),
        (SINGLE, Window(size=(12, 9), kernel=(2, 3), dilations=(2, 2)), 40, "int8", Floats(), 1),
        (SINGLE, Window(size=(7, 9), kernel=(7, 5), strides=(1, 2), pads=(3, 2, 3, 2)), 36, "uint8", SIGNED, 2),
    ],
)
def test_depthwise(machine: Any, window: Window, channels: int, dtype: str, output: Any, batch: int | None) -> None:
    own = (window, channels, dtype, output, batch)
    np.testing.assert_array_equal(_deep(machine, int8_depthwise, *own), _deep(CPU, cpu_depthwise, *own))


def test_packed_columns_of_a_word_lie_side_by_side() -> None:
    """A warp reads the weights of 32 columns as 128 bytes."""
    weight = np.random.default_rng(3).integers(-128, 128, (8, 64)).astype(np.int8)
    packed = Panels(machine=GPU, n=64).pack(weight)
    assert packed.shape == (1, 2, 2, 128)
    np.testing.assert_array_equal(packed[0, 1, 1].reshape(32, 4), weight[4:, 32:].T)


def cases() -> list[tuple[str, Any]]:
    """Kernels by name, to be compiled by nvcc."""
    image = {"dtype": "uint8", "zero": 5}
    return [
        ("one_row", int8_gemm.gemm(GPU, rows=1, k=4096, n=4096, dtype="uint8", output=UNSIGNED)),
        ("few_rows", int8_gemm.gemm(GPU, rows=16, k=1024, n=1000, dtype="int8", output=FLOATS)),
        ("tiles", int8_gemm.gemm(GPU, rows=4096, k=768, n=768, dtype="int8", output=SIGNED)),
        ("parts", int8_gemm.gemm(GPU, rows=49, k=2048, n=512, dtype="uint8", output=UNSIGNED)),
        ("any_rows", int8_gemm.gemm(GPU, rows=None, k=770, n=512, dtype="uint8", output=FLOATS)),
        (
            "convolution",
            int8_conv.conv(
                GPU,
                batch=1,
                window=Window(size=(56, 56), kernel=(3, 3), pads=(1, 1, 1, 1)),
                channels=64,
                n=64,
                output=UNSIGNED,
                **image,
            ),
        ),
        (
            "planar",
            int8_conv.conv(
                GPU,
                batch=None,
                window=Window(size=(224, 224), kernel=(7, 7), strides=(2, 2), pads=(3, 3, 3, 3)),
                channels=3,
                n=64,
                output=SIGNED,
                planar=True,
                **image,
            ),
        ),
        (
            "depthwise",
            int8_depthwise.depthwise(
                GPU,
                batch=1,
                window=Window(size=(112, 112), kernel=(3, 3), pads=(1, 1, 1, 1)),
                channels=32,
                output=UNSIGNED,
                **image,
            ),
        ),
        (
            "wide_depthwise",
            int8_depthwise.depthwise(
                GPU,
                batch=None,
                window=Window(size=(56, 56), kernel=(7, 7), pads=(3, 3, 3, 3)),
                channels=98,
                output=Floats(),
                **image,
            ),
        ),
    ]
