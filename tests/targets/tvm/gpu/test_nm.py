"""N:M products by the kernels for GPUs, against numpy, with sizes that fill no block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402

from onnxcomp.targets.ort.nm_lowering import nm_blocks  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.gpu.kernels import nm  # noqa: E402

cuda_emulator.require()

NANO, ORIN, H100 = (gpu(name, frozenset()) for name in ("jetson-orin-nano", "jetson-orin", "h100"))


def cases() -> list[tuple[str, Any]]:
    """Kernels that have to compile, with names."""
    return [
        ("nm_int8", nm.nm_matmul(H100, rows=1, k=4096, n=4096, kept=2, dtype="int8")),
        ("nm_int8_rows", nm.nm_matmul(ORIN, rows=16, k=4096, n=4096, kept=1, dtype="int8")),
        ("nm_float32", nm.nm_matmul(ORIN, rows=None, k=4096, n=4096, kept=2, dtype="float32")),
        ("nm_float32_one", nm.nm_matmul(ORIN, rows=1, k=512, n=1000, kept=1, dtype="float32")),
        ("nm_float16", nm.nm_matmul(ORIN, rows=3, k=4096, n=4096, kept=1, dtype="float16")),
    ]


def pruned(k: int, n: int, kept: int, dtype: str) -> np.ndarray:
    """A weight of which each four of a column keep so many at most."""
    rng = np.random.default_rng(k)
    order = rng.random((-(-k // 4), 4, n)).argsort(axis=1) < kept
    w = np.where(order.reshape(-1, n)[:k], np.clip(rng.standard_normal((k, n)) * 40, -128, 127), 0).astype(dtype)
    w[4:8, :3] = 0
    return w


@pytest.mark.parametrize(
    ("dtype", "kept", "rows", "k", "n", "machine"),
    [
        ("int8", 2, 1, 520, 70, NANO),
        ("int8", 1, 3, 1030, 33, ORIN),
        ("int8", 2, 3, 2051, 16, NANO),
        ("float32", 2, 7, 75, 150, NANO),
        ("float32", 1, 1, 700, 130, ORIN),
        ("float16", 2, 2, 131, 24, NANO),
        ("float16", 1, 1, 9, 1, ORIN),
    ],
)
def test_products(dtype: str, kept: int, rows: int, k: int, n: int, machine: Any) -> None:
    rng = np.random.default_rng(0)
    w = pruned(k, n, kept, dtype)
    x, scale = rng.standard_normal((rows, k)).astype(np.float32), rng.uniform(0.1, 1, n).astype(np.float32)
    values, places = nm_blocks(w, kept)
    if dtype == "int8":  # as lowering stores them for machines that do not multiply them as integers
        values = np.ascontiguousarray(values.reshape(*values.shape[:2], 16, 4).swapaxes(2, 3)).reshape(values.shape)
    expected = x.astype(np.float64) @ w.astype(np.float64) * scale
    inputs = [x, values, places, np.pad(scale, (0, -n % 16)), np.full((rows, n), 77, np.float32)]
    function = nm.nm_matmul(machine, rows=None if k == 1030 else rows, k=k, n=n, kept=kept, dtype=dtype)
    found = cuda_emulator.run_kernel(function, *inputs)[-1]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_inputs_that_shared_memory_cannot_hold() -> None:
    rng = np.random.default_rng(0)
    k, n = 9000, 16
    w, x = pruned(k, n, 1, "float32"), rng.standard_normal((4, k)).astype(np.float32)
    values, places = nm_blocks(w, 1)
    one = gpu("jetson-orin-nano", frozenset())
    inputs = [x, values, places, np.ones(n, np.float32), np.full((4, n), 77, np.float32)]
    found = cuda_emulator.run_kernel(nm.nm_matmul(one, rows=4, k=k, n=n, kept=1, dtype="float32"), *inputs)[-1]
    expected = x.astype(np.float64) @ w
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_one_row_and_none_of_any_number() -> None:
    rng = np.random.default_rng(0)
    k, n = 75, 150
    w = pruned(k, n, 2, "float32")
    values, places = nm_blocks(w, 2)
    function = nm.nm_matmul(NANO, rows=None, k=k, n=n, kept=2, dtype="float32")
    for rows in (0, 1):
        x = rng.standard_normal((rows, k)).astype(np.float32)
        inputs = [x, values, places, np.ones(-(-n // 16) * 16, np.float32), np.full((rows, n), 77, np.float32)]
        found = cuda_emulator.run_kernel(function, *inputs)[-1]
        np.testing.assert_allclose(found, x @ w, rtol=0, atol=1e-3)
