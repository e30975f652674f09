"""Weight-only quantization: constant matrices in blocks of 4 or 8 bits, activations as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Gt
from typing_extensions import override

from onnxcomp.block_grids import Method
from onnxcomp.blockwise import NotFiniteError, Source, quantize_blocks
from onnxcomp.edit import Editor, constant
from onnxcomp.errors import CalibrationError
from onnxcomp.opset import opset, raise_opset
from onnxcomp.passes._block_rounding import (
    InputMoments,
    Rounder,
    chunks,
    inputs_of,
    moment_bytes,
    observe,
    round_blocks,
)
from onnxcomp.passes._blockwise import to_dequantize, to_matmul_nbits
from onnxcomp.passes._disk_weights import Spool, source_on_disk
from onnxcomp.passes._matrices import Embeddings, Matrix, find_matrices
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.target import Array

_BLOCKED_OPSET, _BLOCKED_IR = 21, 10  # DequantizeLinear in blocks, and integers of 4 bits


@dataclass(frozen=True, kw_only=True)
class WeightOnly(Pass):
    """Quantizes the constant matrices of MatMul and Gemm in blocks along the reduction axis.

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
            `hqq` for a norm that forgives outliers. These need no data. `gptq` (Frantar et al., arXiv 2210.17323) lets
            the weights of a row make up for each other's errors on calibration data. A table that is only looked up,
            and what stands in a subgraph, are done by `mse` then.
        form: `matmulnbits` writes the ops of domain com.microsoft that onnxruntime has fast kernels for; `qdq` writes
            standard DequantizeLinear in blocks (opset 21), which runs everywhere; `auto` asks the target.
        accuracy_level: Of `matmulnbits`: 4 rounds activations to 8 bits in blocks, which is fastest; 0 and 1 compute in
            float, which with 8 bits took onnxruntime nine times as long as float weights.
        embeddings: `tied` quantizes a table that Gather looks up only if a matrix product reads it as well; `all` every
            table of at least `min_weights`, tables of positions included, which suffer from it. A table of more bits
            than the rest takes two passes, the first with `where` on the nodes that read it. In the form `qdq` a table
            has 8 bits, since Gather takes no fewer.
        min_weights: Smaller matrices stay as they are.
        damp: Of `gptq`: added to the diagonal of the inputs' second moments, relative to its mean.
        act_order: Of `gptq`: columns of largest second moment are rounded first; they stay in their blocks.
        positions: Of `gptq`: of each sample, at most so many tokens, drawn at random.
        memory_mb: Of `gptq`: MiB of second moments held at a time. Fewer take more runs over the data, each through the
            model with what was quantized before.
    """

    name: ClassVar[str] = "weight_only"
    summary: ClassVar[str] = (
        "4- or 8-bit weights in blocks, float activations; GPTQ with data; made for language models"
    )

    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    method: Method | Literal["gptq"] = "mse"
    form: Literal["auto", "matmulnbits", "qdq"] = "auto"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    embeddings: Embeddings = "tied"
    min_weights: Annotated[int, Ge(0)] = 4096
    damp: Annotated[float, Gt(0.0)] = 0.01
    act_order: bool = True
    positions: Annotated[int, Ge(1)] = 1024
    memory_mb: Annotated[int, Ge(1)] = 256

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        if context.sweep is None and any(self._unobserved(matrix, model) is None for matrix in self._find(model)[0]):
            raise CalibrationError("method = 'gptq' needs calibration data; give some with --data")

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        if self.form == "auto":
            known = "com.microsoft::MatMulNBits" in context.capabilities.contrib_ops
            return replace(self, form="matmulnbits" if known else "qdq").apply(model, context)
        edits = self._raise_opset(model)
        matrices, refusals = self._find(model)
        edits += refusals
        changed = False
        spool = Spool()
        for matrix, moments in self._with_moments(model, context, matrices):
            before = set(matrix.graph.initializers)
            on_disk = isinstance(matrix.value.const_value, ir.ExternalTensor | ir.LazyTensor)
            made = self._quantize(Editor(model, matrix.graph), matrix, moments)
            for name in matrix.graph.initializers.keys() - before if on_disk else ():
                spool.take(matrix.graph.initializers[name])
            changed |= any(edit.action == "applied" for edit in made)
            edits += made
        if changed:
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _with_moments(
        self, model: ir.Model, context: Context, matrices: Sequence[Matrix]
    ) -> Iterator[tuple[Matrix, InputMoments | str]]:
        """Matrices, each with the second moments of its inputs or why they are not known, empty if not asked for."""
        observed: list[Matrix] = []
        for matrix in matrices:
            reason = self._unobserved(matrix, model)
            if reason is None:
                observed.append(matrix)
            else:
                yield matrix, reason
        # A table that is tied to the output layer comes last: until then runs can leave out what they do not need.
        places = {node: place for place, node in enumerate(model.graph)}
        observed.sort(key=lambda matrix: min(places.get(node, len(places)) for node in matrix.products))
        for chunk in chunks(observed, model, self._rounder.memory):
            grams = observe(model, context, chunk, self._rounder)
            inputs = [inputs_of(matrix, model) for matrix in chunk]  # of the nodes before they are changed
            for matrix, names in zip(chunk, inputs, strict=True):
                yield matrix, InputMoments([grams[name] for name in names], looked_up=bool(matrix.lookups))
            grams.clear()  # before the next run fills others

    def _unobserved(self, matrix: Matrix, model: ir.Model) -> str | None:
        """Why the inputs of a matrix cannot be observed, empty if they need not be; None if they are."""
        if self.method != "gptq" or matrix.reason:
            return ""
        if not inputs_of(matrix, model):
            return "no product in the main graph reads it"
        needed = moment_bytes(matrix) * len(inputs_of(matrix, model))
        if needed > self._rounder.memory:
            return f"second moments of its inputs take {needed / 2**20:.0f} MiB; raise memory_mb"
        return None

    @property
    def _rounder(self) -> Rounder:
        return Rounder(damp=self.damp, act_order=self.act_order, positions=self.positions, memory=self.memory_mb << 20)

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

    def _quantize(self, editor: Editor, matrix: Matrix, moments: InputMoments | str) -> list[Edit]:
        """Quantizes one matrix; one on disk is read part by part, unless GPTQ needs whole rows of it."""
        if matrix.reason:
            return [refused(node, matrix.reason) for node in matrix.nodes]
        bits = 8 if self.form == "qdq" and matrix.lookups else self.bits
        rows: Array | Source | None = None
        if not isinstance(moments, InputMoments):
            rows = source_on_disk(matrix.value, transposed=matrix.transposed)
        if rows is None:
            array = constant(matrix.value)
            assert array is not None
            rows = array if matrix.transposed else array.T
        odd = bool(-(-matrix.columns // self.block_size) % 2)  # number of blocks in a row
        symmetric = self.symmetric or bool(matrix.lookups and bits < 8 and odd)
        try:
            if isinstance(moments, InputMoments):
                assert isinstance(rows, np.ndarray)
                blocks, ratio = round_blocks(rows, bits, self.block_size, moments, self._rounder, symmetric=symmetric)
                how = f"gptq, held-out output error x {ratio:.3f}"
            else:
                method: Method = "mse" if self.method == "gptq" else self.method
                blocks = quantize_blocks(rows, bits, self.block_size, symmetric=symmetric, method=method)
                how = method + (f" since {moments}" if moments else "")
        except NotFiniteError:
            return [refused(node, "its weight holds NaN or infinity") for node in matrix.nodes]
        name = matrix.value.name or "weight"
        if self.form == "qdq":
            to_dequantize(editor, blocks, name, matrix.products, matrix.lookups)
        else:
            to_matmul_nbits(editor, blocks, name, matrix.products, matrix.lookups, self.accuracy_level)
        detail = f"weight {rows.shape[1]} x {rows.shape[0]} in {bits} bit, blocks of {self.block_size}, {how}"
        detail += f"{', symmetric' if symmetric else ''}; error {100 * blocks.error:.2g} %"
        nodes = matrix.nodes
        shared = f", shared by {len(nodes)} nodes" if len(nodes) > 1 else ""
        return [applied(node, detail + shared) for node in nodes]
