"""Lists of inputs that count, by the kernels for GPUs, against those for CPUs and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

import cuda_emulator  # noqa: E402
from tvm_harness import SSE2, compiled, tensor  # noqa: E402

from onnxcomp.targets.tvm.gpu.kernels import selection  # noqa: E402
from onnxcomp.targets.tvm.kernels import selection as of_cpu  # noqa: E402

cuda_emulator.require()


def cases() -> list[tuple[str, Any]]:
    """Kernels that have to compile, with names."""
    return [
        ("above", selection.above(rows=None, k=4096, each=False, one_sided=False)),
        ("above_each", selection.above(rows=2, k=65536, each=True, one_sided=True)),
        ("largest", selection.largest(rows=None, k=4096)),
        ("largest_small", selection.largest(rows=1, k=64)),
        ("changed", selection.changed(rows=1, k=4096, n=4096, each=False, steps=0)),
        ("changed_rounded", selection.changed(rows=2, k=300, n=70, each=True, steps=300)),
    ]


def room(rows: int, k: int) -> list[np.ndarray]:
    return [np.zeros((rows, k), np.float32), np.zeros((rows, k), np.int32), np.zeros(rows, np.int32)]


def on_cpu(function: Any, *arrays: np.ndarray) -> list[np.ndarray]:
    given = [tensor(array) for array in arrays]
    compiled(function, SSE2)(*given)
    return [array.numpy() for array in given]


def same_lists(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(found[2], expected[2])
    for row, count in enumerate(expected[2]):
        for one, other in zip(found[:2], expected[:2], strict=True):
            np.testing.assert_array_equal(one[row, :count], other[row, :count])


@pytest.mark.parametrize(
    ("k", "each", "one_sided"), [(1, False, False), (300, True, False), (9001, False, True), (9001, True, False)]
)
def test_what_is_above_a_threshold(k: int, each: bool, one_sided: bool) -> None:
    rng = np.random.default_rng(k)
    x = rng.standard_normal((3, k)).astype(np.float32)
    x[1] = 0
    x[2, k // 2] = np.nan
    limit = rng.uniform(0.3, 1, k if each else 1).astype(np.float32)
    limit[0] = 0 if each else 0.5
    sizes: dict[str, Any] = {"k": k, "each": each, "one_sided": one_sided}
    found = cuda_emulator.run_kernel(selection.above(rows=None, **sizes), x, limit, *room(3, k))
    same_lists(found[2:], on_cpu(of_cpu.above(rows=None, **sizes), x, limit, *room(3, k))[2:])
    assert k == 1 or 0 < found[4][0] < k


@pytest.mark.parametrize(("k", "share"), [(1, 1), (41, 0), (41, 0.6), (300, 0.1), (300, 2), (9001, 0.1), (9001, 0.6)])
def test_the_largest(k: int, share: float) -> None:
    rng = np.random.default_rng(k)
    x = np.stack([rng.integers(-40, 41, k), rng.standard_normal(k) * 10.0 ** rng.integers(-40, 30, k)])
    x = x.astype(np.float32)
    x[1, k // 3 : k // 3 + 3] = np.array([np.nan, np.inf, 1e-42], np.float32)[: len(x[1, k // 3 : k // 3 + 3])]
    count = np.array([int(np.ceil(share * k))], np.int32)
    found = cuda_emulator.run_kernel(selection.largest(rows=None, k=k), x, count, *room(2, k))
    same_lists(found[2:], on_cpu(of_cpu.largest(rows=None, k=k), x, count, *room(2, k))[2:])
    assert found[4][0] == min(k, count[0])


def test_a_negative_count_lists_nothing() -> None:
    x = np.ones((1, 41), np.float32)
    found = cuda_emulator.run_kernel(selection.largest(rows=1, k=41), x, np.array([-3], np.int32), *room(1, 41))
    assert found[4][0] == 0


def test_no_rows() -> None:
    x, limit = np.zeros((0, 41), np.float32), np.zeros(1, np.float32)
    function = selection.above(rows=None, k=41, each=False, one_sided=False)
    cuda_emulator.run_kernel(function, x, limit, *room(0, 41))


@pytest.mark.parametrize(("k", "n", "steps"), [(1, 1, 0), (300, 70, 1), (300, 3000, 2), (5000, 41, 0), (5000, 41, 2)])
def test_what_changed(k: int, n: int, steps: int) -> None:
    rng = np.random.default_rng(k)
    rows = 4
    x, last = (rng.standard_normal((rows, k)).astype(np.float32) for _ in range(2))
    total = rng.standard_normal((rows, n)).astype(np.float32)
    x[1, -1], total[2, n // 2] = np.nan, np.inf
    last[3] = x[3]
    length = {0: 0, 1: 1, 2: k}[steps]
    limit = rng.uniform(0.3, 1.5, k if steps else 1).astype(np.float32)
    step = rng.choice(np.array([0, 0.125, 0.3], np.float32), max(length, 1))
    sizes: dict[str, Any] = {"rows": rows, "k": k, "n": n, "each": len(limit) > 1, "steps": length}
    arrays = [x, last, total, limit, step, *room(rows, k), np.zeros(rows, np.int32), np.zeros((rows, k), np.float32)]
    found = cuda_emulator.run_kernel(selection.changed(**sizes), *arrays)
    expected = on_cpu(of_cpu.changed(**sizes), *arrays)
    np.testing.assert_array_equal(found[8], expected[8])
    np.testing.assert_array_equal(found[9], expected[9])
    same_lists(found[5:8], expected[5:8])
    assert list(found[8]) == [0, 1, 1, 0]
