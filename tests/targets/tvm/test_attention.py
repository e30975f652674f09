from __future__ import annotations

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm_harness import BY_LANE, machines, run_kernel  # noqa: E402

from onnxcomp.targets.tvm.kernels.attention import Layout, attention  # noqa: E402
from onnxcomp.targets.tvm.kernels.matmul import matmul  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402

RNG = np.random.default_rng(0)
A76 = Machine(
    name="a76", triple="aarch64-linux-gnu", cpu="cortex-a76", features=("+dotprod",), lanes=4, registers=32, dot="sdot"
)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def attended(q, k, v, scale, mask):
    scores = np.einsum("bhmd,bhnd->bhmn", q.astype(np.float64), k) * scale + mask
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhmn,bhnd->bhmd", weights / weights.sum(-1, keepdims=True), v)


def swapped(x: np.ndarray, swap: bool) -> np.ndarray:
    return x.transpose(0, 2, 1, 3) if swap else x


ALL, NONE = Layout(q=True, k=True, v=True, out=True), Layout()


@pytest.mark.parametrize(
    ("sizes", "layout", "mask", "symbolic", "machine"),
    [
        ((2, 3, 13, 21, 64, 64), NONE, None, False, machines()[-1]),
        ((2, 3, 13, 21, 64, 64), NONE, None, True, machines()[0]),
        ((1, 6, 29, 37, 64, 64), ALL, None, False, machines()[-1]),
        ((2, 2, 13, 21, 20, 40), Layout(k=True, out=True), (True, False, True), True, machines()[-1]),
        ((1, 3, 3, 33, 64, 64), Layout(out=True), (False, False, True), True, machines()[-1]),
        ((2, 2, 13, 21, 20, 40), Layout(k=True, out=True), (True, False, True), True, BY_LANE),
        ((1, 3, 3, 33, 64, 64), Layout(out=True), (False, False, True), False, machines()[0]),
        ((1, 3, 7, 33, 64, 64), NONE, (False, True, False), False, machines()[-1]),
        ((1, 2, 5, 5, 64, 16), Layout(q=True, v=True), None, False, machines()[-1]),
    ],
)
def test_attention(sizes, layout, mask, symbolic, machine):
    batch, heads, rows, keys, k_size, v_size = sizes
    q, k, v = (values(batch, heads, r, c) for r, c in ((rows, k_size), (keys, k_size), (keys, v_size)))
    function = attention(
        machine,
        heads=heads,
        rows=None if symbolic else rows,
        keys=None if symbolic else keys,
        k_size=k_size,
        v_size=v_size,
        scale=0.3,
        layout=layout,
        mask=mask,
    )
    inputs = [swapped(q, layout.q), swapped(k, layout.k), swapped(v, layout.v)]
    added: float | np.ndarray = 0.0
    if mask is not None:
        added = values(*(s if has else 1 for s, has in zip((batch, heads, rows), mask, strict=True)), keys)
        added[..., -1] = -np.inf
        inputs.append(added)
    expected = swapped(attended(q, k, v, 0.3, added), layout.out)
    np.testing.assert_allclose(run_kernel(function, machine, *inputs, shape=expected.shape), expected, atol=5e-6)


def test_rows_of_a_mask_repeat_for_heads_that_share_keys():
    machine = machines()[-1]
    q, k, v, mask = values(1, 2, 6, 16), values(1, 2, 19, 16), values(1, 2, 19, 16), values(1, 1, 3, 19)
    sizes = {"heads": 2, "rows": 6, "keys": 19, "k_size": 16, "v_size": 16}
    function = attention(machine, **sizes, scale=1.0, layout=NONE, mask=(False, False, True))
    expected = attended(q, k, v, 1.0, np.tile(mask, (1, 1, 2, 1)))
    np.testing.assert_allclose(run_kernel(function, machine, q, k, v, mask, shape=q.shape), expected, atol=5e-6)


@pytest.mark.parametrize(
    ("machine", "turned"), [(machines()[-1], False), (machines()[0], True), (BY_LANE, True), (BY_LANE, False)]
)
@pytest.mark.parametrize(
    ("outer", "x_has", "w_has", "m", "k", "n", "symbolic"),
    [
        ((2, 3), (True, True), (True, False), 13, 7, 37, False),
        ((2, 3), (False, True), (True, True), 3, 21, 45, False),
        ((4,), (True,), (True,), 29, 20, 64, True),
        ((4,), (True,), (True,), 5, 33, 19, True),
        ((4,), (True,), (False,), 6, 1, 70, False),
    ],
)
def test_matmul(machine, turned, outer, x_has, w_has, m, k, n, symbolic):
    x = values(*(s if has else 1 for s, has in zip(outer, x_has, strict=True)), m, k)
    w = values(*(s if has else 1 for s, has in zip(outer, w_has, strict=True)), k, n)
    function = matmul(
        machine,
        outer=tuple(None if symbolic else s for s in outer),
        x_has=x_has,
        w_has=w_has,
        rows=None if symbolic else m,
        k=None if symbolic else k,
        n=None if symbolic else n,
        turned=turned,
        alpha=0.5,
    )
    y = run_kernel(function, machine, x, np.swapaxes(w, -1, -2) if turned else w, shape=(*outer, m, n))
    np.testing.assert_allclose(y, 0.5 * (x.astype(np.float64) @ w), atol=1e-5)


def test_kernels_compile_for_arm():
    sizes = {"heads": 2, "rows": None, "keys": None, "k_size": 64, "v_size": 64}
    function = attention(A76, **sizes, scale=1.0, layout=ALL, mask=(False, False, True))
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    assert "fmla" in tvm.compile(module, target=A76.target()).mod.inspect_source("asm")
