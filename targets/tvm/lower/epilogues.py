"""Puts bias, residual and activation behind a product or convolution into its kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, sole_reader
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.targets.tvm.nodes import DOMAIN

HOSTS = {"Gemm": 3, "Conv": 3, "QGemm": 4, "QConv": 4}
"""Nodes with an epilogue: attributes activation, alpha and beta, and which input takes a residual. Integer nodes have
one where they put floats out."""

_FLOAT = frozenset({"Gemm", "Conv"})
_BIAS = 2  # of these


@dataclass(frozen=True, kw_only=True)
class Epilogues(Pass):
    """Fuses an Add of a constant, an Add of another tensor, and an `Activate` node, in this order."""

    name: ClassVar[str] = "tvm_epilogues"
    summary: ClassVar[str] = "Additions and activations into the kernel before them."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in HOSTS or attribute(node, "dtype", "float32") != "float32":
                continue
            fused = []
            while (reader := sole_reader(node.outputs[0])) is not None and "activation" not in node.attributes:
                if not (_add_bias(editor, node, reader) or _add_residual(node, reader) or _activate(node, reader)):
                    break
                fused.append(reader.op_type)
                _swallow(model.graph, node, reader)
            if fused:
                edits.append(applied(node, f"computes {', '.join(fused)} as well"))
        return edits


def _add_bias(editor: Editor, node: ir.Node, reader: ir.Node) -> bool:
    """Adds a constant of one value a channel to the bias, unless a residual came first."""
    if node.op_type not in _FLOAT or reader.domain or reader.op_type != "Add" or _has_residual(node):
        return False
    other = _other(node, reader)
    added, bias = constant(other), node.inputs[_BIAS]
    columns = attribute(node, "n")
    if other is None or added is None or added.dtype != np.float32 or added.shape[-1:] != (columns,):
        return False
    packed = constant(bias)
    if added.size != columns or packed is None or bias is None:
        return False
    packed = packed.copy()
    packed.reshape(-1)[:columns] += added.reshape(-1)
    node.replace_input_with(_BIAS, editor.weight(f"{node.name}_bias", packed))
    return True


def _add_residual(node: ir.Node, reader: ir.Node) -> bool:
    if reader.domain or reader.op_type != "Add" or _has_residual(node):
        return False
    other = _other(node, reader)
    mine = node.outputs[0]
    if other is None or other is mine or other.dtype != ir.DataType.FLOAT or not _same_shape(other, mine):
        return False
    node.resize_inputs(HOSTS[node.op_type] + 1)
    node.replace_input_with(HOSTS[node.op_type], other)
    return True


def _has_residual(node: ir.Node) -> bool:
    return len(node.inputs) > HOSTS[node.op_type]


def _activate(node: ir.Node, reader: ir.Node) -> bool:
    if reader.domain != DOMAIN or reader.op_type != "Activate":
        return False
    for name in ("activation", "alpha", "beta"):
        if (found := reader.attributes.get(name)) is not None:
            node.attributes.add(found)
    return True


def _other(node: ir.Node, reader: ir.Node) -> ir.Value | None:
    first, second = reader.inputs
    return second if first is node.outputs[0] else first


def _same_shape(a: ir.Value, b: ir.Value) -> bool:
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    known = not any(isinstance(d, ir.SymbolicDim) and d.value is None for d in a.shape)
    return known and all(x == y for x, y in zip(a.shape, b.shape, strict=True))


def _swallow(graph: ir.Graph, node: ir.Node, reader: ir.Node) -> None:
    """Gives `node` the output and the place of its reader: a residual may be computed after where `node` stood."""
    output = reader.outputs[0]
    is_output, name = output.is_graph_output(), output.name
    mine = node.outputs[0]
    mine.shape, mine.type = output.shape, output.type
    ir.convenience.replace_all_uses_with(output, mine, replace_graph_outputs=is_output)
    graph.remove(node)
    graph.insert_before(reader, node)
    for index in range(len(reader.inputs)):
        reader.replace_input_with(index, None)
    graph.remove(reader)
    output.name = None
    mine.name = name
