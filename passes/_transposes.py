"""Transposes large weights once and for all, without holding a transposed copy of the model in memory."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute
from onnxcomp.skeleton import release


def transpose_weights(model: ir.Model) -> None:
    """Replaces every Transpose that alone reads a weight of the main graph by a weight that is transposed when read."""
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and node.domain == "" else None
        if weight is None or not weight.is_initializer() or weight.is_graph_input() or len(weight.uses()) > 1:
            continue
        tensor, output = weight.const_value, node.outputs[0]
        if tensor is None or weight.is_graph_output() or output.is_graph_output():
            continue
        sizes = tensor.shape.numpy()
        order = tuple(attribute(node, "perm", range(len(sizes))[::-1]))
        if sorted(order) != list(range(len(sizes))):
            continue
        lazy = ir.LazyTensor(
            partial(_transposed, tensor, order),
            dtype=tensor.dtype,
            shape=ir.Shape([sizes[i] for i in order]),
            name=output.name,
        )
        value = ir.Value(name=output.name, const_value=lazy, shape=lazy.shape, type=ir.TensorType(tensor.dtype))
        ir.convenience.replace_all_uses_with(output, value)
        model.graph.remove(node, safe=True)
        model.graph.initializers.pop(str(weight.name))
        model.graph.register_initializer(value)


def _transposed(tensor: ir.TensorProtocol, order: tuple[int, ...]) -> ir.TensorProtocol:
    array = np.array(np.transpose(tensor.numpy(), order), order="C")
    if isinstance(tensor, ir.ExternalTensor):
        release(tensor)
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
