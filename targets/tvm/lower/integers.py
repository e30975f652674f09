"""Quantized layers become integer kernels: what stands between dequantizers and a quantizer, as one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.edit import Editor
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.targets.tvm.lower import _integer_dynamic as dynamic
from onnxcomp.targets.tvm.lower import _integer_elementwise as elementwise
from onnxcomp.targets.tvm.lower import _integer_layers as layers
from onnxcomp.targets.tvm.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Integers(Pass):
    """Nodes between DequantizeLinear and QuantizeLinear of 8 bits and one scale, in the main graph.

    Products of what DynamicQuantizeLinear puts out are among them.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_integers"
    summary: ClassVar[str] = "Quantized layers to integer kernels."
    machine: Machine

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits: list[Edit] = []
        editor = Editor(model)
        for node in _plain(model, "QuantizeLinear"):
            elementwise.hoist(editor, node)
        for node in _plain(model):
            op_type = node.op_type
            edit = applied(node, "runs on integers")
            reason = self._layer(editor, node, op_type)
            if reason is None:
                edits.append(edit)
            elif reason:
                edits.append(refused(node, f"runs in float: {reason}"))
        common_passes.RemoveUnusedNodesPass()(model)
        for node in _plain(model, "QuantizeLinear", "DequantizeLinear"):
            elementwise.rest(node)
        return edits

    def _layer(self, editor: Editor, node: ir.Node, op_type: str) -> str | None:
        match op_type:
            case "Conv":
                return layers.conv(editor, node, self.machine)
            case "DynamicQuantizeLinear":
                return dynamic.products(editor, node, self.machine)
            case "MatMul" | "Gemm":
                return layers.product(editor, node, self.machine)
            case "Add" | "Mul":
                return elementwise.total(editor, node)
            case "Concat":
                return elementwise.joined(editor, node)
            case "ReduceMean" | "GlobalAveragePool":
                return elementwise.mean(editor, node)
            case "QuantizeLinear":
                return elementwise.requantized(editor, node)
        return elementwise.curve(editor, node) if op_type in elementwise.CURVES else ""


def _plain(model: ir.Model, *op_types: str) -> list[ir.Node]:
    return [node for node in model.graph if not node.domain and (not op_types or node.op_type in op_types)]
