"""Products of open neurons by the kernels for GPUs, against numpy, with sizes that fill no block."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402

from onnxcomp.ops._weights import INT4  # noqa: E402
from onnxcomp.targets.tvm.gpu.boards import gpu  # noqa: E402
from onnxcomp.targets.tvm.gpu.kernels import gated_mlp  # noqa: E402
from onnxcomp.targets.tvm.kernels.int4 import pack_int4  # noqa: E402

cuda_emulator.require()

NANO = gpu("jetson-orin-nano", frozenset())


def cases() -> list[tuple[str, Any]]:
    """Kernels that have to compile, with names."""
    orin, h100 = gpu("jetson-orin", frozenset()), gpu("h100", frozenset())
    return [
        ("neurons", gated_mlp.neurons(orin, rows=None, k=4096, f=11008, dtype="float32")),
        ("neurons_int8", gated_mlp.neurons(h100, rows=1, k=4096, f=11008, dtype="int8")),
        ("neurons_odd", gated_mlp.neurons(orin, rows=2, k=167, f=41, dtype="int8")),
        ("neurons_long", gated_mlp.neurons(orin, rows=1, k=16384, f=4096, dtype="int8")),
        ("neurons_int4", gated_mlp.neurons_int4(orin, rows=1, k=4096, f=11008, scale="float16", zeros=True)),
        ("neurons_int4_one", gated_mlp.neurons_int4(h100, rows=None, k=4128, f=11008, scale="float32", zeros=False)),
    ]


def lists(rows: int, f: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gates of open neurons, one or none of the second row."""
    rng = np.random.default_rng(f)
    gates, places = np.full((rows, f), np.nan, np.float32), np.full((rows, f), -1, np.int32)
    counts = np.zeros(rows, np.int32)
    for row in range(rows):
        found = np.sort(rng.permutation(f)[: 1 if row == 1 else f * 2 // 3])
        counts[row] = len(found)
        gates[row, : len(found)], places[row, : len(found)] = rng.standard_normal(len(found)), found
    return gates, places, counts


def check(found: np.ndarray, listed: Any, matrix: np.ndarray, x: np.ndarray) -> None:
    gates, places, counts = listed
    for row, count in enumerate(counts):
        expected = gates[row, :count] * (matrix @ x[row].astype(np.float64))[places[row, :count]]
        np.testing.assert_allclose(
            found[row, :count], expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max(initial=0))
        )
        assert (found[row, count:] == 77).all()


@pytest.mark.parametrize(
    ("dtype", "rows", "k", "f"),
    [("int8", 3, 167, 41), ("int8", 1, 1552, 70), ("int8", 2, 68, 9), ("float32", 2, 644, 71), ("float32", 1, 33, 1)],
)
def test_neurons(dtype: str, rows: int, k: int, f: int) -> None:
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((rows, k)).astype(np.float32), rng.uniform(0.1, 1, f).astype(np.float32)
    up = (rng.standard_normal((f, k)) * 40).astype(dtype)
    listed = lists(rows, f)
    function = gated_mlp.neurons(NANO, rows=None if rows > 1 else 1, k=k, f=f, dtype=dtype)
    found = cuda_emulator.run_kernel(function, *listed, x, up, scale, np.full((rows, f), 77, np.float32))[-1]
    check(found, listed, scale[:, None] * up.astype(np.float64), x)


def test_inputs_that_shared_memory_cannot_hold() -> None:
    rng = np.random.default_rng(0)
    k, f = 12304, 5
    x, up = rng.standard_normal((1, k)).astype(np.float32), rng.integers(-128, 128, (f, k)).astype(np.int8)
    listed, scale = lists(1, f), rng.uniform(0.1, 1, f).astype(np.float32)
    function = gated_mlp.neurons(NANO, rows=1, k=k, f=f, dtype="int8")
    found = cuda_emulator.run_kernel(function, *listed, x, up, scale, np.full((1, f), 77, np.float32))[-1]
    check(found, listed, scale[:, None] * up.astype(np.float64), x)


@pytest.mark.parametrize(
    ("scale", "zeros", "rows", "k"), [("float16", True, 2, 1056), ("float32", False, 1, 640), ("float16", True, 1, 512)]
)
def test_neurons_of_int4(scale: str, zeros: bool, rows: int, k: int) -> None:
    rng = np.random.default_rng(0)
    f = 71
    x = rng.standard_normal((rows, k)).astype(np.float32)
    w = rng.integers(0, 256, (f, k // 2)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.02, (f, k // 32)).astype(scale)
    zero = rng.integers(0, 16, scales.shape if zeros else 1).astype(np.uint8)
    matrix = INT4.dequantize(w, scales, zero if zeros else zero[0], np.float64)
    listed = lists(rows, f)
    function = gated_mlp.neurons_int4(NANO, rows=rows, k=k, f=f, scale=scale, zeros=zeros)
    inputs = [x, pack_int4(NANO, w), scales, zero, np.full((rows, f), 77, np.float32)]
    check(cuda_emulator.run_kernel(function, *listed, *inputs)[-1], listed, matrix, x)
