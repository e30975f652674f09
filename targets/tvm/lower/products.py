"""Float32 products with a constant matrix become nodes of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.rewrite import Context, Edit, Pass, applied
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import gemm
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed, replace


@dataclass(frozen=True, kw_only=True)
class Products(Pass):
    """MatMul and Gemm with a constant second matrix, in the main graph.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_products"
    summary: ClassVar[str] = "Products with a constant matrix to kernels."
    machine: Machine

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        editor = Editor(model)
        for node in list(model.graph):
            if node.domain or node.op_type not in ("MatMul", "Gemm"):
                continue
            x, weight = node.inputs[:2]
            if x is None or weight is None or weight.dtype != ir.DataType.FLOAT or not _constant_matrix(weight):
                continue
            bias: ir.Value | None = None
            turned, scale, bias_scale = False, 1.0, 1.0
            if node.op_type == "Gemm":
                if attribute(node, "transA", 0):
                    continue
                turned = bool(attribute(node, "transB", 0))
                scale, bias_scale = attribute(node, "alpha", 1.0), attribute(node, "beta", 1.0)
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                if bias is not None and ((c := constant(bias)) is None or c.size not in (1, _columns(weight, turned))):
                    continue
            self._replace(editor, node, x, weight, bias, turned=turned, scale=scale, bias_scale=bias_scale)
            edits.append(applied(node, "runs as a packed product"))
        return edits

    def _replace(
        self,
        editor: Editor,
        node: ir.Node,
        x: ir.Value,
        weight: ir.Value,
        bias: ir.Value | None,
        *,
        turned: bool,
        scale: float,
        bias_scale: float,
    ) -> None:
        assert weight.shape is not None
        n = _columns(weight, turned)
        k = int(weight.shape[1 if turned else 0])  # type: ignore[arg-type]

        tensor = ir.convenience.get_const_tensor(weight)  # another reader may keep the value, and it becomes an input
        assert tensor is not None

        def values() -> Array:
            array = tensor.numpy()
            return gemm.pack(self.machine, (array.T if turned else array) * np.float32(scale))

        shape = gemm.packed_shape(self.machine, k, n)
        found = constant(bias)
        given = None if found is None else np.broadcast_to(found * np.float32(bias_scale), (1, n))[0]
        inputs = [
            x,
            packed(editor, f"{weight.name}_packed", shape, np.dtype(np.float32), values),
            editor.weight(f"{node.name}_bias", gemm.pack_bias(self.machine, given, n)),
        ]
        replace(node, "Gemm", inputs, {"n": n})


def _constant_matrix(value: ir.Value) -> bool:
    return ir.convenience.get_const_tensor(value) is not None and value.shape is not None and len(value.shape) == 2


def _columns(weight: ir.Value, turned: bool) -> int:
    assert weight.shape is not None
    return int(weight.shape[0 if turned else 1])  # type: ignore[arg-type]
