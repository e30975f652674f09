"""Products of float32 on a GPU, by the emulator."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels import _dense_many
from onnxcomp.targets.tvm.gpu.kernels import gemm as gpu_gemm
from onnxcomp.targets.tvm.gpu.kernels._tile import TILES
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import gemm
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue


def _gpu(multiprocessors):
    return Gpu(
        name="small",
        triple="x86_64-linux-gnu",
        cpu="x86-64",
        lanes=32,
        registers=64,
        dot="dp4a",
        arch="sm_87",
        multiprocessors=multiprocessors,
    )


SMALL, LARGE = _gpu(1), _gpu(64)
PLAIN, SCALED = Epilogue(), Epilogue(residual=True, activation="leaky_relu", alpha=0.25)

CASES = [
    # machine, rows as compiled, rows as run, inputs, outputs, epilogue
    (SMALL, 0, 0, 8, 5, PLAIN),
    (SMALL, 1, 1, 8, 5, PLAIN),
    (SMALL, 1, 1, 1203, 70, SCALED),  # whole steps and a rest, an inner dimension that is no multiple of 4
    (LARGE, 3, 3, 2052, 36, SCALED),  # split
    (SMALL, 16, 16, 300, 130, PLAIN),
    (SMALL, 17, 17, 37, 9, PLAIN),
    (LARGE, 70, 70, 519, 66, SCALED),  # split
    *((LARGE, None, rows, 516, 20, SCALED) for rows in (0, 1, 13, 31, 131)),
]


def cases():
    """Name and kernel of each, to compile."""
    for machine, rows, k, n, epilogue in {(case[0], case[1], *case[3:]) for case in CASES}:
        yield f"gemm_{rows}_{k}_{n}", gpu_gemm.gemm(machine, rows=rows, k=k, n=n, epilogue=epilogue)
    for activation in ("gelu", "silu", "tanh"):
        yield activation, gpu_gemm.gemm(LARGE, rows=128, k=4096, n=4096, epilogue=Epilogue(activation=activation))


@pytest.mark.parametrize("case", CASES)
def test_kernel_multiplies(case):
    machine, fixed, rows, k, n, epilogue = case
    _check(gpu_gemm.gemm(machine, rows=fixed, k=k, n=n, epilogue=epilogue), machine, rows, k, n, epilogue)


@pytest.mark.parametrize("tile", [tile for tile, _ in TILES])
def test_product_by_each_tile(tile, monkeypatch):
    monkeypatch.setattr(_dense_many, "choose", lambda *_: (tile, 2 * tile.depth * (1 if tile.high == 8 else 4)))
    rows, k, n = tile.rows + 3, 4 * tile.depth - 4, tile.columns + 5 - tile.high // 8  # split if tiles are high
    _check(gpu_gemm.gemm.__wrapped__(SMALL, rows=rows, k=k, n=n, epilogue=SCALED), SMALL, rows, k, n, SCALED)


def _check(function, machine, rows, k, n, epilogue):
    cuda_emulator.require()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    weight = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(np.float32)
    bias, added = rng.standard_normal(n).astype(np.float32), rng.standard_normal((rows, n)).astype(np.float32)
    expected = x.astype(np.float64) @ weight + bias
    if epilogue.residual:
        expected = expected + added
        expected = np.where(expected < 0, expected * epilogue.alpha, expected)
    inputs = [x, gemm.pack(machine, weight), gemm.pack_bias(machine, bias, n), *([added] if epilogue.residual else [])]
    *_, got = cuda_emulator.run_kernel(function, *inputs, np.full((rows, n), 77, np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=4e-6)
