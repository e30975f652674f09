"""Weights of thresholded products in the formats of the portable ops: float, int8 a column, 4 bits in groups of 32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.blockwise import quantize_blocks
from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.ops import GROUP
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._feed_forward import Part
from onnxcomp.quant import weight_grid
from onnxcomp.target import Array

Storage = Literal["keep", "int8", "int4"]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A weight as inputs of a portable op.

    Attributes:
        suffix: Of the op's name.
        values: The inputs.
    """

    suffix: str
    values: tuple[ir.Value, ...]


class Weights:
    """Makes the weights; those that several products share are made once.

    Args:
        editor: Of the main graph.
        storage: `keep` takes float weights as they are and integers where an op takes just these; the others quantize.
    """

    def __init__(self, editor: Editor, storage: Storage) -> None:
        self._editor, self._storage = editor, storage
        self._made: dict[tuple[ir.Value | None, int, int, bool], Stored] = {}

    def of(self, dense: Dense) -> Stored | None:
        """The weight of a product; None where its integers have a format that no op takes."""
        return self.part(Part(value=dense.output, dense=dense, start=0, stop=dense.outputs))

    def part(self, part: Part, *, by_output: bool = False) -> Stored | None:
        """The weight of some output channels; 4-bit groups run along the inputs if it is read `by_output`."""
        dense = part.dense
        if self._storage == "keep" and dense.quantized:
            return _int8_columns(self._editor, dense) if not part.merged else None
        by_output = by_output and self._storage == "int4"
        if self._storage == "int4" and (dense.inputs if by_output else part.stop - part.start) % GROUP:
            return None
        key = (dense.node.inputs[1], part.start, part.stop, by_output)
        if key not in self._made:
            self._made[key] = self._make(part, by_output)
        return self._made[key]

    def columns(self, part: Part) -> ir.Value:
        """The float weight of some output channels, as (inputs, outputs)."""
        name = f"{part.dense.node.name}_{part.start}_{part.stop}"
        matrix = part.dense.matrix()[:, part.start : part.stop]
        return self._editor.weight(name, np.ascontiguousarray(_typed(part.dense, matrix)))

    def _make(self, part: Part, by_output: bool) -> Stored:
        dense, weight = part.dense, self._editor.weight
        if self._storage == "keep":
            if not part.merged and dense.direct is not None:
                return Stored(suffix="", values=(dense.direct,))
            return Stored(suffix="", values=(self.columns(part),))
        stored = dense.node.inputs[1]
        name = f"{(stored.name if stored is not None else None) or dense.node.name}_{part.start}"
        matrix = np.ascontiguousarray(dense.matrix()[:, part.start : part.stop])
        if self._storage == "int8":
            grid = weight_grid(matrix, 8, 1, "mse")
            return Stored(
                suffix="Int8",
                values=(weight(f"{name}_q8", grid.quantize(matrix)), weight(f"{name}_scale", grid.scale)),
            )
        rows = np.ascontiguousarray(matrix.T) if by_output else matrix
        blocks = quantize_blocks(rows, 4, GROUP, symmetric=False, method="mse")
        assert blocks.zero_point is not None
        values = (
            weight(f"{name}_q4", blocks.codes.reshape(len(rows), -1)),
            weight(f"{name}_scale", blocks.scale),
            weight(f"{name}_zero_point", blocks.zero_point),
        )
        return Stored(suffix="Int4", values=values)


def _int8_columns(editor: Editor, dense: Dense) -> Stored | None:
    """Integers that a MatMul reads through DequantizeLinear, if they have one scale a column and no zero points."""
    weight = dense.node.inputs[1]
    node = weight.producer() if weight is not None else None
    if node is None or node.op_type != "DequantizeLinear" or dense.node.op_type != "MatMul":
        return None
    integers, scale = node.inputs[0], constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    array = constant(integers)
    if integers is None or array is None or array.dtype != np.int8 or scale is None or attribute(node, "block_size", 0):
        return None
    if (zero is not None and zero.any()) or (scale.ndim and attribute(node, "axis", 1) not in (1, -1)):
        return None
    if scale.shape == (dense.outputs,) and node.inputs[1] is not None:
        return Stored(suffix="Int8", values=(integers, node.inputs[1]))
    spread = np.broadcast_to(scale.reshape(-1), (dense.outputs,))
    return Stored(
        suffix="Int8", values=(integers, editor.weight(f"{integers.name}_scales", np.ascontiguousarray(spread)))
    )


def _typed(dense: Dense, matrix: Array) -> Array:
    return matrix.astype(np.float16) if dense.dtype == ir.DataType.FLOAT16 else matrix
