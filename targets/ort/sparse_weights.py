"""Whether a model has weights that sparse tensor cores take."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.model import all_nodes
from onnxcomp.ops import keeps_to
from onnxcomp.skeleton import release
from onnxcomp.target import Array

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8)
_KEPT, _GROUP = 2, 4


def has_sparse_weight(model: ir.Model) -> bool:
    """Whether a weight of a MatMul, Gemm or Conv has 2:4 zeros along the axis that is summed over.

    A stricter pattern, such as 1:4, is 2:4 as well. Reading stops at the first weight that is.
    """
    seen: set[ir.Value] = set()
    for node in all_nodes(model):
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
            continue
        value = node.inputs[1] if len(node.inputs) > 1 else None
        if value is not None and value not in seen:
            seen.add(value)
            if _is_sparse(node, value):
                return True
    return False


def _is_sparse(node: ir.Node, value: ir.Value) -> bool:
    outputs_first = node.op_type == "Conv" or bool(node.op_type == "Gemm" and attribute(node, "transB", 0))
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and list(attribute(producer, "perm", [1, 0])) == [1, 0]:
        outputs_first = not outputs_first
        producer, value = _behind(producer)
    if producer is not None and producer.op_type == "Cast":
        producer, value = _behind(producer)
    if producer is not None and producer.op_type == "DequantizeLinear":
        zero = constant(producer.inputs[2]) if len(producer.inputs) > 2 else None
        if zero is not None and zero.any():  # which TensorRT does not take
            return False
        _, value = _behind(producer)
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.dtype not in _TYPES:
        return False
    try:
        matrix = _matrix(tensor.numpy(), conv=node.op_type == "Conv", outputs_first=outputs_first)
        # Fewer inputs than a group keep to the pattern whatever they are.
        return matrix is not None and len(matrix) >= _GROUP and keeps_to(matrix, _KEPT, _GROUP)
    finally:
        if isinstance(tensor, ir.ExternalTensor):
            release(tensor)


def _behind(node: ir.Node) -> tuple[ir.Node | None, ir.Value]:
    """What a node with one input reads, and what made that."""
    value = node.inputs[0]
    assert value is not None
    return value.producer(), value


def _matrix(array: Array, *, conv: bool, outputs_first: bool) -> Array | None:
    """`(K, N)`; for a Conv, the channels of a group by its outputs and kernel positions."""
    if not array.size:
        return None
    if conv:
        return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)
    if array.ndim != 2:
        return None
    return array.T if outputs_first else array
