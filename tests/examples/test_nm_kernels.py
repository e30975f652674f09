"""The benchmark of the N:M kernels, on products too small to measure anything."""

from __future__ import annotations

import sys

import pytest

from onnxcomp import native


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_every_kernel_has_its_line(monkeypatch, capsys):
    from examples.nm import kernels

    monkeypatch.setattr(kernels, "beyond_cache", lambda: 0.0)
    options = "--shapes 64x96 --rows 1 12 --repeat 2 --threads 2"
    monkeypatch.setattr(sys, "argv", ["kernels", *options.split()])
    kernels.main()
    lines = capsys.readouterr().out.splitlines()
    for rows in (1, 12):
        for name in (*kernels.DENSE, *kernels.OURS):
            (line,) = (found for found in lines if found.split("64x96")[0].strip() == name and f" {rows} " in found)
            ratios = [float(number) for number in line.split()[-4:]]
            assert all(ratio > 0 for ratio in ratios)
