"""Products of 8-bit activations and a constant matrix of 8-bit integers. See `_int8_product`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import Rows, assembled, byte
from onnxcomp.targets.tvm.gpu.kernels._int8_product import product
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels import int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats


@cache
def gemm(machine: Gpu, *, rows: int | None, k: int, n: int, dtype: str, output: Codes | Floats) -> Any:
    """Kernel `(x (rows, K), weight, offset, affine[, residual (rows, N)], y (rows, N))`.

    Arguments and packing are those of the kernel for CPUs. Where K is no multiple of four, rows do not start at words:
    then they are read by the byte.
    """
    panels = Panels(machine=machine, n=n)
    count, columns = panels.count, panels.columns
    flipped = int8_dot.flipped(machine, dtype)
    m = tirx.Var("rows", "int64") if rows is None else rows

    def word(x: Any, place: Sequence[Any], group: Any) -> Any:
        if k % 4 == 0:
            found = T.reinterpret("int32", x[place[0], T.ramp(group * 4, 1, 4)])
        else:
            found = assembled(
                [T.if_then_else(group * 4 + c < k, byte(x[place[0], group * 4 + c]), T.int32(0)) for c in range(4)]
            )
        return int8_dot.flip(found) if flipped else found

    source = Rows(groups=-(-k // 4), places=1, place=lambda row: (row,), word=word)
    body = product(machine, panels, rows, m, source, output)
    weight_shape = panels.shape(k)

    if output.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            r = T.match_buffer(r_, (m, n), output.dtype)
            y = T.match_buffer(y_, (m, n), output.dtype)
            body(x, w, o, a, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, o_: T.handle, a_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (m, k), dtype)
            w = T.match_buffer(w_, weight_shape, "int8")
            o = T.match_buffer(o_, (count * columns,), "int32")
            a = T.match_buffer(a_, (2, count * columns), "float32")
            y = T.match_buffer(y_, (m, n), output.dtype)
            body(x, w, o, a, y, y)

    return kernel
