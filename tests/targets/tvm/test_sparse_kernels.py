"""Kernels that read some rows of a weight, against numpy, on vectors of each width and sizes that fill none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

tvm = pytest.importorskip("tvm")

from tvm_harness import X86, compiled, machines, run_kernel, tensor  # noqa: E402

from onnxcomp.cpu import cpu_flags  # noqa: E402
from onnxcomp.ops._weights import INT4  # noqa: E402
from onnxcomp.targets.tvm.kernels import gated_mlp, gates, int4, selection, sparse_rows  # noqa: E402
from onnxcomp.targets.tvm.machine import Machine  # noqa: E402

A76 = Machine(
    name="a76", triple="aarch64-linux-gnu", cpu="cortex-a76", features=("+dotprod",), lanes=4, registers=32, dot="sdot"
)
each_machine = pytest.mark.parametrize("machine", machines(), ids=lambda m: m.name)


def fixed_point() -> list[Machine]:
    """Those that multiply fixed-point numbers."""
    found = [m for m in machines() if m.dot.startswith("vnni")]
    if "avx_vnni" in cpu_flags():
        found.append(Machine(name="avxvnni", triple=X86, cpu="alderlake", lanes=8, registers=16, dot="vnni256"))
    return found


Lists = tuple[np.ndarray, np.ndarray, np.ndarray]


def several(function: Any, machine: Machine, inputs: list[np.ndarray], outputs: list[np.ndarray]) -> list[np.ndarray]:
    """What a kernel fills its outputs with."""
    given = [tensor(out) for out in outputs]
    compiled(function, machine)(*map(tensor, inputs), *given)
    return [out.numpy() for out in given]


def room(rows: int, k: int) -> list[np.ndarray]:
    return [np.zeros((rows, k), np.float32), np.zeros((rows, k), np.int32), np.zeros(rows, np.int32)]


def kept_lists(rows: int, k: int) -> tuple[np.ndarray, Lists]:
    """Activations of which some are zero, and the others as lists."""
    rng = np.random.default_rng(k)
    dropped = np.array([0.5, 0.9, 0.1])[np.arange(rows) // 4 % 3, None]
    x = np.where(rng.random((rows, k)) < dropped, 0, rng.standard_normal((rows, k))).astype(np.float32)
    values, places, counts = room(rows, k)
    for row in range(rows):
        found = np.flatnonzero(x[row])
        counts[row] = len(found)
        places[row, : len(found)], values[row, : len(found)] = found, x[row, found]
    return x, (values, places, counts)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1, np.abs(expected).max()))


@each_machine
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 5, 1), (3, 130, 4180), (7, 33, 1100), (11, 40, 70), (41, 133, 70)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_sums_of_rows(machine: Machine, rows: int, k: int, n: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, lists = kept_lists(rows, k)
    w = (rng.standard_normal((k, n)) * 40).astype(dtype)
    scale = rng.uniform(0.1, 1, n).astype(np.float32)
    expected = x.astype(np.float64) @ w * scale
    function = sparse_rows.sum_rows(machine, rows=None if rows == 7 else rows, k=k, n=n, dtype=dtype)
    close(run_kernel(function, machine, *lists, w, scale, shape=(rows, n)), expected)
    if rows > 3:
        return
    total, afresh = rng.standard_normal((rows, n)).astype(np.float32), np.arange(rows, dtype=np.int32) % 2
    function = sparse_rows.sum_rows(machine, rows=rows, k=k, n=n, dtype=dtype, carried=True)
    found = run_kernel(function, machine, *lists, w, scale, afresh, total, shape=(rows, n))
    close(found, expected + total * (1 - afresh[:, None]))


@each_machine
@pytest.mark.parametrize(("scale", "zeros", "rows"), [("float16", True, 2), ("float32", False, 41)])
def test_sums_of_int4_rows_and_neurons(machine: Machine, scale: str, zeros: bool, rows: int) -> None:
    if scale == "float16" and machine.lanes < 8:
        scale = "float32"  # as lowering stores them
    rng = np.random.default_rng(0)
    k, n = 70, 4256
    x, lists = kept_lists(rows, k)
    w = rng.integers(0, 256, (k, n // 2)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.02, (k, n // 32)).astype(scale)
    zero = rng.integers(0, 16, scales.shape if zeros else 1).astype(np.uint8)
    matrix = INT4.dequantize(w, scales, zero if zeros else zero[0], np.float64)
    words = int4.pack_int4(machine, w)
    function = sparse_rows.sum_rows_int4(machine, rows=None, k=k, n=n, scale=scale, zeros=zeros)
    close(run_kernel(function, machine, *lists, words, scales, zero, shape=(rows, n)), x @ matrix)
    values, places, counts = lists
    wide = rng.standard_normal((rows, n)).astype(np.float32)
    function = gated_mlp.neurons_int4(machine, rows=rows, k=n, f=k, scale=scale, zeros=zeros)
    words = gated_mlp.pack_neurons_int4(machine, w)
    found = run_kernel(function, machine, *lists, wide, words, scales, zero, shape=(rows, k))
    for row in range(rows):
        here = places[row, : counts[row]]
        close(found[row, : counts[row]], values[row, : counts[row]] * (matrix @ wide[row])[here])


@pytest.mark.parametrize("machine", fixed_point(), ids=lambda m: m.name)
def test_int4_neurons_of_inputs_that_differ_in_magnitude(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    k, f = 160, 9
    w = rng.integers(0, 256, (f, k // 2)).astype(np.uint8)
    scales = rng.uniform(0.005, 0.02, (f, k // 32)).astype(np.float16)
    zero = np.array([8], np.uint8)
    x = np.zeros((2, k), np.float32)
    x[0] = rng.standard_normal(k) * np.repeat([1e-38, 1e-25, 1, 1e3, 1e20], 32)
    x[0, 70] = 1e6
    x[1, 40] = np.inf
    lists = np.ones((2, f), np.float32), np.tile(np.arange(f, dtype=np.int32), (2, 1)), np.full(2, f, np.int32)
    function = gated_mlp.neurons_int4(machine, rows=2, k=k, f=f, scale="float16", zeros=False)
    words = gated_mlp.pack_neurons_int4(machine, w)
    for wide in (k, 96):  # the second without what all else is lost beside
        x[0, wide:] = 0
        found = run_kernel(function, machine, *lists, x, words, scales, zero, shape=(2, f))
        expected = INT4.dequantize(w, scales, zero[0], np.float64) @ x[0]
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
        assert not np.isfinite(found[1]).any()


@each_machine
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_neurons(machine: Machine, dtype: str) -> None:
    rng = np.random.default_rng(0)
    rows, k, f = 2, 167, 41
    _, (gate, places, counts) = kept_lists(rows, f)
    x, scale = rng.standard_normal((rows, k)).astype(np.float32), rng.uniform(0.1, 1, f).astype(np.float32)
    up = (rng.standard_normal((f, k)) * 40).astype(dtype)
    function = gated_mlp.neurons(machine, rows=None, k=k, f=f, dtype=dtype)
    found = run_kernel(function, machine, gate, places, counts, x, up, scale, shape=(rows, f))
    for row in range(rows):
        here = places[row, : counts[row]]
        close(found[row, : counts[row]], gate[row, : counts[row]] * (scale * (up @ x[row].astype(np.float64)))[here])


@each_machine
@pytest.mark.parametrize("one_sided", [False, True])
def test_what_is_above_a_threshold(machine: Machine, one_sided: bool) -> None:
    x = np.random.default_rng(0).standard_normal((3, 41)).astype(np.float32)
    x[1] = 0
    x[2, 7] = np.nan
    function = selection.above(rows=None, k=41, each=False, one_sided=one_sided)
    values, places, counts = several(function, machine, [x, np.array([0.5], np.float32)], room(3, 41))
    for row in range(3):
        wanted = np.flatnonzero(~((x[row] if one_sided else np.abs(x[row])) <= 0.5))
        np.testing.assert_array_equal(places[row, : counts[row]], wanted)
        np.testing.assert_array_equal(values[row, : counts[row]], x[row, wanted])


@each_machine
@pytest.mark.parametrize("count", [0, 1, 7, 41, 50])
def test_the_largest(machine: Machine, count: int) -> None:
    x = np.random.default_rng(0).integers(-4, 5, (2, 41)).astype(np.float32)
    x[1, 30:33] = np.nan, np.inf, 1e-42
    function = selection.largest(rows=2, k=41)
    _, places, counts = several(function, machine, [x, np.array([count], np.int32)], room(2, 41))
    for row in range(2):
        order = np.lexsort((-np.abs(x[row]), ~np.isnan(x[row])))[:count]
        np.testing.assert_array_equal(places[row, : counts[row]], np.sort(order))


@each_machine
def test_gates(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    units, rows = 21, 2

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    a, b = (rng.standard_normal((rows, 4 * units)).astype(np.float32) for _ in range(2))
    p, state = rng.standard_normal(4 * units).astype(np.float32), rng.standard_normal((rows, units)).astype(np.float32)
    i, o, f, c = np.split(a + b + p, 4, axis=1)
    outputs = [np.zeros((rows, units), np.float32)] * 2 + [np.zeros_like(a)]
    y, cell, total = several(gates.lstm(machine, rows=rows, units=units), machine, [a, b, p, state], outputs)
    close(cell, sigmoid(f) * state + sigmoid(i) * np.tanh(c))
    close(y, sigmoid(o) * np.tanh(cell))
    close(total, a + b)
    a, b, p = (v[..., : 3 * units].copy() for v in (a, b, p))
    (xz, xr, xn), (hz, hr, hn) = np.split(a + p, 3, axis=1), np.split(b, 3, axis=1)
    inputs = [a, b, p, np.zeros_like(p), state]
    found = run_kernel(gates.gru(machine, rows=rows, units=units), machine, *inputs, shape=(rows, units))
    z = sigmoid(xz + hz)
    close(found, (1 - z) * np.tanh(xn + sigmoid(xr + hr) * hn) + z * state)


def test_they_compile_for_arm() -> None:
    for function in (
        sparse_rows.sum_rows(A76, rows=1, k=64, n=100, dtype="int8", carried=True),
        sparse_rows.sum_rows_int4(A76, rows=1, k=64, n=96, scale="float32", zeros=True),
        gated_mlp.neurons(A76, rows=1, k=64, f=40, dtype="int8"),
        selection.changed(rows=1, k=64, n=40, each=True, steps=64),
        selection.largest(rows=1, k=64),
        sparse_rows.sum_rows(A76, rows=None, k=64, n=100, dtype="int8"),
        gates.gru(A76, rows=1, units=40),
    ):
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        tvm.compile(module, target=A76.target())
