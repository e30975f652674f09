"""Break-even on this machine: how it is found from times, kept, and read again."""

from __future__ import annotations

import json

import pytest

from onnxcomp import api, native
from onnxcomp.break_even import BreakEven
from onnxcomp.errors import GraphError, TargetError, UnsupportedError
from onnxcomp.targets import ort
from onnxcomp.targets.ort import OrtCpu, break_even, break_even_trials
from onnxcomp.targets.ort.default_break_even import DEFAULT

needs_library = pytest.mark.skipif(not native.available(), reason="the native library was not built")


def entry(sparsity: float, rows: int = 1) -> BreakEven:
    return BreakEven(
        op="matmul", weights="int8", dense="int8", inputs=64, outputs=64, rows=rows, threads=1, sparsity=sparsity
    )


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ([8, 6, 4, 2, 1], 0.375),  # half-way between 6 and 4
        ([4, 3, 2, 1, 1], 0.0),
        ([9, 8, 7, 6, 5.5], 1.0),
        ([5, 4, 5, 2, 1], 0.5),  # not monotonous: the last crossing counts
        ([9, 9, 9, 9, 4], 0.75 + 0.2 * 4 / 5),
    ],
)
def test_crossing(sparse, expected):
    assert break_even_trials.crossing((0.0, 0.25, 0.5, 0.75, 0.95), sparse, 5.0) == pytest.approx(expected)


def test_kept_and_read_again():
    assert break_even.table(()) == DEFAULT
    break_even.store([entry(0.3), entry(0.4, rows=8)], ())
    assert break_even.table(()) == (entry(0.3), entry(0.4, rows=8))
    break_even.store([entry(0.5)], ())
    assert set(break_even.table(())) == {entry(0.5), entry(0.4, rows=8)}
    break_even.cache_path(()).unlink()


@pytest.mark.parametrize("text", ["{", "[1]", '[{"op": "matmul"}]', json.dumps([{**vars(entry(0.1)), "rows": "many"}])])
def test_a_damaged_file_counts_as_none(text):
    path = break_even.cache_path(())
    path.write_text(text)
    assert break_even.table(()) == DEFAULT
    path.unlink()


def test_the_folder_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(break_even, "cache_path", lambda _: tmp_path / "file" / "table.json")
    with pytest.raises(TargetError, match="cannot write"):
        break_even.store([entry(0.1)], ())


def test_shares_are_shares():
    assert {e.rows for e in DEFAULT} >= {1, 2, 8}
    assert all(0 <= e.sparsity <= 1 for e in DEFAULT)


@needs_library
def test_measured_for_the_products_of_a_model(model_path, monkeypatch, tmp_path):
    with pytest.raises(GraphError, match="multiples of 32"):
        api.calibrate_target(model=model_path)  # 8 x 32 and 32 x 4
    monkeypatch.setattr(break_even_trials, "beyond_cache", lambda: 1e5)
    monkeypatch.setattr(break_even_trials, "ROWS", (1, 2))
    monkeypatch.setattr(break_even, "cache_path", lambda _: tmp_path / "table.json")
    found = OrtCpu().calibrate([(64, 96), (96, 64)])
    cases = {(e.op, e.weights, e.dense, e.inputs, e.outputs, e.rows) for e in found}
    kinds = (("fp32", "fp32"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4"))
    shapes = (("matmul", 64, 96), ("gated_mlp", 64, 96), ("matmul", 96, 64))
    expected = {(op, *kind, k, n) for op, k, n in shapes for kind in kinds}
    expected |= {("nm_matmul", w, w, k, n) for w in ("fp32", "int8") for k, n in ((64, 96), (96, 64))}
    assert cases == {(*case, rows) for case in expected for rows in (1, 2)}
    assert OrtCpu().capabilities().break_even == found


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(ort.native, "available", lambda: False)
    with pytest.raises(UnsupportedError, match="no kernels to measure"):
        api.calibrate_target()
