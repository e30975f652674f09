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
    ("matmul", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.33, 4: 0.53, 8: 0.67, 128: 0.75},
    ("matmul", "int8", "int8", 576, 1536): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.54},
    ("matmul", "int4", "int4", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("gated_mlp", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.44, 4: 0.66, 8: 0.76, 128: 0.85},
    ("gated_mlp", "int8", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.03, 8: 0.21, 128: 0.39},
    ("gated_mlp", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.15, 8: 0.47, 128: 0.76},
    ("gated_mlp", "int4", "int4", 576, 1536): {1: 0.21, 2: 0.23, 4: 0.38, 8: 0.48, 128: 0.5},
    ("matmul", "fp32", "fp32", 1536, 576): {1: 0.0, 2: 0.39, 4: 0.58, 8: 0.71, 128: 0.78},
    ("matmul", "int8", "int8", 1536, 576): {1: 0.2, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 1536, 576): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.62, 128: 0.85},
    ("matmul", "int4", "int4", 1536, 576): {1: 0.35, 2: 0.32, 4: 0.55, 8: 0.77, 128: 0.78},
    ("matmul", "fp32", "fp32", 2048, 2048): {1: 0.0, 2: 0.43, 4: 0.65, 8: 0.77, 128: 0.82},
    ("matmul", "int8", "int8", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.76},
    ("matmul", "int4", "int4", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.44, 4: 0.65, 8: 0.76, 128: 0.83},
    ("matmul", "int8", "int8", 2048, 5632): {1: 0.12, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.78},
    ("matmul", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.12, 4: 0.0, 8: 0.0, 128: 0.0},
    ("gated_mlp", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.44, 4: 0.65, 8: 0.76, 128: 0.9},
    ("gated_mlp", "int8", "int8", 2048, 5632): {1: 0.0, 2: 0.02, 4: 0.15, 8: 0.34, 128: 0.56},
    ("gated_mlp", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.08, 128: 0.61},
    ("gated_mlp", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.13, 8: 0.21, 128: 0.33},
    ("matmul", "fp32", "fp32", 5632, 2048): {1: 0.01, 2: 0.42, 4: 0.64, 8: 0.76, 128: 0.84},
    ("matmul", "int8", "int8", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int4", "int8", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.77},
    ("matmul", "int4", "int4", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
}

DEFAULT = tuple(
    BreakEven(
        op=op, weights=weights, dense=dense, inputs=inputs, outputs=outputs, rows=rows, threads=1, sparsity=sparsity
    )
    for (op, weights, dense, inputs, outputs), found in _MEASURED.items()
    for rows, sparsity in found.items()
)
