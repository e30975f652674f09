"""Thresholds are given only where the target was measured to be faster so, unless a user wants them all the same."""

from __future__ import annotations

import dataclasses

import blocks
import pytest

from onnxcomp.break_even import BreakEven
from onnxcomp.passes.threshold import Threshold
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import reference_runner


def applied_and_refused(model, step, capabilities, at: float, weights: str = "fp32"):
    """What a pass reports where everything breaks even at a share of `at`."""
    entries = tuple(
        BreakEven(op=op, weights=weights, dense=weights, inputs=9, outputs=9, rows=1, threads=1, sparsity=at)
        for op in ("matmul", "gated_mlp")
    )
    known = dataclasses.replace(capabilities, break_even=entries)
    report = Pipeline(passes=[step], capabilities=known, runner=reference_runner).run(model, blocks.feeds())[-1]
    return [
        {e.node: e.detail for e in report.edits if e.action == action and e.node} for action in ("applied", "refused")
    ]


@pytest.mark.parametrize("method", ["cats", "topk", "teal"])
def test_below_break_even(method, b, capabilities):
    model = blocks.gated(b)
    step = Threshold(method=method, sparsity=0.3)
    applied, refused = applied_and_refused(model, step, capabilities, 0.4)
    assert not applied
    assert "that beats a dense fp32 one of" in refused["down"]
    assert "from 40% on; set only_if_faster = false" in refused["down"]
    assert {n.op_type for n in model.graph if n.name in ("gate", "up", "down")} == {"MatMul"}
    applied, _ = applied_and_refused(model, dataclasses.replace(step, only_if_faster=False), capabilities, 0.4)
    assert "down" in applied


@pytest.mark.parametrize("method", ["cats", "topk", "teal"])
def test_above_break_even(method, b, capabilities):
    applied, refused = applied_and_refused(blocks.gated(b), Threshold(method=method, sparsity=0.5), capabilities, 0.4)
    assert "down" in applied
    assert not refused.get("down")


def test_what_counts_is_the_type_of_weights_that_is_written(b, capabilities):
    step = Threshold(method="cats", sparsity=0.3)
    applied, _ = applied_and_refused(blocks.gated(b), step, capabilities, 0.4, weights="int8")
    assert "down" in applied, "nothing is known of float weights"
