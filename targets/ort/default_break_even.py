"""Break-even sparsities of a common machine, for those that were not measured: Zen 4 with VNNI, one thread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from onnxcomp.break_even import BreakEven, Weights

_Case = tuple[Literal["matmul", "gated_mlp"], Weights, Weights, int, int]

# Op, sparse and dense weights, inputs and outputs; rows to sparsity.
_MEASURED: Mapping[_Case, Mapping[int, float]] = {
    ("matmul", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.06, 4: 0.44, 8: 0.67, 32: 0.83},
    ("matmul", "int8", "int8", 576, 1536): {1: 0.12, 2: 0.39, 4: 0.46, 8: 0.46, 32: 0.49},
    ("matmul", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.12, 32: 0.24},
    ("matmul", "int4", "int4", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 32: 0.0},
    ("gated_mlp", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.33, 4: 0.59, 8: 0.74, 32: 0.88},
    ("gated_mlp", "int8", "int8", 576, 1536): {1: 0.0, 2: 0.51, 4: 0.59, 8: 0.6, 32: 0.62},
    ("gated_mlp", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.47, 4: 0.57, 8: 0.58, 32: 0.66},
    ("gated_mlp", "int4", "int4", 576, 1536): {1: 0.21, 2: 0.56, 4: 0.56, 8: 0.52, 32: 0.55},
    ("matmul", "fp32", "fp32", 1536, 576): {1: 0.0, 2: 0.32, 4: 0.56, 8: 0.72, 32: 0.84},
    ("matmul", "int8", "int8", 1536, 576): {1: 0.2, 2: 0.52, 4: 0.56, 8: 0.56, 32: 0.57},
    ("matmul", "int4", "int8", 1536, 576): {1: 0.12, 2: 0.51, 4: 0.56, 8: 0.59, 32: 0.55},
    ("matmul", "int4", "int4", 1536, 576): {1: 0.35, 2: 0.55, 4: 0.56, 8: 0.53, 32: 0.47},
    ("matmul", "fp32", "fp32", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.44, 8: 0.68, 32: 0.81},
    ("matmul", "int8", "int8", 2048, 2048): {1: 0.0, 2: 0.38, 4: 0.51, 8: 0.54, 32: 0.6},
    ("matmul", "int4", "int8", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.19, 8: 0.28, 32: 0.36},
    ("matmul", "int4", "int4", 2048, 2048): {1: 0.0, 2: 0.13, 4: 0.23, 8: 0.21, 32: 0.22},
    ("matmul", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.36, 4: 0.65, 8: 0.73, 32: 0.82},
    ("matmul", "int8", "int8", 2048, 5632): {1: 0.12, 2: 0.4, 4: 0.46, 8: 0.52, 32: 0.52},
    ("matmul", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.1, 8: 0.2, 32: 0.31},
    ("matmul", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.12, 4: 0.15, 8: 0.16, 32: 0.17},
    ("gated_mlp", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.35, 4: 0.65, 8: 0.79, 32: 0.87},
    ("gated_mlp", "int8", "int8", 2048, 5632): {1: 0.0, 2: 0.38, 4: 0.54, 8: 0.59, 32: 0.44},
    ("gated_mlp", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.2, 8: 0.32, 32: 0.42},
    ("gated_mlp", "int4", "int4", 2048, 5632): {1: 0.0, 2: 0.13, 4: 0.26, 8: 0.27, 32: 0.29},
}

DEFAULT = tuple(
    BreakEven(
        op=op, weights=weights, dense=dense, inputs=inputs, outputs=outputs, rows=rows, threads=1, sparsity=sparsity
    )
    for (op, weights, dense, inputs, outputs), found in _MEASURED.items()
    for rows, sparsity in found.items()
)
