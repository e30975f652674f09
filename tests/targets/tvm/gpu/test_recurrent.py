from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels import gates
from onnxcomp.targets.tvm.gpu.kernels.recurrent import recurrent
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels.recurrent import GATES, Cell, pack

cuda_emulator.require()

RNG = np.random.default_rng(0)
SIZES = {"lanes": 32, "registers": 64, "dot": "dp4a", "arch": "sm_87"}
GPU = Gpu(name="gpu", triple="x86_64-linux-gnu", cpu="x86-64", multiprocessors=8, **SIZES)
CELLS = {
    "GRU": Cell(
        kind="GRU", steps=3, rows=5, units=33, directions=2, direction=1, reverse=True, linear_before_reset=True
    ),
    "late GRU": Cell(
        kind="GRU", steps=2, rows=1, units=7, directions=1, direction=0, reverse=False, linear_before_reset=False
    ),
    "LSTM": Cell(
        kind="LSTM", steps=3, rows=2, units=20, directions=1, direction=0, reverse=False, linear_before_reset=False
    ),
    "GRU of a launch a step": Cell(
        kind="GRU", steps=2, rows=1, units=130, directions=1, direction=0, reverse=False, linear_before_reset=True
    ),
    "late GRU of launches": Cell(
        kind="GRU", steps=2, rows=1, units=150, directions=1, direction=0, reverse=True, linear_before_reset=False
    ),
    "LSTM of a launch a step": Cell(
        kind="LSTM", steps=2, rows=6, units=140, directions=2, direction=1, reverse=False, linear_before_reset=False
    ),
}


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gru(xs, hs, h, product=None):
    (xz, xr, xn), (hz, hr, hn) = (np.split(s.astype(np.float64), 3, axis=1) for s in (xs, hs))
    update, reset = sigmoid(xz + hz), sigmoid(xr + hr)
    fresh = np.tanh(xn + reset * hn) if product is None else np.tanh(xn + product(reset * h))
    return (1 - update) * fresh + update * h


def lstm(sums, c):
    i, o, f, g = np.split(sums.astype(np.float64), 4, axis=1)
    cell = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def cases() -> list[tuple[str, Any]]:
    found = [(f"recurrent, {name}", recurrent(GPU, cell)) for name, cell in CELLS.items()]
    return [
        *found,
        ("gates, GRU", gates.gru(GPU, rows=None, units=9)),
        ("gates, LSTM", gates.lstm(GPU, rows=3, units=50)),
    ]


@pytest.mark.parametrize("name", CELLS)
def test_layers(name):
    cell = CELLS[name]
    count, units, rows = GATES[cell.kind] * cell.units, cell.units, cell.rows
    xs, weight = values(cell.steps, rows, cell.directions * count), values(count, units) / np.sqrt(np.float32(units))
    x_bias, h_bias = values(count), values(count)
    states = [values(cell.directions, rows, units) for _ in range(1 + (cell.kind == "LSTM"))]
    h, *c = (s[cell.direction].astype(np.float64) for s in states)
    expected = np.zeros((cell.steps, rows, units))
    for t in range(cell.steps)[:: -1 if cell.reverse else 1]:
        of_x = xs[t, :, cell.direction * count : (cell.direction + 1) * count] + x_bias
        of_h = h @ weight.T + h_bias
        if c:
            h, c[0] = lstm(of_x + of_h, c[0])
        elif cell.linear_before_reset:
            h = gru(of_x, of_h, h)
        else:
            h = gru(of_x, of_h, h, lambda v: v @ weight[2 * units :].T + h_bias[2 * units :])
        expected[t] = h
    outputs = [np.zeros(s, np.float32) for s in (expected.shape, *[(rows, units)] * (1 + len(c)))]
    found = cuda_emulator.run_kernel(recurrent(GPU, cell), xs, *states, pack(GPU, weight), x_bias, h_bias, *outputs)
    for one, right in zip(found[-len(outputs) :], (expected, h, *c), strict=True):
        np.testing.assert_allclose(one, right, rtol=0, atol=2e-6)


@pytest.mark.parametrize("wide", [4, 16, 60])
def test_blocks_are_narrow_enough_to_fill_the_gpu(wide):
    machine = Gpu(name="gpu", triple="x86_64-linux-gnu", cpu="x86-64", multiprocessors=wide, **SIZES)
    cell = Cell(
        kind="LSTM", steps=1, rows=1, units=130, directions=1, direction=0, reverse=False, linear_before_reset=False
    )
    xs, h, c, weight, bias = values(1, 1, 520), values(1, 1, 130), values(1, 1, 130), values(520, 130) / 11, values(520)
    outputs = [np.zeros(s, np.float32) for s in ((1, 1, 130), (1, 130), (1, 130))]
    found = cuda_emulator.run_kernel(recurrent(machine, cell), xs, h, c, pack(machine, weight), bias, bias, *outputs)
    expected = lstm(xs[0] + h[0] @ weight.T + 2 * bias, c[0])
    for one, right in zip(found[-2:], expected, strict=True):
        np.testing.assert_allclose(one, right, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "fixed"), [(3, False), (2, True), (0, False)])
def test_gru_gates(rows, fixed):
    a, b, p, q, h = values(rows, 150), values(rows, 150), values(150), values(150), values(rows, 50)
    function = gates.gru(GPU, rows=rows if fixed else None, units=50)
    *_, y = cuda_emulator.run_kernel(function, a, b, p, q, h, np.zeros_like(h))
    np.testing.assert_allclose(y, gru(a + p, b + q, h), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("rows", "fixed"), [(3, False), (2, True)])
def test_lstm_gates(rows, fixed):
    a, b, p, c = values(rows, 200), values(rows, 200), values(200), values(rows, 50)
    function = gates.lstm(GPU, rows=rows if fixed else None, units=50)
    *_, y, cell, total = cuda_emulator.run_kernel(function, a, b, p, c, c * 0, c * 0, a * 0)
    np.testing.assert_array_equal(total, a + b)
    for one, right in zip((y, cell), lstm(a + b + p, c), strict=True):
        np.testing.assert_allclose(one, right, rtol=0, atol=1e-6)
