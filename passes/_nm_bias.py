"""The bias of a layer whose weight was changed: it takes in what the change shifts the outputs by on average."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute
from onnxcomp.passes._bias import Bias, find_bias, set_bias
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.qdq import dequantized_weight
from onnxcomp.target import Array


def bias_of(layer: Layer) -> Bias | None:
    """The bias that can make up for a change of a weight: constant, and of the only op that multiplies by it."""
    if len(layer.readers) != 1:
        return None
    node = layer.nodes[0]
    bias = find_bias(node)
    array = None if bias is None else dequantized_weight(bias.value)
    if array is None or array.shape != (layer.outputs,) or not _factor(node):
        return None
    return bias


def correct(editor: Editor, layer: Layer, bias: Bias, change: Array, means: Array) -> None:
    """Adds to the bias what the outputs lose on average.

    Args:
        editor: Of the model.
        layer: The layer.
        bias: Its bias.
        change: Old weight less the new one, float64 (groups, N / groups, K).
        means: Of the inputs, float64 (groups, K).
    """
    shift = np.einsum("gnk,gk->gn", change, means).reshape(-1) * _factor(layer.nodes[0])
    set_bias(editor, bias, shift.astype(np.float32))


def _factor(node: ir.Node) -> float:
    """What a Gemm multiplies its product by, relative to its bias; 0 if the bias does not count."""
    if node.op_type != "Gemm":
        return 1.0
    beta = float(attribute(node, "beta", 1.0))
    return float(attribute(node, "alpha", 1.0)) / beta if beta else 0.0
