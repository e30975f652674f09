"""Weights of held products as 8-bit integers, so that a changed input reads a quarter of the bytes."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.passes._delta_sites import Site
from onnxcomp.quant import weight_grid


def to_int8(model: ir.Model, sites: Iterable[Site]) -> None:
    """Gives products that read held elements int8 weights with one scale an output channel, behind DequantizeLinear.

    Activations stay floats: what is added to a sum step by step must not be rounded anew in each of them. Weights that
    are quantized already stay what they are.

    Args:
        model: The model.
        sites: Held values; maps are left out.
    """
    done: dict[tuple[ir.Value, int], ir.Value] = {}
    for site in sites:
        for node in () if site.pixels else site.readers:
            weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
            if weight is None or weight.dtype != ir.DataType.FLOAT or not weight.is_initializer():
                continue
            axis = 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
            array = constant(weight)
            if array is None or array.ndim != 2:
                continue
            if (weight, axis) not in done:
                assert isinstance(weight.graph, ir.Graph)
                editor = Editor(model, weight.graph)
                grid = weight_grid(array, 8, axis)
                parts = [
                    editor.weight(f"{weight.name}_{name}", values)
                    for name, values in (
                        ("q", grid.quantize(array)), ("scale", grid.scale), ("zero_point", grid.zero_point)
                    )
                ]  # fmt: skip
                done[weight, axis] = editor.after(
                    weight, "DequantizeLinear", parts, name=f"{weight.name}_dequantized", attributes={"axis": axis},
                    like=weight,
                )  # fmt: skip
            node.replace_input_with(1, done[weight, axis])
