"""What onnxruntime's CPU provider executes on integers, and what this CPU is good for.

Every placement was found by building the Q/DQ graph and reading the optimised graph back; a test repeats that.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from typing import Any

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from onnxcomp.cpu import cpu_flags
from onnxcomp.target import Capabilities, Placement
from onnxcomp.targets.ort import break_even
from onnxcomp.targets.ort.runtime import onnxruntime

# Sigmoid and LeakyRelu need their own parameters, too. Softmax has an integer kernel as well but is left out: scores
# rounded to 8 bits before the exponential cost accuracy. Sub, Div, HardSwish, Gelu, ReduceMean and Pad have none.
PLACEMENTS: Mapping[str, Placement] = {
    "Conv": Placement(kind="linear"),
    "Gemm": Placement(kind="linear", output=False),
    "MatMul": Placement(kind="linear", output=False),
    **{
        op: Placement(kind="elementwise")
        for op in ("Add", "Mul", "Concat", "GlobalAveragePool", "AveragePool", "Sigmoid", "LeakyRelu")
    },
    **{
        op: Placement(kind="passthrough")
        for op in (
            "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "MaxPool", "ReduceMax", "Reshape", "Slice",
            "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
        )
    },
}  # fmt: skip

_CONTRIB_OPS = frozenset(
    f"com.microsoft::{op}" for op in ("DynamicQuantizeLSTM", "GatherBlockQuantized", "MatMulNBits")
)

_FEATURES = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def capabilities(target: str) -> Capabilities:
    """Capabilities of onnxruntime on this CPU."""
    machine, flags = platform.machine(), cpu_flags()
    features = tuple(f for f in _FEATURES if f in flags)
    return Capabilities(
        target=target,
        max_opset=max_opset(),
        activation_dtypes=(ir.DataType.UINT8,),
        weight_dtypes=(ir.DataType.INT8,),
        placements=PLACEMENTS,
        reduce_range=reduce_range(machine, flags),
        features=features,
        contrib_ops=_CONTRIB_OPS,
        break_even=break_even.table(features),
    )


def reduce_range(machine: str, flags: frozenset[str]) -> bool:
    """Whether products of u8 and s8 are summed in saturating 16 bits, so that weights must keep to 7 bits.

    That is so on x86 without VNNI, or where the flags are not known. ARM kernels widen to 32 bits.
    """
    if machine.lower() not in {"x86_64", "amd64", "x86", "i386", "i686"}:
        return False
    return not flags & {"avx512_vnni", "avx_vnni", "amx_int8"}


@cache
def max_opset() -> int:
    """Highest opset in which the installed onnxruntime has the kernels that any quantized model needs.

    It loads models of opsets beyond that, and then misses kernels, so a probe with real ops is loaded.
    """
    runtime = onnxruntime()
    for opset in range(onnx.defs.onnx_opset_version(), 12, -1):
        options = runtime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            runtime.InferenceSession(_probe(opset).SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception:
            continue
        return opset
    return 13


def _probe(opset: int) -> onnx.ModelProto:
    """Ops that get a new version with most opsets, in a chain."""
    weights = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("zero", TensorProto.UINT8, [], [0]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [0]),
        helper.make_tensor("flat", TensorProto.INT64, [1], [-1]),
        helper.make_tensor("pads", TensorProto.INT64, [2], [0, 1]),
    ]
    chain: list[tuple[str, list[str], dict[str, Any]]] = [
        ("QuantizeLinear", ["scale", "zero"], {}),
        ("DequantizeLinear", ["scale", "zero"], {}),
        ("Cast", [], {"to": TensorProto.FLOAT}),
        ("Identity", [], {}),
        ("Transpose", [], {}),
        ("Unsqueeze", ["axis"], {}),
        ("Squeeze", ["axis"], {}),
        ("Flatten", [], {}),
        ("Reshape", ["flat"], {}),
        ("Pad", ["pads"], {}),
        ("Shape", [], {}),
    ]
    nodes = [
        helper.make_node(op, [f"v{i}", *extra], [f"v{i + 1}"], **attributes)
        for i, (op, extra, attributes) in enumerate(chain)
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, [2, 3])],
        [helper.make_tensor_value_info(f"v{len(chain)}", TensorProto.INT64, [1])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
