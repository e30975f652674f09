"""What every pass has to hold, checked by onnxcomp itself, and what this one computes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxcomp_clip_weights import ClipWeights, clip_outliers

from onnxcomp.targets.ort import OrtCpu
from onnxcomp.testing import check_pass


def model(**weights: np.ndarray) -> ir.Model:
    """A chain of MatMul, one for each weight."""
    names = list(weights)
    values = ["x", *(f"{name}_out" for name in names)]
    graph = helper.make_graph(
        [helper.make_node("MatMul", [values[i], n], [values[i + 1]], name=f"mm_{n}") for i, n in enumerate(names)],
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", len(weights[names[0]])])],
        [helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, name) for name, weight in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.fixture
def weight() -> np.ndarray:
    made = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    made[5, 3] = 100.0
    return made


def test_contract(weight):
    mild = np.random.default_rng(1).uniform(-1, 1, (8, 4)).astype(np.float32)
    edits = check_pass(ClipWeights(), model(w=weight, v=mild), capabilities=OrtCpu().capabilities())
    assert [(e.node, e.action) for e in edits] == [("mm_w", "applied"), ("mm_v", "refused")]


def test_only_the_outlier_changes(weight):
    clipped = clip_outliers(weight, 1, 5.0)
    assert np.argwhere(clipped != weight).tolist() == [[5, 3]]
    assert 3.0 < clipped[5, 3] < 10.0
    np.testing.assert_array_equal(clip_outliers(clipped, 1, 5.0), clipped)


def test_a_channel_without_spread_stays():
    weight = np.zeros((8, 2), np.float32)
    weight[0] = 7.0
    np.testing.assert_array_equal(clip_outliers(weight, 1, 2.0), weight)


def test_a_model_without_outliers_stays_identical():
    mild = model(w=np.random.default_rng(1).uniform(-1, 1, (8, 4)).astype(np.float32))
    before = onnx.printer.to_text(ir.to_proto(mild))
    check_pass(ClipWeights(), mild, capabilities=OrtCpu().capabilities())
    assert onnx.printer.to_text(ir.to_proto(mild)) == before
