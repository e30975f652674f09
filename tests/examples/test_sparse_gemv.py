"""The benchmark of the sparse kernels, on products too small to measure anything."""

from __future__ import annotations

import sys

import pytest

from onnxcomp import native


@pytest.mark.skipif(not native.available(), reason="the native library was not built")
def test_every_kernel_has_its_line(monkeypatch, capsys):
    from examples.sparse_gemv.__main__ import main

    options = "--shapes 64x96 --mlps 64x96 --zeros 50 --megabytes 0.1 --repeat 2 --topk --threads 2"
    monkeypatch.setattr(sys, "argv", ["sparse_gemv", *options.split()])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 thread(s)")
    for kind in ("fp32", "int8", "int4"):
        for name in ("dense", "threshold", "topk", "dense up+down", "gated mlp"):
            assert any(line.startswith(f"{name} {kind} ") for line in lines), f"{name} {kind}"
