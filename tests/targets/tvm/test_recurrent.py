"""Recurrent layers, lowered and compiled by TVM, against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

tvm = pytest.importorskip("tvm")

from tvm_harness import Compiled, lowered, machines  # noqa: E402

from onnxcomp.targets.tvm.lower.products import Products  # noqa: E402
from onnxcomp.targets.tvm.lower.recurrent import Recurrent  # noqa: E402

BEST = machines()[-1]


def layer(kind: str, steps: int, rows: int, units: int, *, state: bool = True, **attributes: Any) -> Any:
    """A recurrent layer with 7 inputs."""
    rng = np.random.default_rng(units)
    directions, gates = 2 if attributes.get("direction") == "bidirectional" else 1, {"GRU": 3, "LSTM": 4}[kind]
    shapes = {
        "w": (directions, gates * units, 7),
        "r": (directions, gates * units, units),
        "b": (directions, 2 * gates * units),
    }
    weights = [numpy_helper.from_array(rng.normal(size=s, scale=0.4).astype(np.float32), n) for n, s in shapes.items()]
    names = ["h", "c"][: gates - 2] if state else []
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, rows, 7])]
    inputs += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [directions, rows, units]) for n in names]
    outputs = ["y", "y_h", "y_c"][: gates - 1]
    node = helper.make_node(
        kind, ["x", "w", "r", "b", "", *names], outputs, hidden_size=units, name="cell", **attributes
    )
    ranks = {"y": [steps, directions, rows, units]}
    found = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ranks.get(n, [directions, rows, units])) for n in outputs
    ]
    graph = helper.make_graph([node], "g", inputs, found, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    ("kind", "steps", "rows", "units", "attributes"),
    [
        ("GRU", 1, 1, 33, {"linear_before_reset": 1}),
        ("GRU", 4, 5, 20, {"linear_before_reset": 0}),
        ("GRU", 3, 2, 16, {"linear_before_reset": 1, "direction": "bidirectional"}),
        ("LSTM", 1, 1, 48, {}),
        ("LSTM", 5, 3, 19, {"direction": "reverse"}),
        ("LSTM", 2, 1, 8, {"direction": "bidirectional", "state": False}),
    ],
)
def test_layers(kind: str, steps: int, rows: int, units: int, attributes: dict[str, Any]) -> None:
    model = layer(kind, steps, rows, units, **attributes)
    rng = np.random.default_rng(0)
    feed = {
        v.name: rng.normal(size=[d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in model.graph.input
    }
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    passes = [Recurrent(machine=BEST), Products(machine=BEST)]
    for found, expected in zip(
        Compiled(ir.from_proto(model), passes, BEST).run(feed), session.run(None, feed), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


def test_what_there_is_no_kernel_for_stays() -> None:
    for attributes in ({"clip": 1.0}, {"activations": ["Sigmoid", "Relu"]}):
        model = lowered(ir.from_proto(layer("GRU", 1, 1, 8, **attributes)), [Recurrent(machine=BEST)])
        assert [node.op_type for node in model.graph] == ["GRU"]
