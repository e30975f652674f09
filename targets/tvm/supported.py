"""What can be compiled by TVM, told before anything is imported; this module does not import TVM.

TVM's importer finds out in the middle of its work, speaks of op types only, and takes some ops that it then computes
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.edit import attribute
from onnxcomp.errors import UnsupportedError
from onnxcomp.targets.tvm.nodes import DOMAIN

IMPORTED = frozenset({
    "Abs", "Acos", "Acosh", "Add", "AffineGrid", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh",
    "AveragePool", "BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast",
    "CastLike", "Ceil", "Clip", "Compress", "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Cos",
    "Cosh", "CumSum", "DepthToSpace", "DequantizeLinear", "Div", "Dropout", "DynamicQuantizeLinear", "Einsum", "Elu",
    "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "Gelu",
    "Gemm", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample",
    "GroupNormalization", "HardSigmoid", "HardSwish", "Hardmax", "Identity", "If", "InstanceNormalization", "IsInf",
    "IsNaN", "LRN", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpPool", "MatMul",
    "MatMulInteger", "Max", "MaxPool", "MaxUnpool", "Mean", "MeanVarianceNormalization", "Min", "Mish", "Mod", "Mul",
    "Neg", "NonMaxSuppression", "NonZero", "Not", "Or", "PRelu", "Pad", "Pow", "QuantizeLinear",
    "RMSNormalization", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
    "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize", "RoiAlign",
    "Round", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh",
    "Size", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tan",
    "Tanh", "ThresholdedRelu", "Tile", "TopK", "Transpose", "Trilu", "Unique", "Unsqueeze", "Upsample", "Where", "Xor",
})  # fmt: skip
"""Ops of the default domain that TVM's importer takes and gets right, as far as is known."""

LOWERED = frozenset({"GRU", "LSTM"})
"""Ops that TVM's importer does not take, but kernels of ours do, in most forms."""

_HINTS = {
    "Attention": "export with opset 22 or older, so that attention is written in products and a softmax",
    "LSTM": "fix its shapes, export one time step and carry the state, or compile the model for ort-cpu",
    "GRU": "fix its shapes, export one time step and carry the state, or compile the model for ort-cpu",
    "RNN": "compile it for ort-cpu, or export one time step and carry the state",
    "Loop": "compile it for ort-cpu, or export the body and loop in the program",
    "Scan": "compile it for ort-cpu, or export the body and loop in the program",
    "MatMulNBits": "compile it for ort-cpu, or make the weights onnxcomp's own by the pass weight_only",
}
_ELSEWHERE = "compile the model for ort-cpu instead"

_FOUR_BITS = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1})


def require_supported(model: ir.Model, lowered: frozenset[str] = frozenset()) -> None:
    """Refuses a model that TVM cannot compile.

    Args:
        model: The model; functions are looked into, and nodes of ours taken for granted.
        lowered: Ops of the default domain that passes are going to replace.

    Raises:
        UnsupportedError: With up to three nodes and what to do.
    """
    found = list(_problems(model, lowered))
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise UnsupportedError("TVM cannot compile this model: " + "; ".join(found[:3]) + more)


def _problems(model: ir.Model, lowered: frozenset[str]) -> Iterator[str]:
    functions = model.functions
    pending: list[tuple[ir.Node, str]] = [(node, "") for node in model.graph.all_nodes()]
    seen: set[ir.OperatorIdentifier] = set()
    while pending:
        node, where = pending.pop(0)
        if node.domain == DOMAIN or (not node.domain and node.op_type in lowered):
            continue
        if (key := node.op_identifier()) in functions:
            if key not in seen:
                seen.add(key)
                pending += [(inner, f" in function {node.op_type!r}") for inner in functions[key].all_nodes()]
            continue
        if reason := _why_not(node):
            yield f"node {node.name!r}{where}: {reason}"


def _why_not(node: ir.Node) -> str:
    """Why a node cannot be compiled, and what to do; empty if it can."""
    name = node.op_type if not node.domain else f"{node.domain}::{node.op_type}"
    if node.domain not in ("", "ai.onnx") or node.op_type not in IMPORTED:
        return f"there is no {name}; {_HINTS.get(node.op_type, _ELSEWHERE)}"
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and attribute(node, "block_size", 0):
        return f"{name} has blocks of {attribute(node, 'block_size')}; quantize per channel, or {_ELSEWHERE}"
    for value in (*node.inputs, *node.outputs):
        if value is None or value.dtype is None:
            continue
        if value.dtype in _FOUR_BITS:
            return f"{value.name!r} has 4-bit elements; use 8 bits or the sparse ops' packed weights, or {_ELSEWHERE}"
        if value.dtype == ir.DataType.STRING:
            return f"{value.name!r} holds strings; take text apart before the model"
    return ""
