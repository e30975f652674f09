"""Numbers in a row, as many as a size that is not known before the model runs."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

_THREADS = 128


@cache
def numbers(step: int) -> Any:
    """Kernel `(start, y (n,))` of int64: `start`, `start + step`, and so on."""
    n = tirx.Var("n", "int64")

    @T.prim_func
    def kernel(start: T.int64, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        y = T.match_buffer(y_, (n,), "int64")
        for block in T.thread_binding(T.max((n + _THREADS - 1) // _THREADS, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < n:
                    y[i] = start + i * T.int64(step)

    return kernel
