"""Measuring when sparse kernels in TIR pay."""

from __future__ import annotations

import pytest

tvm = pytest.importorskip("tvm")

from onnxcomp.break_even import BreakEven, Product  # noqa: E402
from onnxcomp.targets.ort.break_even_trials import ROWS  # noqa: E402
from onnxcomp.targets.tvm import TvmCpu, break_even, break_even_trials  # noqa: E402
from onnxcomp.targets.tvm.default_break_even import DEFAULT  # noqa: E402


@pytest.fixture
def measured(monkeypatch, tmp_path) -> tuple[BreakEven, ...]:
    monkeypatch.setattr(break_even, "cache_path", lambda _: tmp_path / "kept.json")
    monkeypatch.setattr(break_even_trials, "beyond_cache", lambda: 1e5)
    return tuple(TvmCpu().calibrate([(32, 64), (64, 32)]))


def test_every_kind_of_weight_and_op_is_measured_and_kept(measured):
    cases = {(e.op, e.weights, e.dense, e.inputs, e.outputs) for e in measured}
    assert ("gated_mlp", "int4", "int8", 32, 64) in cases
    assert {op for op, *_ in cases} == {"matmul", "gated_mlp"}
    assert {e.rows for e in measured} == set(ROWS)
    assert all(0 <= e.sparsity <= 1 for e in measured)
    target = TvmCpu()
    assert set(target.capabilities().break_even) == set(measured)
    assert Product(op="matmul", weights="fp32", inputs=32, outputs=64).break_even(measured, 1) is not None


def test_without_measuring_the_table_of_the_package_holds():
    assert DEFAULT
    assert TvmCpu().capabilities().break_even == DEFAULT


def test_boards_do_not_share_what_was_measured(monkeypatch):
    monkeypatch.undo()  # the real path
    paths = {break_even.cache_path(TvmCpu(board)._machine) for board in ("x86-64-v3", "x86-64-v4")}
    assert len(paths) == 2
