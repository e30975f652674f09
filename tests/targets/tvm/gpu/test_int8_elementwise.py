"""Ops of 8-bit codes on a GPU, against the kernels for CPUs code for code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator
from tvm_harness import machines
from tvm_harness import run_kernel as run_on_cpu

cuda_emulator.require()

from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.gpu.kernels import int8_dynamic, int8_elementwise  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_dynamic as cpu_dynamic  # noqa: E402
from onnxcomp.targets.tvm.kernels import int8_elementwise as cpu_elementwise  # noqa: E402
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats  # noqa: E402

UNSIGNED = Codes(dtype="uint8", zero=7, low=0, high=255)
SIGNED = Codes(dtype="int8", zero=-3, low=-100, high=127)
GPU = gpu("jetson-orin", frozenset())
CPU = machines()[-1]

each_size = pytest.mark.parametrize("known", [True, False], ids=["fixed", "any"])


def _codes(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8).view(dtype)


def _same(make: str, modules: tuple[Any, Any], inputs: list[np.ndarray], empty: np.ndarray, **arguments: Any) -> None:
    """Both kernels fill their output alike."""
    ours, theirs = (getattr(m, make)(machine, **arguments) for m, machine in zip(modules, (GPU, CPU), strict=True))
    wanted = run_on_cpu(theirs, CPU, *inputs, shape=empty.shape, dtype=str(empty.dtype))
    found = cuda_emulator.run_kernel(ours, *inputs, empty)[-1]
    np.testing.assert_array_equal(found, wanted)


ELEMENTWISE = (int8_elementwise, cpu_elementwise)
DYNAMIC = (int8_dynamic, cpu_dynamic)


@each_size
def test_quantizer(known: bool) -> None:
    edges = [-np.inf, -1e30, -1e9, np.inf, 1e30, 1e9, np.nan, 0.125, 0.375, -0.125, -0.0, 31.87]
    x = np.concatenate([np.linspace(-40, 40, 1187), edges]).astype(np.float32)
    for codes in (UNSIGNED, SIGNED):
        out = np.zeros(x.shape, codes.dtype)
        scale = np.array([0.25], np.float32)
        _same("quantize", ELEMENTWISE, [x, scale], out, size=len(x) if known else None, codes=codes)


@each_size
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_dequantizer(dtype: str, known: bool) -> None:
    x, scale = _codes(0, (1027,), dtype), np.array([0.0713], np.float32)
    out = np.zeros(x.shape, np.float32)
    _same("dequantize", ELEMENTWISE, [x, scale], out, size=1027 if known else None, dtype=dtype, zero=-3)


@each_size
@pytest.mark.parametrize("codes", [UNSIGNED, SIGNED], ids=["unsigned", "signed"])
def test_sum_and_product_round_as_on_a_cpu(codes: Codes, known: bool) -> None:
    a, b = np.meshgrid(np.arange(256), np.arange(97))
    a, b = (m.reshape(-1).astype(np.uint8).view(codes.dtype) for m in (a, b))
    size, out = len(a) if known else None, np.zeros(a.shape, codes.dtype)
    own = {"size": size, "dtype": codes.dtype, "codes": codes}
    _same("add", ELEMENTWISE, [a, b], out, ratios=(0.71234, 0.43217), offset=-61.3, **own)
    _same("multiply", ELEMENTWISE, [a, b], out, zeros=(100, 3), scale=0.0125, **own)


@each_size
def test_table(known: bool) -> None:
    x, table = _codes(1, (515,), "int8"), np.random.default_rng(2).permutation(256).astype(np.uint8)
    out = np.zeros(x.shape, np.uint8)
    _same("table", ELEMENTWISE, [x, table], out, size=515 if known else None, dtype="int8", out="uint8")


@each_size
@pytest.mark.parametrize("output", [UNSIGNED, Floats()], ids=["codes", "floats"])
def test_mean_of_an_image(output: Codes | Floats, known: bool) -> None:
    x, scale = _codes(3, (2, 49, 37), "uint8"), np.array([0.5 / 49], np.float32)
    own = {"batch": 2 if known else None, "pixels": 49, "channels": 37, "dtype": "uint8", "zero": 20}
    _same("mean", ELEMENTWISE, [x, scale], np.zeros((2, 37), output.dtype), output=output, **own)


@pytest.mark.parametrize(
    ("values", "known"), [("mixed", True), ("mixed", False), ("positive", False), ("zeros", True), ("few", False)]
)
def test_range_and_codes_of_it(values: str, known: bool) -> None:
    rng = np.random.default_rng(4)
    x = {
        "mixed": rng.normal(size=9001),
        "positive": rng.uniform(3, 4, 70),
        "zeros": np.zeros(33),
        "few": np.array([-0.7, 0.2]),
    }[values].astype(np.float32)
    size, zero = len(x) if known else None, np.zeros(1, np.float32)
    _same("value_range", DYNAMIC, [x, zero], np.zeros(2, np.float32), size=size)
    parameters = run_on_cpu(cpu_dynamic.value_range(CPU, size=size), CPU, x, zero, shape=(2,))
    _same("quantize", DYNAMIC, [x, parameters], np.zeros(x.shape, np.uint8), size=size)


def test_offset_and_scales_of_a_range() -> None:
    rng = np.random.default_rng(5)
    parameters, totals = np.array([0.03, 117], np.float32), rng.integers(-9999, 9999, 320).astype(np.int32)
    kernel = int8_dynamic.offset(GPU, columns=320)
    found = cuda_emulator.run_kernel(kernel, parameters, totals, np.zeros(320, np.int32))[-1]
    np.testing.assert_array_equal(found, -(117 - 128) * totals)
    table = rng.normal(size=(2, 320)).astype(np.float32)
    _same("affine", DYNAMIC, [parameters, table], np.zeros_like(table), columns=320)


def cases() -> list[tuple[str, Any]]:
    """Kernels by name, to be compiled by nvcc."""
    return [
        ("quantize", int8_elementwise.quantize(GPU, size=None, codes=UNSIGNED)),
        ("dequantize", int8_elementwise.dequantize(GPU, size=1000, dtype="int8", zero=3)),
        ("table", int8_elementwise.table(GPU, size=1000, dtype="int8", out="uint8")),
        (
            "add",
            int8_elementwise.add(GPU, size=1000, dtype="uint8", ratios=(0.7, 0.4), offset=-61.3, codes=UNSIGNED),
        ),
        (
            "multiply",
            int8_elementwise.multiply(GPU, size=None, dtype="int8", zeros=(1, 2), scale=0.01, codes=SIGNED),
        ),
        (
            "mean",
            int8_elementwise.mean(GPU, batch=None, pixels=49, channels=1280, dtype="uint8", zero=3, output=UNSIGNED),
        ),
        ("value_range", int8_dynamic.value_range(GPU, size=None)),
        ("dynamic_quantize", int8_dynamic.quantize(GPU, size=1000)),
        ("offset", int8_dynamic.offset(GPU, columns=320)),
        ("affine", int8_dynamic.affine(GPU, columns=320)),
    ]
