"""What kernels of the TVM targets execute on integers."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from onnxcomp.break_even import BreakEven
from onnxcomp.target import Capabilities, Placement
from onnxcomp.targets.tvm.machine import Machine

MAX_OPSET = 23
"""Highest version of the default domain up to which TVM's importer is known to be right."""

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
        for op in ("Flatten", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
    },
}


def capabilities(target: str, machine: Machine, break_even: tuple[BreakEven, ...] = ()) -> Capabilities:
    """Capabilities of a TVM target for a board.

    Args:
        target: Name of the target.
        machine: The board.
        break_even: When sparse kernels pay on it.
    """
    return Capabilities(
        target=target,
        max_opset=MAX_OPSET,
        activation_dtypes=(ir.DataType.UINT8,),
        weight_dtypes=(ir.DataType.INT8,),
        placements=PLACEMENTS,
        features=machine.instruction_sets,
        break_even=break_even,
    )
