from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels.attention import attention
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels.attention import Layout

cuda_emulator.require()

RNG = np.random.default_rng(0)
GPU = Gpu(
    name="gpu", triple="x86_64-linux-gnu", cpu="x86-64", lanes=32, registers=64, dot="dp4a", arch="sm_87",
    multiprocessors=8,
)  # fmt: skip
ALL, NONE = Layout(q=True, k=True, v=True, out=True), Layout()


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def attended(q, k, v, scale, mask):
    scores = np.einsum("bhmd,bhnd->bhmn", q.astype(np.float64), k) * scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhmn,bhnd->bhmd", weights / weights.sum(-1, keepdims=True), v)


def swapped(x: np.ndarray, swap: bool) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3)) if swap else x


def kernel(sizes, layout, mask, symbolic) -> Any:
    _, heads, rows, keys, k_size, v_size = sizes
    return attention(
        GPU,
        heads=heads,
        rows=None if symbolic else rows,
        keys=None if symbolic else keys,
        k_size=k_size,
        v_size=v_size,
        scale=0.3,
        layout=layout,
        mask=mask,
    )


CASES = {
    "tiles": ((2, 3, 70, 90, 64, 64), NONE, None, False),
    "tiles of any size": ((1, 2, 37, 70, 64, 64), ALL, (False, True, True), True),
    "high tiles": ((1, 8, 65, 33, 8, 128), Layout(q=True, v=True), None, False),
    "low tiles": ((2, 2, 13, 131, 20, 40), Layout(k=True, out=True), (True, False, True), False),
    "odd channels": ((1, 1, 18, 21, 19, 41), NONE, (False, False, True), False),
    "wide values": ((1, 1, 9, 21, 12, 136), Layout(out=True), None, False),
    "one row": ((2, 3, 1, 300, 64, 64), ALL, (True, False, False), True),
    "one row of fixed size": ((1, 2, 1, 140, 64, 32), NONE, None, False),
    "few rows": ((1, 2, 5, 150, 16, 24), Layout(k=True), (True, True, True), True),
    "few rows and keys": ((2, 3, 3, 33, 64, 64), Layout(out=True), (False, False, True), False),
    "few rows of odd channels": ((1, 2, 2, 131, 7, 9), Layout(v=True), None, False),
    "few rows of many channels": ((1, 1, 2, 65, 264, 520), NONE, None, False),
    "many values of queries": ((1, 1, 8, 35, 520, 8), ALL, None, False),
}


def cases() -> list[tuple[str, Any]]:
    return [(f"attention, {name}", kernel(*case)) for name, case in CASES.items()]


@pytest.mark.parametrize("name", CASES)
def test_attention(name):
    sizes, layout, mask, _ = CASES[name]
    batch, heads, rows, keys, k_size, v_size = sizes
    q, k, v = (values(batch, heads, r, c) for r, c in ((rows, k_size), (keys, k_size), (keys, v_size)))
    inputs = [swapped(q, layout.q), swapped(k, layout.k), swapped(v, layout.v)]
    added: float | np.ndarray = 0.0
    if mask is not None:
        added = values(*(s if has else 1 for s, has in zip((batch, heads, rows), mask, strict=True)), keys)
        added[..., : keys // 2] = -np.inf  # whole tiles, before others
        inputs.append(added)
    expected = swapped(attended(q, k, v, 0.3, added), layout.out)
    *_, out = cuda_emulator.run_kernel(kernel(*CASES[name]), *inputs, np.zeros(expected.shape, np.float32))
    np.testing.assert_allclose(out, expected, atol=5e-6)


@pytest.mark.parametrize("rows", [6, 12])
def test_rows_of_a_mask_repeat_for_heads_that_share_keys(rows):
    q, k, v, mask = values(1, 2, rows, 16), values(1, 2, 19, 16), values(1, 2, 19, 16), values(1, 1, 3, 19)
    function = kernel((1, 2, rows, 19, 16, 16), NONE, (False, False, True), False)
    expected = attended(q, k, v, 0.3, np.tile(mask, (1, 1, rows // 3, 1)))
    *_, out = cuda_emulator.run_kernel(function, q, k, v, mask, np.zeros(q.shape, np.float32))
    np.testing.assert_allclose(out, expected, atol=5e-6)


@pytest.mark.parametrize("rows", [0, 9])
def test_empty_batches_and_rows(rows):
    function = kernel((0, 2, rows, 19, 16, 16), NONE, None, True)
    q, k = values(0 if rows else 1, 2, rows, 16), values(0 if rows else 1, 2, 19, 16)
    assert cuda_emulator.run_kernel(function, q, k, k, np.zeros(q.shape, np.float32))[-1].size == 0


@pytest.mark.parametrize("name", ["low tiles", "few rows", "few rows and keys"])
def test_only_rows_with_values_that_are_no_numbers_or_where_all_is_masked_get_them(name):
    sizes, layout, mask, _ = CASES[name]
    batch, heads, rows, keys, k_size, v_size = sizes
    q, k, v = (values(batch, heads, r, c) for r, c in ((rows, k_size), (keys, k_size), (keys, v_size)))
    added = values(*(s if has else 1 for s, has in zip((batch, heads, rows), mask, strict=True)), keys)
    added[:, :, 0] = -np.inf
    q[0, 0, 1, 0] = np.nan
    with np.errstate(invalid="ignore"):
        expected = swapped(attended(q, k, v, 0.3, added), layout.out)
    inputs = [swapped(q, layout.q), swapped(k, layout.k), swapped(v, layout.v), added]
    *_, out = cuda_emulator.run_kernel(kernel(*CASES[name]), *inputs, np.zeros(expected.shape, np.float32))
    np.testing.assert_allclose(out, expected, atol=5e-6)
