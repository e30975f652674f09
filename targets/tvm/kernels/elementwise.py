"""Activations of whole tensors."""

from __future__ import annotations

from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.machine import Machine

_CHUNK = 128
"""Vectors that a thread takes at a time."""


@cache
def activation(machine: Machine, *, size: int | None, epilogue: Epilogue) -> Any:
    """Kernel `(x (size), y (size))`, float32.

    Args:
        machine: What it is for.
        size: Number of values; None for any.
        epilogue: What is done to each; it has no residual.
    """
    lanes = machine.lanes
    n = tirx.Var("size", "int64") if size is None else size
    vectors = n // lanes
    chunks = vectors // _CHUNK

    @T.inline
    def by_vectors(x, y):
        for chunk in T.parallel(chunks):
            for j in T.serial(_CHUNK):
                y[T.ramp((chunk * _CHUNK + j) * lanes, 1, lanes)] = epilogue(
                    x[T.ramp((chunk * _CHUNK + j) * lanes, 1, lanes)]
                )
        for j in T.serial(vectors % _CHUNK):
            y[T.ramp((chunks * _CHUNK + j) * lanes, 1, lanes)] = epilogue(
                x[T.ramp((chunks * _CHUNK + j) * lanes, 1, lanes)]
            )
        if n % lanes != 0:
            # The last vector overlaps the one before it.
            y[T.ramp(n - lanes, 1, lanes)] = epilogue(x[T.ramp(n - lanes, 1, lanes)])

    @T.inline
    def by_values(x, y):
        for j in T.serial(n):
            y[j] = epilogue(x[j])

    @T.prim_func
    def kernel(x_: T.handle, y_: T.handle):
        T.func_attr({"tirx.noalias": True})
        x = T.match_buffer(x_, (n,), "float32")
        y = T.match_buffer(y_, (n,), "float32")
        if size is None:
            if n >= lanes:
                by_vectors(x, y)
            else:
                by_values(x, y)
        elif size >= lanes:
            by_vectors(x, y)
        else:
            by_values(x, y)

    return kernel
