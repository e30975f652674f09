"""Puts Q/DQ pairs around ops that only move values, where runtimes do not look through them."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.edit import users
from onnxcomp.passes._legalize.graph import (
    Work,
    dequantized,
    insert_pair,
    is_op,
    only_reader,
    quantized,
    weight_of,
)


def pair_behind_moves(work: Work) -> None:
    """`DQ -> op -> integer op` gets a Q/DQ pair of the same parameters behind the op, which is exact."""
    for node in work.nodes(*_passthrough(work)):
        found = dequantized(node.inputs[0])
        if found is None or len(node.outputs) != 1 or found[1].axis is not None:
            continue
        output = node.outputs[0]
        if any(is_op(u, "QuantizeLinear") for u in users(output)) or not _wanted(work, output):
            continue
        insert_pair(work, output, found[1])
        work.done(node, "a Q/DQ pair with the parameters of its input put behind it")


def pair_before_moves(work: Work) -> None:
    """`linear op -> op -> Q` gets a Q/DQ pair of the same parameters before the op, which is exact."""
    for node in work.nodes(*_passthrough(work)):
        value = node.inputs[0]
        quantize = only_reader(node.outputs[0], "QuantizeLinear") if len(node.outputs) == 1 else None
        if value is None or quantize is None or only_reader(value, node.op_type) is not node:
            continue
        found = quantized(quantize)
        if found is None or found[0].axis is not None or not _computed_on_integers(work, value):
            continue
        insert_pair(work, value, found[0], [node])
        work.done(node, "a Q/DQ pair with the parameters of its output put before it")


def _passthrough(work: Work) -> tuple[str, ...]:
    return tuple(op for op, placement in work.capabilities.placements.items() if placement.kind == "passthrough")


def _computed_on_integers(work: Work, value: ir.Value) -> bool:
    """Whether an op with an integer kernel computes `value`, a Relu or Clip or more moves in between."""
    node = value.producer()
    while node is not None and (work.kind(node) == "passthrough" or is_op(node, "Relu", "Clip")):
        source = node.inputs[0]
        if source is None or only_reader(source, node.op_type) is not node:
            return False
        node = source.producer()
    return work.kind(node) in ("linear", "elementwise")


def _wanted(work: Work, value: ir.Value) -> bool:
    """Whether an op that has an integer kernel reads `value`, perhaps behind more moves."""
    for reader in users(value):
        kind = work.kind(reader)
        if weight_of(reader) is not None and reader.inputs[0] is value:
            return True
        if kind == "elementwise" and only_reader(reader.outputs[0], "QuantizeLinear") is not None:
            return True
        if kind == "passthrough" and reader.inputs[0] is value and _wanted(work, reader.outputs[0]):
            return True
    return False
