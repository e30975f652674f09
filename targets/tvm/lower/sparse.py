"""Portable ops that leave out inputs become nodes of ours.

`SparseMatMul(x, *weight, limit)` and `GatedMLP(gates, x, *up, *down, limit)` with attributes `n`, `select`, `one_sided`
and `format`. The limit is a threshold, or how many count where `select` is `largest`. A weight is a matrix and a scale
for each column, or words, scales and zero points where `format` is `int4`. That of an up projection lies by neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.ops import DOMAIN, OPS
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.ort.dense_forms import SparseCall, drop_unused, sparse_call
from onnxcomp.targets.tvm.kernels.gated_mlp import pack_neurons_int4
from onnxcomp.targets.tvm.kernels.int4 import int4_shape, pack_int4
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed, replace

_FEWEST_HALF_LANES = 8
"""Lanes from which on a machine is taken to convert halves itself."""


@dataclass(frozen=True, kw_only=True)
class Sparse(Pass):
    """`ThresholdMatMul`, `TopKMatMul` and `GatedMLP` of the main graph, whatever their weights are.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_sparse"
    summary: ClassVar[str] = "Sparse products to kernels."
    machine: Machine

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in OPS:
                continue
            call = sparse_call(node)
            if call is None:
                edits.append(refused(node, "its weight is not a constant; it runs by its function body"))
                continue
            if reason := _why_not(node):
                edits.append(refused(node, reason))
                continue
            self._replace(editor, call)
            edits.append(applied(node, "reads the weights of inputs that count only"))
        drop_unused(model)
        drop_functions(model, OPS)
        return edits

    def _replace(self, editor: Editor, call: SparseCall) -> None:
        node = call.node
        inputs, parts = list(node.inputs), len(call.format.inputs.split(","))
        kind = "int4" if parts == 3 else "float"
        attributes: dict[str, Any] = {"format": kind, "select": "above", "one_sided": attribute(node, "one_sided", 0)}
        if call.op == "TopKMatMul":
            attributes["select"] = "largest"
            limit: ir.Value | None = editor.weight(f"{node.name}_count", np.array([attribute(node, "k")], np.int32))
        else:
            limit = _threshold(editor, inputs[-1])
        first = 2 if call.op == "GatedMLP" else 1
        weight = [v for v in inputs[first : first + parts] if v is not None]
        given = inputs[:first]
        if call.op == "GatedMLP":
            given += self._weight(editor, weight, by_neurons=True)
            weight = [v for v in inputs[first + parts : first + 2 * parts] if v is not None]
        down = self._weight(editor, weight, by_neurons=False)
        assert weight[0].const_value is not None
        columns = int(weight[0].const_value.shape.numpy()[1])
        attributes["n"] = columns * 2 if kind == "int4" else columns
        replace(node, "GatedMLP" if call.op == "GatedMLP" else "SparseMatMul", [*given, *down, limit], attributes)

    def _weight(self, editor: Editor, parts: Sequence[ir.Value], *, by_neurons: bool) -> list[ir.Value]:
        """The inputs that hold a weight: a matrix and a scale a column, or words, scales and zero points."""
        matrix = parts[0]
        if len(parts) == 3:
            return self._int4(editor, parts, pack_neurons_int4 if by_neurons else pack_int4)
        assert matrix.const_value is not None
        rows, columns = (int(d) for d in matrix.const_value.shape.numpy())
        if by_neurons:
            dtype = matrix.const_value.dtype.numpy()
            matrix = packed(editor, f"{matrix.name}_turned", (columns, rows), dtype, turned(matrix))
        # The weight's own scale is a column's: a neuron's, of an up projection.
        scale = np.ones(columns, np.float32) if len(parts) == 1 else known(parts[1]).astype(np.float32)
        return [matrix, editor.weight(f"{parts[0].name}_scale", scale)]

    def _int4(
        self, editor: Editor, parts: Sequence[ir.Value], pack: Callable[[Machine, Array], Array]
    ) -> list[ir.Value]:
        weight, scale, zero = parts
        assert weight.const_value is not None
        rows, half = (int(d) for d in weight.const_value.shape.numpy())
        machine = self.machine
        words = packed(
            editor,
            f"{weight.name}_words",
            int4_shape(machine, rows, 2 * half),
            np.dtype(np.int32),
            lambda: pack(machine, known(weight)),
        )
        scales = known(scale)
        if scales.dtype != np.float16 or machine.lanes < _FEWEST_HALF_LANES:
            scale = editor.weight(f"{scale.name}_float", scales.astype(np.float32))
        zeros = known(zero)
        return [words, scale, zero if zeros.ndim == 2 else editor.weight(f"{zero.name}_one", zeros.reshape(1))]


def _threshold(editor: Editor, value: ir.Value | None) -> ir.Value | None:
    array = constant(value)
    return value if array is None or value is None else editor.weight(f"{value.name}_limit", array.reshape(-1))


def known(value: ir.Value) -> Array:
    """The array of a constant."""
    array = constant(value)
    assert array is not None
    return array


def turned(value: ir.Value) -> Callable[[], Array]:
    """What makes the transposed matrix of a constant."""
    return lambda: np.ascontiguousarray(known(value).T)


def drop_functions(model: ir.Model, names: Any) -> None:
    """Takes functions of portable ops away that nothing calls any more."""
    called = {n.op_identifier() for n in model.graph.all_nodes()}
    called |= {n.op_identifier() for f in model.functions.values() for n in f.all_nodes()}
    for key in [k for k in model.functions if k[0] == DOMAIN and k[1] in names and k not in called]:
        del model.functions[key]


def _why_not(node: ir.Node) -> str:
    x = node.inputs[0]
    threshold = None if node.op_type.startswith("TopK") else node.inputs[-1]
    for value in (x, threshold):
        if value is not None and value.dtype not in (None, ir.DataType.FLOAT):
            return "the kernels take float activations; it runs by its function body"
    if x is None or x.dtype is None or x.shape is None or not isinstance(x.shape[-1], int):
        return "type or shape of its activations is not known; it runs by its function body"
    if threshold is not None and (threshold.shape is None or not all(isinstance(d, int) for d in threshold.shape)):
        return "the shape of its threshold is not known; it runs by its function body"
    if threshold is not None and len(threshold.shape or ()) > 1:
        return "its threshold is no scalar or vector; it runs by its function body"
    if node.op_type.startswith("Gated") and (node.inputs[1] is None or not _same_rows(x, node.inputs[1])):
        return "its gates and inputs have not the same rows; it runs by its function body"
    return ""


def _same_rows(a: ir.Value, b: ir.Value) -> bool:
    return a.shape is not None and b.shape is not None and list(a.shape)[:-1] == list(b.shape)[:-1]
