"""Concatenation on a GPU, by the emulator."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")

import cuda_emulator

from onnxcomp.targets.tvm.gpu.kernels.concat import concat
from onnxcomp.targets.tvm.gpu.machine import Gpu

GPU = Gpu(
    name="small",
    triple="x86_64-linux-gnu",
    cpu="x86-64",
    lanes=32,
    registers=64,
    dot="dp4a",
    arch="sm_87",
    multiprocessors=1,
)


def cases():
    """Name and kernel of each, to compile."""
    yield "concat_fixed", concat(GPU, rows=3, first=5, second=2)
    yield "concat", concat(GPU, rows=None, first=None, second=None)


@pytest.mark.parametrize(("rows", "first", "second"), [(3, 5, 2), (2, 0, 3), (0, 1, 1), (2, 1030, 7)])
def test_kernel_concatenates(rows, first, second):
    cuda_emulator.require()
    rng = np.random.default_rng(0)
    a = rng.standard_normal((rows, first)).astype(np.float32)
    b = rng.standard_normal((rows, second)).astype(np.float32)
    functions = [concat(GPU, rows=None, first=None, second=None)]
    if rows == 3:
        functions.append(concat(GPU, rows=rows, first=first, second=second))
    for function in functions:
        *_, got = cuda_emulator.run_kernel(function, a, b, np.full((rows, first + second), 77, np.float32))
        np.testing.assert_array_equal(got, np.concatenate([a, b], axis=1))
