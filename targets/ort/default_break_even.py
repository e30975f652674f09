"""Break-even sparsities for machines that were not measured: Xeon (Emerald Rapids) with VNNI, one thread.

One row at a time it is the more cautious of that and of Zen 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from onnxcomp.break_even import BreakEven, Weights

_Case = tuple[Literal["matmul", "gated_mlp"], Weights, Weights, int, int]

# Op, sparse and dense weights, inputs and outputs; rows to sparsity.
_MEASURED: Mapping[_Case, Mapping[int, float]] = {
    ("matmul", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.15, 4: 0.43, 8: 0.58, 128: 0.76},
    ("matmul", "int8", "int8", 576, 1536): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.57},
    ("matmul", "int4", "int4", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("gated_mlp", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.16, 4: 0.5, 8: 0.73, 128: 0.86},
    ("gated_mlp", "int8", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.16, 128: 0.43},
    ("gated_mlp", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.13, 8: 0.45, 128: 0.76},
    ("gated_mlp", "int4", "int4", 576, 1536): {1: 0.21, 2: 0.2, 4: 0.34, 8: 0.46, 128: 0.51},
    ("matmul", "fp32", "fp32", 1536, 576): {1: 0.0, 2: 0.17, 4: 0.43, 8: 0.61, 128: 0.42},
    ("matmul", "int8", "int8", 1536, 576): {1: 0.2, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 1536, 576): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.55, 128: 0.84},
    ("matmul", "int4", "int4", 1536, 576): {1: 0.35, 2: 0.3, 4: 0.52, 8: 0.77, 128: 0.78},
    ("matmul", "fp32", "fp32", 2048, 2048): {1: 0.0, 2: 0.21, 4: 0.54, 8: 0.7, 128: 0.81},
    ("matmul", "int8", "int8", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.76},
    ("matmul", "int4", "int4", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.26, 4: 0.56, 8: 0.74, 128: 0.83},
    ("matmul", "int8", "int8", 2048, 5632): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.79},
    ("matmul", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.05, 4: 0.0, 8: 0.0, 128: 0.0},
    ("gated_mlp", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.42, 4: 0.66, 8: 0.77, 128: 0.9},
    ("gated_mlp", "int8", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.22, 128: 0.56},
    ("gated_mlp", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.11, 128: 0.6},
    ("gated_mlp", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.07, 8: 0.21, 128: 0.34},
    ("matmul", "fp32", "fp32", 5632, 2048): {1: 0.0, 2: 0.22, 4: 0.52, 8: 0.71, 128: 0.85},
    ("matmul", "int8", "int8", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.78},
    ("matmul", "int4", "int4", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
}

DEFAULT = tuple(
    BreakEven(
        op=op, weights=weights, dense=dense, inputs=inputs, outputs=outputs, rows=rows, threads=1, sparsity=sparsity
    )
    for (op, weights, dense, inputs, outputs), found in _MEASURED.items()
    for rows, sparsity in found.items()
)
