"""Range between sizes that are open, as positions of tokens behind a cache are computed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("tvm")

from onnxcomp.verbs.resolve import compiled, make_target

TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
positions (float[past, 2] cache, float[new, 2] x) => (int64[k] places, int64[m] others, float[all, 2] joined)
<int64 zero = {{0}}, int64 one = {{1}}, int64 step = {{{step}}}>
{{
    long = Shape <start = 0, end = 1> (cache)
    short = Shape <start = 0, end = 1> (x)
    before = Squeeze (long)
    fresh = Squeeze (short)
    total = Add (before, fresh)
    places = Range (before, total, step)
    others = Range (zero, before, step)
    joined = Concat <axis = 0> (cache, x)
}}
"""


@pytest.mark.parametrize("step", [1, 3])
def test_ranges_between_sizes(tmp_path, step):
    model = ir.from_onnx_text(TEXT.format(step=step))
    target = make_target("tvm-cpu")
    session = target.load(compiled(model, target, tmp_path / "tvm"))
    for past, new in ((0, 1), (4, 1), (7, 5), (9, 6)):
        feed = {"cache": np.ones((past, 2), np.float32), "x": np.zeros((new, 2), np.float32)}
        found = session.run(feed)
        np.testing.assert_array_equal(found["places"], np.arange(past, past + new, step))
        np.testing.assert_array_equal(found["others"], np.arange(0, past, step))
        np.testing.assert_array_equal(found["joined"], np.concatenate([feed["cache"], feed["x"]]))
