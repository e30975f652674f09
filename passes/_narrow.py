"""4-bit weights for single layers of a model whose other layers are quantized statically or float."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import onnx_ir as ir

from onnxcomp.model import model_size
from onnxcomp.passes._sensitivity import Trials, exactly
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Edit
from onnxcomp.select import Select
from onnxcomp.target import Capabilities

_STEP = WeightOnly(bits=4, block_size=64)


def has_kernel(capabilities: Capabilities) -> bool:
    """Whether the target computes with stored 4-bit weights; integers of fewer bits in bytes save nothing."""
    return "com.microsoft::MatMulNBits" in capabilities.contrib_ops


def narrow(model: ir.Model, names: Collection[str], trials: Trials) -> Sequence[Edit]:
    """Gives the named float MatMul and Gemm ops 4-bit weights in blocks, in place."""
    if not names:
        return []
    step = replace(_STEP, where=Select(name=tuple(exactly(n) for n in names)))
    return step.apply(model, trials.context)


def by_cost(trials: Trials, nodes: Collection[ir.Node]) -> list[str]:
    """Names of the nodes that take 4 bits, the least error of the outputs for each byte saved against float first."""
    whole = model_size(trials.model).weight_bytes
    found: list[tuple[float, str]] = []
    for node in nodes:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        trial = trials.model.clone()
        narrow(trial, [node.name or ""], trials)
        saved = whole - model_size(trial).weight_bytes
        if saved > 0:
            found.append((trials.difference(trial)[0] / saved, node.name or ""))
    return [name for _, name in sorted(found)]
