"""Conversion keeps where an Upsample or Resize in the middle of a graph takes its samples from.

The converter names values that are no outputs of the graph anew, so that nodes cannot be told by their names.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import parser

from onnxcomp.model import load, save
from onnxcomp.opset import raise_opset
from tests.corpus.harness import run_all

X = np.random.default_rng(0).normal(size=(1, 1, 6, 8)).astype(np.float32)


@pytest.mark.parametrize("version", [11, 13, 21])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(
    ("old", "nodes"),
    [
        (9, "a = Upsample <mode = {mode}> (x, s)  b = Sigmoid (a)  c = Upsample <mode = {mode}> (b, s)"),
        (10, "a = Resize <mode = {mode}> (x, s)  b = Sigmoid (a)  c = Resize <mode = {mode}> (b, t)"),
        (10, "a = Resize <mode = {mode}> (x, t)  b = Sigmoid (a)  c = Resize <mode = {mode}> (b, s)"),
    ],
    ids=["enlarge twice", "enlarge, then shrink", "shrink, then enlarge"],
)
def test_sampling_within_a_graph(old, nodes, mode, version, tmp_path):
    text = f"""<ir_version: 8, opset_import: ["" : {old}]> g (float[1, 1, 6, 8] x) => (float[n, m, h, w] y)
        <float[4] s = {{1.0, 1.0, 2.0, 1.5}}, float[4] t = {{1.0, 1.0, 0.5, 0.6}}> {{
        {nodes.replace("{mode}", f'"{mode}"')}  y = Neg (c) }}"""
    path, result = tmp_path / "old.onnx", tmp_path / "new.onnx"
    onnx.save(parser.parse_model(text), path)
    model = load(path)
    assert raise_opset(model, version)
    save(model, result)
    (before,), (after,) = (run_all(p, [{"x": X}])[0] for p in (path, result))
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
