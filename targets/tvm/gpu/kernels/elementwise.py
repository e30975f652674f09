"""Activations of whole tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._scalar import activated
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue

_THREADS = 256


@cache
def activation(machine: Gpu, *, size: int | None, epilogue: Epilogue) -> Any:
    """Kernel `(x (size), y (size))`, float32, a value a thread.

    Args:
        machine: What it is for.
        size: Number of values; None for any.
        epilogue: What is done to each; it has no residual.
    """
    n = tirx.Var("size", "int64") if size is None else size

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), "float32")
        y = T.match_buffer(y_, (n,), "float32")
        for block in T.thread_binding(T.max((n + _THREADS - 1) // _THREADS, 1), thread="blockIdx.x"):
            for thread in T.thread_binding(_THREADS, thread="threadIdx.x"):
                i: T.let = block * _THREADS + thread
                if i < n:
                    y[i] = activated(x[i], epilogue)

    return kernel
