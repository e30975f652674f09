"""Dynamic quantization: weights to int8 now, activations to uint8 by the range that each run finds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import constant
from onnxcomp.passes._dynamic import LSTM, LSTM_DOMAIN, Editors, read_lstm, to_integer_lstm, to_integer_matmul
from onnxcomp.passes._matrices import Matrix, find_matrices
from onnxcomp.quant import Grid, weight_grid
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.target import Array

_NOT_RUN = {
    "Conv": "dynamic int8 of a convolution runs as ConvInteger, for which 8 times the time of float was measured; the "
    "pass quantize, which needs data, makes it faster than float",
    "ConvTranspose": "there is no integer ConvTranspose",
    "GRU": "there is no integer GRU",
    "RNN": "there is no integer RNN",
}


@dataclass(frozen=True, kw_only=True)
class DynamicQuantize(Pass):
    """Makes matrix products and LSTM integer without data: every run finds the range of their inputs anew.

    A MatMul or Gemm becomes DynamicQuantizeLinear, MatMulInteger, Cast and Mul of the ONNX standard, which runtimes
    fuse. All products of one activation share its DynamicQuantizeLinear. An LSTM becomes one DynamicQuantizeLSTM where
    the target has it.

    Finding the range costs a pass over the activation in every run, and one outlier widens the grid of all of it: with
    data, `quantize` is faster. Convolutions are refused, since the integer op that takes dynamic ranges is slow.

    Attributes:
        per_channel: One weight scale for each output channel instead of one for the tensor.
        weight_range: `minmax` covers all weights; `mse` minimises the squared error of each channel.
        min_weights: Smaller layers stay as they are: to quantize their input costs more than they do.
    """

    name: ClassVar[str] = "dynamic_quantize"
    summary: ClassVar[str] = "int8 matrix products and LSTM whose input ranges are found at run time; needs no data"
    min_opset: ClassVar[int] = 11  # DynamicQuantizeLinear

    per_channel: bool = True
    weight_range: Literal["minmax", "mse"] = "mse"
    min_weights: Annotated[int, Ge(0)] = 4096

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        bits = 7 if context.capabilities.reduce_range else 8
        editors = Editors(model)
        matrices, edits = find_matrices(model, self.where, min_weights=self.min_weights, embeddings="tied")
        for matrix in matrices:
            edits += self._matrix(editors, matrix, bits)
        for node in list(model.graph.all_nodes()):
            if node.domain in ("", "ai.onnx") and self.where(node):
                edits += self._other(editors, node, bits, context)
        if any(edit.action == "applied" for edit in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _matrix(self, editors: Editors, matrix: Matrix, bits: int) -> Iterator[Edit]:
        """Quantizes one matrix and all products with it."""
        reason = matrix.reason or _objection(matrix)
        array = None if reason else constant(matrix.value)
        if array is None or not np.isfinite(array).all():
            for node in matrix.products:
                yield refused(node, reason or "its weight holds NaN or infinity")
            return
        weight = np.ascontiguousarray(array.T) if matrix.transposed else array
        grid = weight_grid(weight, bits, 1 if self.per_channel else None, self.weight_range)
        shared = f", shared by {len(matrix.products)} nodes" if len(matrix.products) > 1 else ""
        detail = f"input 8 bit by its range at run time, {self._detail(weight, grid, bits)}{shared}"
        edits = [applied(node, detail) for node in matrix.products]  # as long as they are products
        to_integer_matmul(editors, matrix, grid.quantize(weight), grid.scale)
        yield from edits

    def _other(self, editors: Editors, node: ir.Node, bits: int, context: Context) -> Iterator[Edit]:
        """Quantizes an LSTM, and refuses what has no integer form worth having."""
        if node.op_type in _NOT_RUN:
            yield refused(node, _NOT_RUN[node.op_type])
        if node.op_type != "LSTM":
            return
        known = f"{LSTM_DOMAIN}::{LSTM}" in context.capabilities.contrib_ops
        target = context.capabilities.target
        found = read_lstm(node, self.min_weights) if known else f"target {target!r} has no integer LSTM"
        if isinstance(found, str):
            yield refused(node, found)
            return
        assert isinstance(node.graph, ir.Graph)
        details, quantized = [], []
        for weight in found:
            directions, gates, columns = weight.shape
            rows = weight.reshape(directions * (gates if self.per_channel else 1), -1)
            grid = weight_grid(rows, bits, 0, self.weight_range)
            scale = grid.scale.reshape((directions, gates) if self.per_channel else (directions,))
            quantized.append((grid.quantize(rows).reshape(directions, gates, columns), scale))
            details.append(self._detail(rows, grid, bits))
        yield applied(node, f"input 8 bit by its range at run time, {details[0]}; state likewise, {details[1]}")
        to_integer_lstm(editors.of(node.graph), node, quantized)

    def _detail(self, weight: Array, grid: Grid, bits: int) -> str:
        error = np.linalg.norm(grid.round_trip(weight) - weight) / max(float(np.linalg.norm(weight)), 1e-30)
        return f"weight {bits} bit per {'channel' if self.per_channel else 'tensor'} (error {100 * error:.2g} %)"


def _objection(matrix: Matrix) -> str:
    """Why a matrix that has one form for all readers must stay in float all the same; empty if it need not."""
    tensor = ir.convenience.get_const_tensor(matrix.value)
    if matrix.lookups:
        return "Gather looks up its weight as well, which would have to be stored twice; weight_only stores it once"
    if tensor is not None and tensor.dtype != ir.DataType.FLOAT:
        return "its input is float16; DynamicQuantizeLinear takes float32"
    return ""
