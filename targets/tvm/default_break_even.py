"""Break-even sparsities of kernels in TIR for machines that were not measured: Xeon (Emerald Rapids, VNNI), one thread.

Dense products of 8-bit weights are those of dynamically quantized activations.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxcomp.break_even import Op, Weights, entries

_Case = tuple[Op, Weights, Weights, int, int]

# Op, sparse and dense weights, inputs and outputs; rows to sparsity.
_MEASURED: Mapping[_Case, Mapping[int, float]] = {
    ("matmul", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.0},
    ("matmul", "int8", "int8", 576, 1536): {1: 0.11, 2: 0.36, 4: 0.51, 8: 0.74, 128: 1.0},
    ("matmul", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.01, 4: 0.41, 8: 0.66, 128: 1.0},
    ("gated_mlp", "fp32", "fp32", 576, 1536): {1: 0.0, 2: 0.21, 4: 0.39, 8: 0.65, 128: 0.87},
    ("gated_mlp", "int8", "int8", 576, 1536): {1: 0.23, 2: 0.54, 4: 0.68, 8: 0.81, 128: 1.0},
    ("gated_mlp", "int4", "int8", 576, 1536): {1: 0.0, 2: 0.2, 4: 0.54, 8: 0.73, 128: 1.0},
    ("matmul", "fp32", "fp32", 1536, 576): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.93},
    ("matmul", "int8", "int8", 1536, 576): {1: 0.24, 2: 0.53, 4: 0.54, 8: 0.81, 128: 1.0},
    ("matmul", "int4", "int8", 1536, 576): {1: 0.0, 2: 0.37, 4: 0.63, 8: 0.76, 128: 1.0},
    ("matmul", "fp32", "fp32", 2048, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.0, 128: 0.11},
    ("matmul", "int8", "int8", 2048, 2048): {1: 0.14, 2: 0.44, 4: 0.69, 8: 0.75, 128: 1.0},
    ("matmul", "int4", "int8", 2048, 2048): {1: 0.0, 2: 0.13, 4: 0.49, 8: 0.68, 128: 1.0},
    ("matmul", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.0, 4: 0.0, 8: 1.0, 128: 1.0},
    ("matmul", "int8", "int8", 2048, 5632): {1: 0.19, 2: 0.46, 4: 0.53, 8: 0.78, 128: 1.0},
    ("matmul", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.23, 4: 0.52, 8: 0.71, 128: 1.0},
    ("gated_mlp", "fp32", "fp32", 2048, 5632): {1: 0.0, 2: 0.28, 4: 0.47, 8: 0.78, 128: 0.93},
    ("gated_mlp", "int8", "int8", 2048, 5632): {1: 0.16, 2: 0.5, 4: 0.65, 8: 0.8, 128: 1.0},
    ("gated_mlp", "int4", "int8", 2048, 5632): {1: 0.0, 2: 0.09, 4: 0.45, 8: 0.66, 128: 1.0},
    ("matmul", "fp32", "fp32", 5632, 2048): {1: 0.0, 2: 0.0, 4: 0.0, 8: 0.21, 128: 1.0},
    ("matmul", "int8", "int8", 5632, 2048): {1: 0.21, 2: 0.52, 4: 0.57, 8: 0.8, 128: 1.0},
    ("matmul", "int4", "int8", 5632, 2048): {1: 0.0, 2: 0.21, 4: 0.52, 8: 0.7, 128: 1.0},
}

DEFAULT = entries(_MEASURED)
