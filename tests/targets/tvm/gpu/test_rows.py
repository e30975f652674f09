from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels.norm import norm
from onnxcomp.targets.tvm.gpu.kernels.ranges import numbers
from onnxcomp.targets.tvm.gpu.kernels.softmax import softmax
from onnxcomp.targets.tvm.gpu.machine import Gpu

cuda_emulator.require()

RNG = np.random.default_rng(0)
GPU = Gpu(
    name="gpu", triple="x86_64-linux-gnu", cpu="x86-64", lanes=32, registers=64, dot="dp4a", arch="sm_87",
    multiprocessors=8,
)  # fmt: skip

SOFTMAX = {
    "a warp a row": ((3, 7), 77, None, False),
    "a block a row": ((3,), 1500, None, False),
    "rows that registers do not hold": ((2,), 20001, None, False),
    "one value": ((9,), 1, None, False),
    "any size": ((2, 5), 300, (False, True), True),
    "any long row": ((3,), 1100, None, True),
    "mask": ((2, 3, 4), 33, (True, False, True), False),
}
NORM = {
    "a warp a row": (11, 77, True, True, False),
    "any number of rows": (9, 384, False, False, True),
    "a block a row": (3, 1100, True, False, True),
    "one row": (1, 2048, True, True, False),
    "rows that registers do not hold": (2, 20001, True, True, True),
    "one value": (3, 1, False, True, False),
}


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def softmax_kernel(outer, n, mask, symbolic) -> Any:
    given = tuple(None if symbolic else s for s in outer)
    return softmax(GPU, outer=given, n=None if symbolic else n, mask=mask, scale=0.7)


def norm_kernel(rows, n, centred, bias, symbolic) -> Any:
    return norm(GPU, rows=None if symbolic else rows, n=n, epsilon=1e-3, centred=centred, bias=bias)


def cases() -> list[tuple[str, Any]]:
    found = [(f"softmax, {name}", softmax_kernel(*case)) for name, case in SOFTMAX.items()]
    found += [(f"norm, {name}", norm_kernel(*case)) for name, case in NORM.items()]
    return [*found, ("ranges", numbers(3))]


@pytest.mark.parametrize("name", SOFTMAX)
def test_softmax(name):
    outer, n, mask, _ = SOFTMAX[name]
    x, added = values(*outer, n) * 4, np.zeros((), np.float32)
    inputs = [x]
    if mask is not None:
        added = values(*(s if has else 1 for s, has in zip(outer, mask, strict=True)), n)
        added[..., : n // 2] = -np.inf
        inputs.append(added)
    scores = x * np.float64(0.7) + added
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    *_, y = cuda_emulator.run_kernel(softmax_kernel(*SOFTMAX[name]), *inputs, np.zeros_like(x))
    np.testing.assert_allclose(y, powers / powers.sum(-1, keepdims=True), rtol=3e-6, atol=0)


@pytest.mark.parametrize("name", ["a warp a row", "a block a row", "rows that registers do not hold"])
def test_exponentials_of_great_values(name):
    outer, n, *_ = SOFTMAX[name]
    x = values(*outer, n) + np.float32(300)
    powers = np.exp((x - x.max(-1, keepdims=True)) * np.float64(0.7))
    *_, y = cuda_emulator.run_kernel(softmax_kernel(*SOFTMAX[name]), x, np.zeros_like(x))
    np.testing.assert_allclose(y, powers / powers.sum(-1, keepdims=True), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["a warp a row", "a block a row", "rows that registers do not hold"])
def test_values_that_are_no_numbers_stay_in_their_row(name):
    outer, n, *_ = SOFTMAX[name]
    x = values(*outer, n)
    x[0, ..., 3], x[-1] = np.nan, -np.inf
    *_, y = cuda_emulator.run_kernel(softmax_kernel(*SOFTMAX[name]), x, np.zeros_like(x))
    bad = np.isnan(y).all(-1)
    np.testing.assert_array_equal(bad, np.isnan(x).any(-1) | np.isinf(x).all(-1))
    assert not np.isnan(y[~bad]).any()


def test_no_rows():
    x = np.zeros((0, 5, 8), np.float32)
    assert cuda_emulator.run_kernel(softmax(GPU, outer=(None, 5), n=None), x, x)[-1].size == 0
    x, scale = np.zeros((0, 40), np.float32), np.zeros(40, np.float32)
    function = norm(GPU, rows=None, n=40, epsilon=0.1, centred=True, bias=False)
    assert cuda_emulator.run_kernel(function, x, scale, x)[-1].size == 0


@pytest.mark.parametrize("name", NORM)
def test_norm(name):
    rows, n, centred, bias, _ = NORM[name]
    x, scale, offset = values(rows, n) * 3 + 5, values(n), values(n)
    away = x.astype(np.float64) - (x.mean(-1, keepdims=True, dtype=np.float64) if centred else 0)
    expected = away / np.sqrt((away**2).mean(-1, keepdims=True) + 1e-3) * scale + (offset if bias else 0)
    inputs = [x, scale, offset] if bias else [x, scale]
    *_, y = cuda_emulator.run_kernel(norm_kernel(*NORM[name]), *inputs, np.zeros_like(x))
    np.testing.assert_allclose(y, expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize(("start", "step", "count"), [(0, 1, 200), (-7, 3, 5), (1, 1, 0)])
def test_numbers_in_a_row(start, step, count):
    (y,) = cuda_emulator.run_kernel(numbers(step), start, np.zeros(count, np.int64))
    np.testing.assert_array_equal(y, start + step * np.arange(count))
