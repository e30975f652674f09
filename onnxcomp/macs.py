"""Multiply-accumulates of one node, from the shapes of its values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial

import onnx_ir as ir

MacCounter = Callable[[ir.Node, Mapping[str, int] | int | None], int]


def count_macs(node: ir.Node, dims: Mapping[str, int] | int | None = None) -> int:
    """Multiply-accumulates of one run of a node.

    Args:
        node: Any node; the shapes have to be inferred.
        dims: Sizes of symbolic dimensions by name, or one size for all that are unknown.

    Returns:
        The count, or 0 if the op has none (everything but convolutions and matrix products) or a dimension is unknown.
    """
    counter = _COUNTERS.get(node.op_type)
    return 0 if counter is None else counter(node, dims)


def _conv(node: ir.Node, dims: Mapping[str, int] | int | None, second: int = 1) -> int:
    weight, output = _shape(node, second, dims), _sizes(node.outputs[0].shape, dims)
    if weight is None or output is None:
        return 0
    return math.prod(output) * math.prod(weight[1:])


def _conv_transpose(node: ir.Node, dims: Mapping[str, int] | int | None) -> int:
    data, weight = _shape(node, 0, dims), _shape(node, 1, dims)
    if data is None or weight is None:
        return 0
    return math.prod(data) * math.prod(weight[1:])


def _gemm(node: ir.Node, dims: Mapping[str, int] | int | None, second: int = 1) -> int:
    a, b = _shape(node, 0, dims), _shape(node, second, dims)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return 0
    return math.prod(a) * (b[0] if _flag(node, "transB") else b[1])


def _matmul(node: ir.Node, dims: Mapping[str, int] | int | None, second: int = 1) -> int:
    a, b = _shape(node, 0, dims), _shape(node, second, dims)
    if not a or not b:
        return 0
    depth = a[-1]
    rows = a[-2] if len(a) > 1 else 1
    columns = b[-1] if len(b) > 1 else 1
    batch = itertools.zip_longest(reversed(a[:-2]), reversed(b[:-2]), fillvalue=1)
    return math.prod(y if x == 1 else x for x, y in batch) * rows * depth * columns


def _matmul_nbits(node: ir.Node, dims: Mapping[str, int] | int | None) -> int:
    data, columns = _shape(node, 0, dims), node.attributes.get("N")
    return 0 if data is None or columns is None else math.prod(data) * columns.as_int()


def _nm_matmul(node: ir.Node, dims: Mapping[str, int] | int | None) -> int:
    data, stored = _shape(node, 0, dims), _shape(node, 1, dims)
    return 0 if data is None or stored is None else math.prod(data[:-1]) * math.prod(stored)


_COUNTERS: Mapping[str, MacCounter] = {
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MatMulNBits": _matmul_nbits,
    "NMMatMul": _nm_matmul,
    "NMMatMulInt8": _nm_matmul,
    # In these a scale and a zero point stand between the two operands.
    "QGemm": partial(_gemm, second=3),
    "QLinearConv": partial(_conv, second=3),
    "QLinearMatMul": partial(_matmul, second=3),
}


def _flag(node: ir.Node, name: str) -> bool:
    found = node.attributes.get(name)
    return found is not None and bool(found.as_int())


def _shape(node: ir.Node, index: int, dims: Mapping[str, int] | int | None) -> tuple[int, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    if value.shape is None and value.const_value is not None:
        return tuple(value.const_value.shape.numpy())
    return _sizes(value.shape, dims)


def _sizes(shape: ir.Shape | None, dims: Mapping[str, int] | int | None) -> tuple[int, ...] | None:
    if shape is None:
        return None
    sizes: list[int] = []
    for dim in shape:
        size = dim if isinstance(dim, int) else dims.get(str(dim.value)) if isinstance(dims, Mapping) else dims
        if size is None or size < 0:  # some exporters write -1 for an unknown dimension
            return None
        sizes.append(size)
    return tuple(sizes)


MAC_OPS = frozenset(_COUNTERS)
"""Op types that have multiply-accumulates."""
