"""The verb `calibrate-target`: what it prints."""

from __future__ import annotations

import json

import pytest

from onnxcomp import native
from onnxcomp.targets.ort import break_even, break_even_trials

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library was not built")


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(break_even, "cache_path", lambda _: tmp_path / "table.json")
    monkeypatch.setattr("onnxcomp.targets.ort.SHAPES", ((64, 96),))
    monkeypatch.setattr(break_even_trials, "ROWS", (1, 4))
    monkeypatch.setattr(break_even_trials, "beyond_cache", lambda: 1e5)


def test_table(cli, tmp_path):
    code, out, err = cli("calibrate-target")
    assert (code, err) == (0, "")
    assert "1 row" in out
    assert "4 rows" in out
    assert out.count("64x96") == 6
    assert len(json.loads((tmp_path / "table.json").read_text())) == 12


def test_json(as_json):
    found = as_json("calibrate-target", "--threads", "2")
    kinds = [("matmul", *kind) for kind in (("fp32", "fp32"), ("int8", "int8"), ("int4", "int8"), ("int4", "int4"))]
    kinds += [("nm_matmul", "fp32", "fp32"), ("nm_matmul", "int8", "int8")]
    assert {(e["op"], e["weights"], e["dense"], e["rows"], e["threads"]) for e in found} == {
        (*kind, rows, 2) for kind in kinds for rows in (1, 4)
    }
    assert {e["sparsity"] for e in found if e["op"] == "nm_matmul"} <= {0.5, 0.75, 1.0}


def test_a_model_without_such_products(fails, model_path):
    assert "multiples of 32" in fails("calibrate-target", model_path)
