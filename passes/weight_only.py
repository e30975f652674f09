"""Weight-only quantization: constant matrices in blocks of 4 or 8 bits, activations as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.blockwise import Method, quantize_blocks
from onnxcomp.edit import Editor, constant
from onnxcomp.opset import opset, raise_opset
from onnxcomp.passes._blockwise import to_dequantize, to_matmul_nbits
from onnxcomp.passes._matrices import Embeddings, Matrix, find_matrices
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.target import Array

_BLOCKED_OPSET, _BLOCKED_IR = 21, 10  # DequantizeLinear in blocks, and integers of 4 bits


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Pass):
    """Quantizes the constant matrices of MatMul and Gemm in blocks along the reduction axis; needs no data.

    Smaller weights are what makes a decoder of language models fast, since every token reads all of them. A matrix that
    several nodes read is quantized once. That holds for an output layer that is tied to the embedding, too: Gather then
    looks up quantized rows. A matrix that some node needs in float stays, since it would have to be stored twice.

    Attributes:
        bits: Bits of a weight.
        block_size: Weights that share a scale; a power of two. Smaller blocks are more exact and take more room: 4 bits
            in blocks of 32 take 5.1 bits a weight with float32 scales and zero points, in blocks of 128 4.3 bits.
        symmetric: No zero points. So is a table of 4 bits whose rows have an odd number of blocks: onnxruntime before
            1.28 looks up the wrong zero points there.
        method: `rtn` rounds to nearest; `mse` searches scale and zero point of each block for the least squared error;
            `hqq` for a norm that forgives outliers, and takes longest.
        form: `matmulnbits` writes the ops of domain com.microsoft that onnxruntime has fast kernels for; `qdq` writes
            standard DequantizeLinear in blocks (opset 21), which runs everywhere; `auto` asks the target.
        accuracy_level: Of `matmulnbits`: 4 rounds activations to 8 bits in blocks, which is fastest; 0 and 1 compute in
            float, which with 8 bits took onnxruntime nine times as long as float weights.
        embeddings: `tied` quantizes a table that Gather looks up only if a matrix product reads it as well; `all` every
            table of at least `min_weights`, tables of positions included, which suffer from it. A table of more bits
            than the rest takes two passes, the first with `where` on the nodes that read it. In the form `qdq` a table
            has 8 bits, since Gather takes no fewer.
        min_weights: Smaller matrices stay as they are.
    """

    name: ClassVar[str] = "weight_only"
    summary: ClassVar[str] = "4- or 8-bit weights in blocks, float activations; needs no data; made for language models"

    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    method: Method = "mse"
    form: Literal["auto", "matmulnbits", "qdq"] = "auto"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embeddings: Embeddings = "tied"
    min_weights: Annotated[int, Ge(0)] = 4096

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        if self.form == "auto":
            known = "com.microsoft::MatMulNBits" in context.capabilities.contrib_ops
            return replace(self, form="matmulnbits" if known else "qdq").apply(model, context)
        edits = self._raise_opset(model)
        matrices, refusals = self._find(model)
        edits += refusals
        editor: Editor | None = None
        changed = False
        for matrix in matrices:
            if editor is None or editor.graph is not matrix.graph:  # an older one does not know names given since
                editor = Editor(model, matrix.graph)
            made = self._quantize(editor, matrix)
            changed |= any(edit.action == "applied" for edit in made)
            edits += made
        if changed:
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _find(self, model: ir.Model) -> tuple[list[Matrix], list[Edit]]:
        return find_matrices(model, self.where, min_weights=self.min_weights, embeddings=self.embeddings)

    def _raise_opset(self, model: ir.Model) -> list[Edit]:
        """Converts the model if the form needs it and there is something to quantize."""
        if self.form != "qdq" or not any(not matrix.reason for matrix in self._find(model)[0]):
            return []
        model.ir_version = max(model.ir_version or 0, _BLOCKED_IR)
        before = opset(model)
        if not raise_opset(model, _BLOCKED_OPSET):
            return []
        detail = f"opset {before} converted to {_BLOCKED_OPSET}"
        return [Edit(action="applied", node="", op_type="model", detail=detail)]

    def _quantize(self, editor: Editor, matrix: Matrix) -> list[Edit]:
        """Quantizes one matrix, of which alone there are two copies meanwhile."""
        array = None if matrix.reason else constant(matrix.value)
        if array is None or not np.isfinite(array).all():
            reason = matrix.reason or "its weight holds NaN or infinity"
            return [refused(node, reason) for node in matrix.nodes]
        bits = 8 if self.form == "qdq" and matrix.lookups else self.bits
        rows = array if matrix.transposed else array.T
        symmetric = self.symmetric or bool(matrix.lookups and bits < 8 and _odd_blocks(rows, self.block_size))
        blocks = quantize_blocks(rows, bits, self.block_size, symmetric=symmetric, method=self.method)
        name = matrix.value.name or "weight"
        if self.form == "qdq":
            to_dequantize(editor, blocks, name, matrix.products, matrix.lookups)
        else:
            to_matmul_nbits(editor, blocks, name, matrix.products, matrix.lookups, self.accuracy_level)
        detail = f"weight {rows.shape[1]} x {rows.shape[0]} in {bits} bit, blocks of {self.block_size}, {self.method}"
        detail += f"{', symmetric' if symmetric else ''}; error {100 * blocks.error:.2g} %"
        nodes = matrix.nodes
        shared = f", shared by {len(nodes)} nodes" if len(nodes) > 1 else ""
        return [applied(node, detail + shared) for node in nodes]


def _odd_blocks(rows: Array, block_size: int) -> bool:
    return bool(-(-rows.shape[1] // block_size) % 2)
