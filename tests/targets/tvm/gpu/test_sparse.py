"""Kernels for GPUs that read some rows of a weight, against numpy, with sizes that fill no block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402

from onnxcomp.ops._weights import INT4  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.gpu.kernels import sparse_rows  # noqa: E402
from onnxcomp.targets.tvm.kernels.int4 import pack_int4  # noqa: E402

cuda_emulator.require()

ORIN = gpu("jetson-orin", frozenset())
NANO = gpu("jetson-orin-nano", frozenset())

Lists = tuple[np.ndarray, np.ndarray, np.ndarray]


def cases() -> list[tuple[str, Any]]:
    """Kernels that have to compile, with names."""
    h100 = gpu("h100", frozenset())
    return [
        ("sum_rows", sparse_rows.sum_rows(ORIN, rows=None, k=4096, n=4096, dtype="float32")),
        ("sum_rows_int8", sparse_rows.sum_rows(ORIN, rows=1, k=4096, n=4096, dtype="int8")),
        ("sum_rows_int8_h100", sparse_rows.sum_rows(h100, rows=None, k=4096, n=4096, dtype="int8")),
        ("sum_rows_odd", sparse_rows.sum_rows(ORIN, rows=2, k=33, n=71, dtype="int8", carried=True)),
        ("sum_rows_carried", sparse_rows.sum_rows(ORIN, rows=1, k=512, n=1536, dtype="float32", carried=True)),
        ("sum_rows_many", sparse_rows.sum_rows(ORIN, rows=128, k=4096, n=4096, dtype="float32")),
        ("sum_rows_many_int8", sparse_rows.sum_rows(ORIN, rows=128, k=100, n=4096, dtype="int8")),
        ("sum_rows_many_int4", sparse_rows.sum_rows_int4(ORIN, rows=64, k=64, n=96, scale="float16", zeros=True)),
        ("sum_rows_int4", sparse_rows.sum_rows_int4(ORIN, rows=None, k=4096, n=4096, scale="float16", zeros=True)),
        ("sum_rows_int4_h100", sparse_rows.sum_rows_int4(h100, rows=1, k=4096, n=4096, scale="float16", zeros=False)),
        ("sum_rows_int4_odd", sparse_rows.sum_rows_int4(ORIN, rows=1, k=64, n=96, scale="float32", zeros=True)),
    ]


def kept_lists(rows: int, k: int) -> tuple[np.ndarray, Lists]:
    """Activations of which some are zero, and the others as lists; nothing of the first row but one counts."""
    rng = np.random.default_rng(k)
    x = np.where(rng.random((rows, k)) < 0.5, 0, rng.standard_normal((rows, k))).astype(np.float32)
    x[1:2] = 0
    values, places = np.full((rows, k), np.nan, np.float32), np.full((rows, k), -1, np.int32)
    counts = np.zeros(rows, np.int32)
    for row in range(rows):
        found = np.flatnonzero(x[row])
        counts[row] = len(found)
        places[row, : len(found)], values[row, : len(found)] = found, x[row, found]
    return x, (values, places, counts)


def out(rows: int, n: int) -> np.ndarray:
    return np.full((rows, n), 77, np.float32)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0)))


@pytest.mark.parametrize(("rows", "k", "n"), [(1, 5, 1), (3, 130, 1044), (2, 700, 272)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sums_of_rows(rows: int, k: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, lists = kept_lists(rows, k)
    w = (rng.standard_normal((k, n)) * 40).astype(dtype)
    w.flat[:2] = -128, 127
    scale = rng.uniform(0.1, 1, n).astype(np.float32)
    expected = x.astype(np.float64) @ w * scale
    function = sparse_rows.sum_rows(NANO, rows=rows, k=k, n=n, dtype=dtype)
    close(cuda_emulator.run_kernel(function, *lists, w, scale, out(rows, n))[-1], expected)
    total, afresh = rng.standard_normal((rows, n)).astype(np.float32), np.arange(rows, dtype=np.int32) % 2
    total[afresh == 1] = np.nan
    function = sparse_rows.sum_rows(ORIN, rows=rows, k=k, n=n, dtype=dtype, carried=True)
    found = cuda_emulator.run_kernel(function, *lists, w, scale, afresh, total, out(rows, n))[-1]
    close(found, expected + np.where(afresh[:, None] == 1, 0, total))


@pytest.mark.parametrize(
    ("scale", "zeros", "rows", "n"),
    [("float16", True, 2, 1056), ("float32", False, 1, 640), ("float16", True, 1, 512), ("float32", True, 1, 384)],
)
def test_sums_of_int4_rows(scale: str, zeros: bool, rows: int, n: int) -> None:
    rng = np.random.default_rng(0)
    k = 150
    x, lists = kept_lists(rows, k)
    w = rng.integers(0, 256, (k, n // 2)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.02, (k, n // 32)).astype(scale)
    zero = rng.integers(0, 16, scales.shape if zeros else 1).astype(np.uint8)
    matrix = INT4.dequantize(w, scales, zero if zeros else zero[0], np.float64)
    function = sparse_rows.sum_rows_int4(ORIN, rows=rows, k=k, n=n, scale=scale, zeros=zeros)
    found = cuda_emulator.run_kernel(function, *lists, pack_int4(ORIN, w), scales, zero, out(rows, n))[-1]
    close(found, x @ matrix)


@pytest.mark.parametrize(
    ("dtype", "k", "n"), [("float32", 33, 132), ("int8", 5, 72), ("int8", 17, 7), ("int4", 40, 288)]
)
def test_many_rows(dtype: str, k: int, n: int) -> None:
    rng = np.random.default_rng(0)
    rows = 67
    m = rows if n % 8 else None  # of one with few and many rows, the second
    x, lists = kept_lists(rows, k)
    if dtype == "int4":
        w = rng.integers(0, 256, (k, n // 2)).astype(np.uint8)
        scale, zero = rng.uniform(0.005, 0.02, (k, n // 32)).astype(np.float16), np.array([7], np.uint8)
        matrix = INT4.dequantize(w, scale, zero[0], np.float64)
        function = sparse_rows.sum_rows_int4(ORIN, rows=m, k=k, n=n, scale="float16", zeros=False)
        inputs = [pack_int4(ORIN, w), scale, zero]
    else:
        w, scale = (rng.standard_normal((k, n)) * 40).astype(dtype), rng.uniform(0.1, 1, n).astype(np.float32)
        matrix = w.astype(np.float64) * scale
        function = sparse_rows.sum_rows(ORIN, rows=m, k=k, n=n, dtype=dtype)
        inputs = [w, scale]
    found = cuda_emulator.run_kernel(function, *lists, *inputs, out(rows, n))[-1]
    close(found, x @ matrix)


@pytest.mark.parametrize("rows", [0, 3])
def test_any_number_of_rows(rows: int) -> None:
    function = sparse_rows.sum_rows(ORIN, rows=None, k=33, n=40, dtype="int8")
    x, lists = kept_lists(rows, 33)
    w, scale = np.random.default_rng(0).integers(-128, 128, (33, 40)).astype(np.int8), np.ones(40, np.float32)
    close(cuda_emulator.run_kernel(function, *lists, w, scale, out(rows, 40))[-1], x @ w)
