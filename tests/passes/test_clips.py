"""Chains of Min, Max, Relu and Clip become one Clip that gives the same numbers to the last bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from builder import Builder

from onnxcomp.passes.cleanup import Cleanup

X = np.array([-9, -3, -1, -0.5, 0, 0.3, 0.7, 1, 2.5, 6, 9, np.nan], np.float32)
STEPS = {
    "relu": ("Relu", []),
    "max": ("Max", [np.float32(-0.5)]),
    "min": ("Min", [np.float32(0.7)]),
    "clip": ("Clip", [np.float32(-1), np.float32(2.5)]),
    "low": ("Clip", [np.float32(-3)]),
    "negative": ("Clip", [np.float32(-3), np.float32(-1)]),
    "disjoint": ("Clip", [np.float32(2), np.float32(3)]),
    "empty": ("Clip", [np.float32(1), np.float32(0.3)]),
}


def chain(names, b: Builder):
    y = b.input("x", [12])
    for name in names:
        op, bounds = STEPS[name]
        y = b.op(op, y, *map(b.const, bounds))
    return b.output(b.op("Identity", y)).model()


@pytest.mark.parametrize("names", list(itertools.product(STEPS, repeat=2)))
def test_two(names, b, run_passes, outputs):
    model = chain(names, b)
    expected = outputs(model, {"x": X})[0]
    run_passes(model, Cleanup())
    np.testing.assert_array_equal(outputs(model, {"x": X})[0], expected)
    assert [n.op_type for n in model.graph] == (["Relu", "Relu"] if names == ("relu", "relu") else ["Clip"])


def test_longer_chain_of_one_shared_start(b, run_passes, outputs):
    x = b.input("x", [12])
    for low, high in ((-0.5, 0.5), (0.1, 0.2)):
        y = b.op("Relu", b.op("Min", b.op("Max", x, b.const(np.float32(low))), b.const(np.float32(high))))
        b.output(b.op("Neg", y))
    model = b.model()
    expected = outputs(model, {"x": X})
    report = run_passes(model, Cleanup())
    for found, want in zip(outputs(model, {"x": X}), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    assert [n.op_type for n in model.graph].count("Clip") == 2
    assert sum("one Clip to" in e.detail for e in report.edits) == 6


@pytest.mark.parametrize("reason", ["reader between", "output between", "rank", "vector", "old opset", "integers"])
def test_what_has_to_stay(reason, run_passes, outputs):
    b = Builder()
    kind, dtype = (6, np.int32) if reason == "integers" else (1, np.float32)
    x = b.input("x", [4], kind)
    shape = {"rank": (1, 1, 1), "vector": (4,)}.get(reason, ())
    between = b.op("Max", x, b.const(np.full(shape, -1, dtype)))
    y = b.op("Min", between, b.const(dtype(1)))
    if reason == "reader between":
        y = b.op("Add", y, between)
    elif reason == "output between":
        b.output(between)
    model = b.output(y, kind).model(10 if reason == "old opset" else 17)
    feed = {"x": np.array([-3, -1, 0, 3], dtype)}
    expected = outputs(model, feed)
    run_passes(model, Cleanup())
    for found, want in zip(outputs(model, feed), expected, strict=True):
        np.testing.assert_array_equal(found, want)
    assert "Max" in [n.op_type for n in model.graph]
