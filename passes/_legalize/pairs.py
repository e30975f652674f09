"""Removes QuantizeLinear and DequantizeLinear that cancel, repeat or follow one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import redirect, replace_output, users
from onnxcomp.passes._legalize.clips import overlaps, saturate
from onnxcomp.passes._legalize.graph import (
    LINEAR,
    Work,
    clip_limits,
    dequantized,
    grid_of,
    is_op,
    only_reader,
    operand,
    producer,
    quantized,
    same_grid,
    set_operand,
    stored,
)
from onnxcomp.quant import Grid

# Op on integers: input of the output's scale; its zero point follows.
_OUTPUT_SCALE = {
    "QLinearConv": 6, "QLinearMatMul": 6, "QGemm": 7, "QLinearAdd": 6, "QLinearMul": 6, "QLinearSigmoid": 3,
    "QLinearLeakyRelu": 3, "QLinearAveragePool": 3, "QLinearGlobalAveragePool": 3,
}  # fmt: skip


def drop_inverse(work: Work) -> None:
    """`DequantizeLinear -> QuantizeLinear` of the same parameters is nothing."""
    for quantize in work.nodes("QuantizeLinear"):
        dequantize = producer(quantize.inputs[0], "DequantizeLinear")
        output = quantize.outputs[0]
        if dequantize is None or output.is_graph_output():
            continue
        before, after = grid_of(dequantize), grid_of(quantize)
        integers = dequantize.inputs[0]
        if before is None or after is None or integers is None or not same_grid(before, after):
            continue
        redirect(output, integers, users(output))
        work.done(quantize, "dropped: it undoes a DequantizeLinear of the same parameters")


def merge_equal(work: Work) -> None:
    """Several QuantizeLinear of the same parameters on one value become one."""
    for value in [v for n in list(work.model.graph) for v in n.outputs] + list(work.model.graph.inputs):
        kept: list[tuple[ir.Node, Grid]] = []
        for quantize in users(value):
            if not is_op(quantize, "QuantizeLinear") or quantize.inputs[0] is not value or not work.where(quantize):
                continue
            grid, output = grid_of(quantize), quantize.outputs[0]
            if grid is None or output.is_graph_output() or quantize.graph is not work.model.graph:
                continue
            twin = next((n for n, other in kept if same_grid(grid, other)), None)
            if twin is None:
                kept.append((quantize, grid))
            elif users(output):
                redirect(output, twin.outputs[0], users(output))
                work.done(quantize, f"merged with {twin.name}, which has the same parameters")


def drop_first_of_two(work: Work) -> None:
    """Of two roundings that follow one another, a Relu or Clip between them or not, the first is dropped.

    What the first saturates, the second does then. The result differs by at most half a step of the first, and is
    nearer to the float model.
    """
    for second in work.nodes("QuantizeLinear"):
        grid = grid_of(second)
        value = second.inputs[0]
        if grid is None or grid.axis is not None or value is None:
            continue
        activation = producer(value, "Relu", "Clip")
        middle = value if activation is None else activation.inputs[0]
        found = dequantized(middle)
        if found is None or middle is None or not _alone(value, middle, second):
            continue
        dequantize, first = found
        same = same_grid(first, grid)
        if first.axis is not None or (same and activation is None) or (work.exact and not same):
            continue
        limits = (-np.inf, np.inf) if activation is None else clip_limits(activation)
        source = _source(dequantize, first)
        if limits is None or source is None or grid.dtype != first.dtype:
            continue
        limits = max(float(first.low), limits[0]), min(float(first.high), limits[1])
        if limits[0] > limits[1] or not overlaps(grid, limits):
            continue
        detail = _join(work, source, second, grid, limits)
        between = "" if activation is None else f" and {activation.op_type} {activation.name}"
        work.done(dequantize, f"rounding{between} dropped, since {second.name} rounds behind it; {detail}")


def _alone(value: ir.Value, middle: ir.Value, second: ir.Node) -> bool:
    """Whether nothing else reads what stands between the two."""
    if second.outputs[0].is_graph_output():
        return False
    return all(len(users(v)) == 1 and not v.is_graph_output() for v in (value, middle))


def _source(dequantize: ir.Node, grid: Grid) -> ir.Node | None:
    """The op with integer output that only `dequantize` reads, perhaps through a Clip."""
    integers = dequantize.inputs[0]
    if integers is None or len(users(integers)) != 1 or integers.is_graph_output():
        return None
    node = integers.producer()
    if node is not None and is_op(node, "Clip"):
        clipped = node.inputs[0]
        if clipped is None or len(users(clipped)) != 1:
            return None
        node = clipped.producer()
    if node is None:
        return None
    if is_op(node, "QuantizeLinear"):
        own = grid_of(node)
        return node if own is not None and same_grid(own, grid) else None
    return node if node.op_type in _OUTPUT_SCALE else None


def _join(work: Work, source: ir.Node, second: ir.Node, grid: Grid, limits: tuple[float, float]) -> str:
    if is_op(source, "QuantizeLinear"):
        second.replace_input_with(0, source.inputs[0])
        return saturate(work, second, second.outputs[0], grid, limits)
    index = _OUTPUT_SCALE[source.op_type]
    for offset in (0, 1):
        parameter = operand(second, 1 + offset)
        assert parameter is not None
        set_operand(source, index + offset, parameter)
    integers = source.outputs[0]
    redirect(second.outputs[0], integers, users(second.outputs[0]))
    return saturate(work, source, integers, grid, limits, index)


def read_rounded(work: Work) -> None:
    """Everyone reads the rounded output of a linear op, since integer kernels need one QuantizeLinear as only reader.

    So it is with an elementwise op, if all that reads its output can work on integers.
    """
    for node in work.nodes(*work.capabilities.placements):
        linear = node.op_type in LINEAR
        value = _behind(node) if linear else node.outputs[0]
        quantizers = [u for u in users(value) if is_op(u, "QuantizeLinear") and u.inputs[0] is value]
        others = [u for u in users(value) if u not in quantizers]
        if not quantizers or (len(quantizers) == 1 and not others and not value.is_graph_output()):
            continue
        if linear and not _dequantized_inputs(node):
            continue
        if not linear and (value.is_graph_output() or not _may_be_rounded(work, node, others)):
            continue
        if work.exact:
            work.refuse(node, f"its float output {value.name!r} is read besides a QuantizeLinear, exactly")
            continue
        widest = max(quantizers, key=_span)
        grid = quantized(widest)
        if grid is None or not all(_covers(grid[0], q) for q in quantizers):
            work.refuse(node, f"its output {value.name!r} is quantized twice, and no range holds the other")
            continue
        rest = [*others, *(q for q in quantizers if q is not widest)]
        if any(u.graph is not work.model.graph for u in rest):
            work.refuse(node, f"its float output {value.name!r} is read in a subgraph besides a QuantizeLinear")
            continue
        output = _dequantizer(work, widest, value)
        redirect(value, output, rest)
        if value.is_graph_output():
            replace_output(value, output)
        names = [u.name for u in rest] or ["the graph's output"]
        work.done(node, f"its readers {names} take the rounded output, so that only {widest.name} reads the float one")


def _may_be_rounded(work: Work, node: ir.Node, readers: Sequence[ir.Node]) -> bool:
    """Whether an elementwise op and those who read its float output can all work on integers."""
    quantized = work.kind(node) == "elementwise" and any(dequantized(v) for v in node.inputs)
    return quantized and all(work.kind(reader) for reader in readers)


def _behind(node: ir.Node) -> ir.Value:
    """Output of a linear op, with a bias Add and then a Relu or Clip that alone read it."""
    value = node.outputs[0]
    add = only_reader(value, "Add") if node.op_type == "MatMul" else None
    if add is not None and any(stored(v) is not None or producer(v, "DequantizeLinear") for v in add.inputs):
        value = add.outputs[0]
    activation = only_reader(value, "Relu", "Clip")
    return value if activation is None else activation.outputs[0]


def _dequantized_inputs(node: ir.Node) -> bool:
    return all(producer(operand(node, i), "DequantizeLinear") is not None for i in (0, 1))


def _span(quantize: ir.Node) -> float:
    found = quantized(quantize)
    return -1.0 if found is None or found[0].axis is not None else float(found[0].high - found[0].low)


def _covers(wide: Grid, quantize: ir.Node) -> bool:
    """Whether what another quantizer represents is represented by `wide` to within half a step."""
    found = quantized(quantize)
    if found is None or wide.axis is not None or found[0].axis is not None:
        return False
    slack = float(wide.scale) / 2
    return float(found[0].low) >= float(wide.low) - slack and float(found[0].high) <= float(wide.high) + slack


def _dequantizer(work: Work, quantize: ir.Node, like: ir.Value) -> ir.Value:
    """Output of a DequantizeLinear behind `quantize`, a Clip on the integers included."""
    found = quantized(quantize)
    assert found is not None
    for reader in users(found[1]):
        if is_op(reader, "DequantizeLinear") and not reader.outputs[0].is_graph_output():
            return reader.outputs[0]
    return work.editor.after(
        found[1], "DequantizeLinear", [found[1], *quantize.inputs[1:]], name=f"{like.name}_dq", like=like
    )
