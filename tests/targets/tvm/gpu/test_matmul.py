from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels.matmul import matmul
from onnxcomp.targets.tvm.gpu.machine import Gpu

cuda_emulator.require()

RNG = np.random.default_rng(0)
GPU = Gpu(
    name="gpu", triple="x86_64-linux-gnu", cpu="x86-64", lanes=32, registers=64, dot="dp4a", arch="sm_87",
    multiprocessors=8,
)  # fmt: skip
BOTH = (True,)

CASES = {
    "tiles": ((2, 3), (True, True), (True, False), 13, 20, 36, False),
    "tiles of odd sizes": ((3, 2), (False, True), (True, True), 37, 11, 39, False),
    "tiles of any size": ((3,), BOTH, BOTH, 29, 21, 33, True),
    "tiles that share the inner dimension": ((1,), BOTH, BOTH, 20, 700, 20, False),
    "few rows": ((2, 3), (False, True), (True, True), 3, 21, 68, False),
    "few rows of odd sizes": ((4,), BOTH, (False,), 6, 33, 19, False),
    "few rows of any size": ((2, 2), (True, True), (True, False), 5, 90, 33, True),
    "few rows that share the inner dimension": ((1,), BOTH, BOTH, 2, 1030, 24, False),
    "one row": ((3,), BOTH, BOTH, 1, 1100, 40, True),
    "no inner dimension": ((2,), BOTH, BOTH, 2, 0, 9, True),
    "no inner dimension, fixed": ((2,), BOTH, BOTH, 2, 0, 9, False),
    "no inner dimension of tiles": ((2,), BOTH, BOTH, 9, 0, 9, False),
}


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def kernel(case: Any, turned: bool) -> Any:
    outer, x_has, w_has, m, k, n, symbolic = case
    return matmul(
        GPU,
        outer=tuple(None if symbolic else s for s in outer),
        x_has=x_has,
        w_has=w_has,
        rows=None if symbolic else m,
        k=None if symbolic else k,
        n=None if symbolic else n,
        turned=turned,
        alpha=0.5,
    )


def cases() -> list[tuple[str, Any]]:
    found = [(f"matmul, {name}", kernel(case, False)) for name, case in CASES.items()]
    return found + [(f"matmul, turned, {name}", kernel(case, True)) for name, case in CASES.items()]


@pytest.mark.parametrize(
    ("name", "turned"),
    [(name, turned) for name in CASES for turned in (False, True) if not turned or "share" not in name],
)
def test_matmul(name, turned):
    outer, x_has, w_has, m, k, n, _ = CASES[name]
    x = values(*(s if has else 1 for s, has in zip(outer, x_has, strict=True)), m, k)
    w = values(*(s if has else 1 for s, has in zip(outer, w_has, strict=True)), k, n)
    given = np.ascontiguousarray(np.swapaxes(w, -1, -2)) if turned else w
    *_, y = cuda_emulator.run_kernel(kernel(CASES[name], turned), x, given, np.ones((*outer, m, n), np.float32))
    np.testing.assert_allclose(y, 0.5 * (x.astype(np.float64) @ w), rtol=0, atol=3e-6 * max(k, 4) ** 0.5)


@pytest.mark.parametrize(("batch", "m", "n"), [(0, 2, 3), (2, 0, 3), (2, 9, 0)])
def test_nothing(batch, m, n):
    function = matmul(GPU, outer=(None,), x_has=BOTH, w_has=BOTH, rows=None, k=8, n=None)
    given = (np.zeros(s, np.float32) for s in ((batch, m, 8), (batch, 8, n), (batch, m, n)))
    assert cuda_emulator.run_kernel(function, *given)[-1].size == 0
