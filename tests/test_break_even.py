"""Which measured case a product is compared with."""

from __future__ import annotations

import pytest

from onnxcomp.break_even import BreakEven, Product


def entry(
    sparsity: float, *, weights="int4", dense="int8", shape=(512, 512), rows=1, threads=1, op="matmul"
) -> BreakEven:
    return BreakEven(
        op=op, weights=weights, dense=dense, inputs=shape[0], outputs=shape[1], rows=rows, threads=threads,
        sparsity=sparsity,
    )  # fmt: skip


def product(inputs: int = 512, outputs: int = 512, weights: str = "int4", op: str = "matmul") -> Product:
    return Product(op=op, weights=weights, inputs=inputs, outputs=outputs)


def test_the_closest_shape_counts():
    table = [entry(0.1), entry(0.2, shape=(512, 4096)), entry(0.3, shape=(4096, 512))]
    for shape, expected in (((512, 512), 0.1), ((600, 3000), 0.2), ((4096, 600), 0.3)):
        assert product(*shape).break_even(table) == expected


def test_rows_count_before_threads_and_threads_before_shape():
    table = [
        entry(0.1),
        entry(0.2, rows=8, threads=4, shape=(64, 64)),
        entry(0.3, rows=8, shape=(64, 64)),
        entry(0.4, rows=8),
    ]
    assert product().break_even(table, 7) == 0.4
    assert product().break_even(table, 7, threads=4) == 0.2
    assert product().break_even(table, 2) == 0.1


@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_what_it_is_compared_with(dense):
    table = [entry(0.1), entry(0.5, dense="int4")]
    assert product().break_even(table, dense=dense) == {"int8": 0.1, "int4": 0.5}[dense]
    assert product().break_even(table) == 0.1, "4-bit weights of other blocks would lose accuracy"


def test_nothing_is_known_of_other_kinds():
    assert product(op="gated_mlp").break_even([entry(0.1)]) is None
    assert product(weights="fp32").break_even([entry(0.1)]) is None
    assert product().break_even([]) is None
    assert product().worst_break_even([entry(0.1)]) is None, "of one row only"


def test_worst_of_several_rows():
    table = [entry(0.9), entry(0.2, rows=2), entry(0.6, rows=8), entry(0.3, rows=32), entry(0.8, rows=8, shape=(9, 9))]
    assert product().worst_break_even(table) == 0.6
    assert product().worst_break_even(table, beyond=8) == 0.3
    assert product().worst_break_even(table, beyond=32) is None
