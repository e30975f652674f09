"""GRU and LSTM become a product of all inputs and a node of ours for the rest; TVM's importer knows neither.

`Recurrent(xs, h[, c], *(r, x_bias, h_bias) a direction)`; see `onnxcomp.targets.tvm.convert.recurrent`. The product is
an ordinary MatMul, so that the pass has to stand before that of products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.targets.tvm.kernels.recurrent import GATES, pack, panels
from onnxcomp.targets.tvm.lower.sparse import known
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed, replace

_ACTIVATIONS = {"GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_STATES = {"GRU": 1, "LSTM": 2}


@dataclass(frozen=True, kw_only=True)
class Recurrent(Pass):
    """GRU and LSTM of the main graph with constant weights and fixed numbers of steps and sequences.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_recurrent"
    summary: ClassVar[str] = "Recurrent layers to kernels."
    machine: Machine

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            if node.domain not in ("", "ai.onnx") or node.op_type not in GATES:
                continue
            if reason := _why_not(node):
                edits.append(refused(node, reason))
                continue
            self._replace(editor, node)
            edits.append(applied(node, "runs as one product and a loop over steps"))
        return edits

    def _replace(self, editor: Editor, node: ir.Node) -> None:
        kind, name = node.op_type, node.name or node.op_type
        inputs = [*node.inputs, *[None] * (8 - len(node.inputs))]
        x, w, r, b = inputs[:4]
        assert x is not None
        assert w is not None
        assert r is not None
        assert x.shape is not None
        steps, rows, _ = x.shape.numpy()
        weight, recurrent = known(w), known(r)
        directions, units = len(recurrent), recurrent.shape[2]
        columns = np.concatenate(list(weight)).T.astype(np.float32)
        # One product for all steps and directions.
        xs = editor.before(
            node,
            "MatMul",
            [x, editor.weight(f"{w.name}_columns", np.ascontiguousarray(columns))],
            name=f"{name}_inputs",
        )
        xs.dtype, xs.shape = ir.DataType.FLOAT, ir.Shape([steps, rows, columns.shape[1]])
        nothing = np.zeros((directions, rows, units), np.float32)
        states = [
            editor.weight(f"{name}_start", nothing) if state is None else state
            for state in inputs[5 : 5 + _STATES[kind]]
        ]
        given = np.zeros((directions, 2 * GATES[kind] * units), np.float32) if b is None else known(b)
        own: list[ir.Value] = []
        for direction in range(directions):
            own.append(self._packed(editor, r, direction, units, GATES[kind]))
            own += [editor.weight(f"{name}_bias", v.astype(np.float32)) for v in np.split(given[direction], 2)]
        while node.outputs and not node.outputs[-1].name and not node.outputs[-1].uses():
            node.resize_outputs(len(node.outputs) - 1)
        attributes = {
            "kind": kind,
            "reverse": int(attribute(node, "direction", "forward") == "reverse"),
            "linear_before_reset": int(attribute(node, "linear_before_reset", 0)),
            "outputs": len(node.outputs),
        }
        replace(node, "Recurrent", [xs, *states, *own], attributes)

    def _packed(self, editor: Editor, r: ir.Value, direction: int, units: int, gates: int) -> ir.Value:
        machine = self.machine
        shape = (gates, panels(machine, units), units, 2 * machine.lanes)
        return packed(
            editor, f"{r.name}_packed", shape, np.dtype(np.float32), lambda: pack(machine, known(r)[direction])
        )


def _why_not(node: ir.Node) -> str:
    x = node.inputs[0]
    directions = {"forward": 1, "reverse": 1, "bidirectional": 2}.get(attribute(node, "direction", "forward"), 0)
    wanted = [a.lower() for a in _ACTIVATIONS[node.op_type] * directions]
    rest = [*node.inputs[4:5], *node.inputs[5 + _STATES[node.op_type] :]]
    if x is None or x.dtype != ir.DataType.FLOAT or x.shape is None or not all(isinstance(d, int) for d in x.shape):
        return "the kernel takes floats of a fixed number of steps and sequences"
    if any(v is not None and constant(v) is None for v in node.inputs[1:4]) or node.inputs[1] is None:
        return "its weights are not constant"
    if any(value is not None for value in rest):
        return "there is no kernel for sequences of their own lengths, or with peepholes"
    if any(a in node.attributes for a in ("clip", "activation_alpha", "activation_beta")) or attribute(
        node, "layout", 0
    ):
        return "there is no kernel for a clip, another layout or parameters of activations"
    if [a.lower() for a in attribute(node, "activations", wanted)] != wanted or attribute(node, "input_forget", 0):
        return "there is no kernel for its activations"
    return ""
