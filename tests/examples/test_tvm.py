"""The table of models compiled by TVM, on its smallest one."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("tvm", reason="needs TVM")
pytest.importorskip("skimage", reason="needs scikit-image")
pytest.importorskip("sklearn", reason="needs scikit-learn")
pytest.importorskip("torch", reason="needs PyTorch")


def test_a_step_of_a_gru_dense_and_by_its_changes(monkeypatch, capsys):
    from examples.tvm.__main__ import main

    monkeypatch.setattr(sys, "argv", ["examples.tvm", "--models", "gru", "--repeat", "1"])
    main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["compile", "s", "code"]
    assert [row[:28].strip() for row in rows] == ["gru, dense", "gru, delta"]
    for row in rows:
        _, _, weights, _, difference, *times = map(float, row[28:].split())
        assert weights == pytest.approx(6.3, abs=0.1)
        assert difference < 1e-5
        assert min(times) > 0
