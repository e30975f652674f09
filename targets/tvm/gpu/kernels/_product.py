"""Float32 products of any number of rows, as gemm and conv are.

A product of few rows reads its weight once and is bound by memory, see `_dense_few`; one of many is cut into tiles, see
`_dense_many`. Where their number is not known, it is looked at before the launch.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dense import Product
from onnxcomp.targets.tvm.gpu.kernels._dense_few import few
from onnxcomp.targets.tvm.gpu.kernels._dense_many import many

_FEW = 16
"""Rows of a product that is bound by memory, at most."""

_HIGHEST = 8
"""Rows of a block of such a product, at most: with more, a multiprocessor has registers for few threads."""

_MANY = 1024
"""Rows that tiles are chosen for where there are more than is likely."""


def product(p: Product, likely: int) -> Any:
    """Macro `(x, w, bias, residual, y)`: launches that compute a product.

    Args:
        p: The product.
        likely: Rows that tiles are chosen for.
    """
    streamed = p.groups == 1 and p.x_inside is None
    if isinstance(p.rows, int):
        if streamed and p.rows <= _FEW:
            bands = max(1, -(-p.rows // _HIGHEST))
            return few(p, max(1, -(-p.rows // bands)))
        return many(p, p.rows)
    if not streamed:
        return many(p, likely)
    one, some = few(p, 1, most=1), few(p, _HIGHEST, most=_FEW)
    more, rest = many(p, likely, most_rows=likely), many(p, _MANY, most=1)

    @T.inline
    def launches(x, w, b, r, y):
        if p.rows == 1:
            one(x, w, b, r, y)
        elif p.rows <= _FEW:
            some(x, w, b, r, y)
        elif p.rows <= likely:
            more(x, w, b, r, y)
        else:
            rest(x, w, b, r, y)

    return launches
