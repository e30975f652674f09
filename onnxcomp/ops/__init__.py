"""The portable op set, domain `onnxcomp`: ops that a pass may write and any runtime can run.

A portable op is called through a model-local function whose body is plain ONNX. The rewritten model therefore runs at
once everywhere, and its body is the numeric reference. A target that has a kernel swaps the call for the op of the same
name in the domain `onnxcomp.native` (see `onnxcomp.native`); all others inline the body. The two domains are kept apart
so that a runtime never has to choose between a kernel and a body.

To use one in a pass: `OPS["ThresholdMatMul"].install(model)`, then add a node of that op type and `DOMAIN`.

Attributes: `one_sided` (default 0) compares a value instead of its magnitude. Ops with integer weights take `exact`
(default 0): kernels may round activations to 8 bits unless it is 1. The bodies never round.

`OPS` leave out activations; `DELTA_OPS` hold what changed too little; `NM_OPS` have weights without the zeros of an N:M
pattern (`pack_nm`, `unpack_nm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from onnxcomp.ops._delta import (
    delta_gru,
    delta_hold,
    delta_hold_pixels,
    delta_lstm,
    gru_op,
    hold_op,
    hold_pixels_op,
    lstm_op,
)
from onnxcomp.ops._gated_mlp import gated_mlp, gated_mlp_op
from onnxcomp.ops._matmul import threshold_matmul, threshold_op, topk_matmul, topk_op
from onnxcomp.ops._nm import nm_int8_op, nm_matmul, nm_op
from onnxcomp.ops._nm_packing import LARGEST_GROUP, index_bits, pack_nm, unpack_nm
from onnxcomp.ops._nm_patterns import keeps_to, packed_bytes, smallest_pattern
from onnxcomp.ops._op import DOMAIN, MIN_OPSET, VERSION, PortableOp
from onnxcomp.ops._weights import FORMATS, GROUP, Format

__all__ = [
    "DELTA_OPS",
    "DOMAIN",
    "FORMATS",
    "GROUP",
    "LARGEST_GROUP",
    "MIN_OPSET",
    "NM_OPS",
    "OPS",
    "SPARSITY",
    "VERSION",
    "Format",
    "PortableOp",
    "delta_gru",
    "delta_hold",
    "delta_hold_pixels",
    "delta_lstm",
    "gated_mlp",
    "index_bits",
    "keeps_to",
    "nm_matmul",
    "pack_nm",
    "packed_bytes",
    "smallest_pattern",
    "threshold_matmul",
    "topk_matmul",
    "unpack_nm",
]

OPS: Mapping[str, PortableOp] = MappingProxyType(
    {op.name: op for make in (threshold_op, topk_op, gated_mlp_op) for op in map(make, FORMATS)}
)
"""Name to portable op that leaves out inputs."""

NM_OPS: Mapping[str, PortableOp] = MappingProxyType({op.name: op for op in (nm_op(), nm_int8_op())})
"""Name to portable op whose weight is N:M sparse. Apart from `OPS`, since its weight has no format of theirs."""

DELTA_OPS: Mapping[str, PortableOp] = MappingProxyType(
    {op.name: op for op in (hold_op(), hold_pixels_op(), gru_op(), lstm_op())}
)
"""Name to portable op of a streaming model. Apart from `OPS`, since these have no weights, or those of an RNN."""

SPARSITY = "onnxcomp.sparsity"
"""Metadata of a node: the share of its inputs that is dropped, 0 to 1, as calibration saw it."""
