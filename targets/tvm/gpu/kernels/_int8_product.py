"""Products of rows of 8-bit integers and a packed matrix, in the form that suits the number of rows."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dp4a import Rows
from onnxcomp.targets.tvm.gpu.kernels._dp4a_few import FEW, few
from onnxcomp.targets.tvm.gpu.kernels._dp4a_many import many
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats


def product(machine: Gpu, panels: Panels, rows: int | None, m: Any, source: Rows, output: Codes | Floats) -> Any:
    """A macro `(x, w, offset, affine, residual, y)` that makes all rows of a product.

    Args:
        machine: What it is for.
        panels: Of the weight.
        rows: Rows; None for any number.
        m: Rows, as an expression.
        source: The rows.
        output: What is stored.
    """
    if rows is not None:
        return (few if rows <= FEW else many)(machine, panels, rows, m, source, output)
    m = T.Cast("int32", m)
    light, heavy = (form(machine, panels, None, m, source, output) for form in (few, many))

    @T.inline
    def body(x, w, o, a, r, y):
        if m <= FEW:
            light(x, w, o, a, r, y)
        else:
            heavy(x, w, o, a, r, y)

    return body
