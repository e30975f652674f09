"""Swaps calls of portable ops for the kernels of the native library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.edit import Editor
from onnxcomp.ops import DOMAIN, OPS
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused

# Where the kernel reads the weight of an input by columns, it wants it turned, so that a column is one run of memory.
_TURNED = {"GatedMLP": 2, "GatedMLPInt8": 2}


@dataclass(frozen=True, kw_only=True)
class NativeOps(Pass):
    """Makes calls of portable ops native ones, in the main graph and in subgraphs, where the kernels take their types.

    A call that stays as it is runs by the body of its function.
    """

    name: ClassVar[str] = "native_ops"
    summary: ClassVar[str] = "Portable ops to native kernels."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        edits = []
        turned: dict[ir.Value, ir.Value] = {}
        for node in list(model.graph.all_nodes()):
            if node.domain != DOMAIN or node.op_type not in OPS:
                continue
            if reason := _why_not(node):
                edits.append(refused(node, reason))
                continue
            if (index := _TURNED.get(node.op_type)) is not None:
                weight = node.inputs[index]
                assert weight is not None
                if weight not in turned:
                    turned[weight] = _turn(model, weight)
                node.replace_input_with(index, turned[weight])
            node.domain = native.DOMAIN
            model.opset_imports.setdefault(native.DOMAIN, 1)
            edits.append(applied(node, "runs in the native library"))
        for weight in turned:
            if not weight.uses() and not weight.is_graph_output() and weight.graph is not None:
                weight.graph.initializers.pop(str(weight.name), None)
        called = {n.op_identifier() for n in model.graph.all_nodes()}
        called |= {n.op_identifier() for f in model.functions.values() for n in f.all_nodes()}
        for key in [k for k in model.functions if k[0] == DOMAIN and k[1] in OPS and k not in called]:
            del model.functions[key]
        return edits


def _why_not(node: ir.Node) -> str:
    if not native.available():
        return "onnxcomp was installed without its native library"
    first = node.inputs[0] if node.inputs else None
    if first is None or first.dtype != ir.DataType.FLOAT:
        kind = "unknown" if first is None or first.dtype is None else first.dtype.name.lower()
        return f"the kernels take float activations, these are {kind}; the op runs by its function body"
    index = _TURNED.get(node.op_type)
    if index is not None:
        weight = node.inputs[index]
        if weight is None or weight.const_value is None or not weight.is_initializer() or weight.is_graph_input():
            return "the up projection is not a constant; the op runs by its function body"
    return ""


def _turn(model: ir.Model, weight: ir.Value) -> ir.Value:
    """The transposed weight, a new initializer that is computed when it is read."""
    tensor = weight.const_value
    assert tensor is not None
    shape = ir.Shape(tensor.shape.numpy()[::-1])

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T))

    value = Editor(model).weight(f"{weight.name}_turned", np.zeros((0, 0), tensor.dtype.numpy()))
    value.shape = shape
    value.const_value = ir.LazyTensor(read, dtype=tensor.dtype, shape=shape, name=value.name)
    return value
