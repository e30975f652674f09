"""Multiply-accumulates from shapes."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxcomp.macs import count_macs


def node(op_type, *shapes, out=None, **attributes):
    values = [ir.Value(name=f"v{i}", shape=ir.Shape(s)) for i, s in enumerate(shapes)]
    output = ir.Value(name="y", shape=None if out is None else ir.Shape(out))
    return ir.node(op_type, values, attributes, outputs=[output])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (node("Conv", [1, 8, 16, 16], [4, 8, 3, 3], out=[1, 4, 14, 14]), 4 * 14 * 14 * 8 * 9),
        (node("Conv", [1, 8, 16, 16], [8, 1, 3, 3], out=[1, 8, 14, 14], group=8), 8 * 14 * 14 * 9),
        (node("ConvTranspose", [1, 8, 16, 16], [8, 4, 2, 2]), 8 * 16 * 16 * 4 * 4),
        (node("Gemm", [5, 8], [8, 4]), 5 * 8 * 4),
        (node("Gemm", [5, 8], [4, 8], transB=1), 5 * 8 * 4),
        (node("Gemm", [8, 5], [8, 4], transA=1), 5 * 8 * 4),
        (node("MatMul", [5, 8], [8, 4]), 5 * 8 * 4),
        (node("MatMul", [2, 3, 5, 8], [8, 4]), 6 * 5 * 8 * 4),
        (node("MatMul", [1, 3, 5, 8], [2, 1, 8, 4]), 6 * 5 * 8 * 4),
        (node("MatMul", [8], [8, 4]), 8 * 4),
        (node("MatMul", [5, 8], [8]), 5 * 8),
        (node("MatMul", [0, 5, 8], [1, 8, 4]), 0),
        (node("MatMulNBits", [5, 8], [4, 1, 8], K=8, N=4), 5 * 8 * 4),
        (node("QLinearConv", [1, 8, 9, 9], [], [], [4, 8, 3, 3], out=[1, 4, 7, 7]), 4 * 7 * 7 * 8 * 9),
        (node("QLinearMatMul", [5, 8], [], [], [8, 4]), 5 * 8 * 4),
        (node("QGemm", [5, 8], [], [], [4, 8], transB=1), 5 * 8 * 4),
        (node("Relu", [5, 8], out=[5, 8]), 0),
    ],
)
def test_count(given, expected):
    assert count_macs(given) == expected


def test_unknown_dimensions():
    given = node("MatMul", ["n", None, 8], [8, 4])
    assert count_macs(given) == 0
    assert count_macs(given, {"n": 3}) == 0
    assert count_macs(given, 2) == 2 * 2 * 8 * 4
    assert count_macs(node("MatMul", ["n", 8], [8, 4]), {"n": 3}) == 3 * 8 * 4
    assert count_macs(node("MatMul", [-1, 8], [8, 4])) == 0
    assert count_macs(node("Conv", [1, 8, 16, 16], [4, 8, 3, 3])) == 0
