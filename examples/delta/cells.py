"""Recurrent cells as streams of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp import api
from onnxcomp.passes.carry import Carry
from onnxcomp.target import Feed


def walk(size: int, count: int) -> Iterator[Feed]:
    """Vectors of which a tenth moves in every step."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 1, size))
    for _ in range(count):
        x = x + (rng.random(x.shape) < 0.1) * rng.normal(size=x.shape)
        yield {"x": x.astype(np.float32)}


def recurrent(op_type: str, size: int = 512) -> ir.Model:
    """A GRU or LSTM of one step, hidden values carried."""
    gates = {"GRU": 3, "LSTM": 4}[op_type]
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(size=(1, gates * size, size)) / size**0.5,
        "R": rng.normal(size=(1, gates * size, size)) / size**0.5,
        "B": rng.normal(size=(1, 2 * gates * size)) / 10,
    }
    state = {"h": "h_next", "c": "c_next"} if op_type == "LSTM" else {"h": "h_next"}

    def value(name: str, shape: tuple[int, ...]) -> ir.Value:
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))

    inputs = [value(n, (1, 1, size)) for n in ("x", *state)]
    outputs = [value("y", (1, 1, 1, size)), *(value(n, (1, 1, size)) for n in state.values())]
    constants = [ir.Value(name=n, const_value=ir.tensor(a.astype(np.float32), name=n)) for n, a in weights.items()]
    attributes = {"hidden_size": size, **({"linear_before_reset": 1} if op_type == "GRU" else {})}
    node = ir.node(op_type, [inputs[0], *constants, None, *inputs[1:]], attributes, outputs=outputs, name="cell")
    graph = ir.Graph(
        inputs, outputs, nodes=[node], initializers=constants, opset_imports={"": 18}, name=op_type.lower()
    )
    return api.rewrite(ir.Model(graph, ir_version=9), None, recipe=[Carry(state=state)]).model
