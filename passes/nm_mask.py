"""N:M sparsity in one shot: of every M consecutive weights of an output, all but N become zero."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.passes._nm_bias import bias_of, correct
from onnxcomp.passes._nm_budget import affordable, loss
from onnxcomp.passes._nm_choice import Chooser
from onnxcomp.passes._nm_inputs import Moments, Observation
from onnxcomp.passes._nm_layers import find_layers
from onnxcomp.passes._nm_scores import Method, Pattern
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.passes._quantized_linears import mark_chosen
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused


@dataclass(frozen=True, kw_only=True)
class NmMask(Pass):
    """Makes the weights of MatMul, Gemm and Conv sparse in a pattern that kernels can use, without training.

    Groups lie along the reduction axis: the inputs of a matrix, and the channels of a Conv at each kernel position. The
    graph stays what it is and the zeros are plain zeros, in integer weights the zero point; what packs and skips them
    comes later. A matrix whose inputs do not divide into groups is treated as if it were padded with zeros; a Conv is
    refused there. Symmetric integers keep the zeros if the model is quantized afterwards, as do zero points that are
    integers, and so does `weight_only`. `gptq` and `reconstruct` would fill them again, so they leave layers alone that
    were masked. A weight that has the pattern already is left as it is.

    Attributes:
        pattern: "N:M", so many of so many consecutive weights stay.
        method: What decides which: `magnitude` of the weight, the only one that needs no data; `wanda`, times the norm
            of its input (Sun et al., arXiv 2306.11695); `ria`, relative to its row and column as well (Zhang et al.,
            ICLR 2024); `sparsegpt`, by what the loss costs when later weights make up for it, and lets them (Frantar
            and Alistarh, arXiv 2301.00774). One sample in four judges the last: an output whose error is lower there
            with wanda's mask gets that one.
        reconstruct: Weights that stay are set by least squares to what keeps the output of the layer. Judged likewise,
            output by output. Takes one system of equations an output, of as many unknowns as weights stay in a row.
        share: Of the weights that could be made sparse, at most so many are: those of the layers whose outputs lose
            least, as the method's scores and the norms of inputs tell. The others stay dense.
        bias_correction: A constant bias takes in what the change of the weight shifts outputs by on average. Without
            data there is none.
        include_ends: Treats what is left alone otherwise: convolutions that see the inputs of the model, layers behind
            which no other layer comes, such as a classifier or the output layer of a language model, and tables that
            are looked up as well.
        damp: Of `sparsegpt` and `reconstruct`: added to the diagonal of the inputs' second moments, relative to its
            mean.
        block: Of `sparsegpt`: columns that are worked on at a time; changes speed only.
        positions: Of `sparsegpt` and `reconstruct`: of each sample, at most so many rows or patches, drawn at random.
        inputs_per_run: Inputs of layers that are observed in one run over the data. What comes behind them is observed
            after they were masked. A block of a transformer has four inputs.
        memory_mb: MiB of second moments held at a time; fewer take more runs over the data.
    """

    name: ClassVar[str] = "nm_mask"
    summary: ClassVar[str] = "2:4 and other N:M sparsity of weights in one shot: magnitude, Wanda, RIA or SparseGPT"

    pattern: str = "2:4"
    method: Method = "sparsegpt"
    reconstruct: bool = False
    bias_correction: bool = True
    share: Annotated[float, Gt(0.0), Le(1.0)] = 1.0
    include_ends: bool = False
    damp: Annotated[float, Gt(0.0)] = 0.01
    block: Annotated[int, Ge(1)] = 128
    positions: Annotated[int, Ge(1)] = 1024
    inputs_per_run: Annotated[int, Ge(1)] = 4
    memory_mb: Annotated[int, Ge(1)] = 1024

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        pattern = Pattern.parse(self.pattern)
        found, edits = find_layers(model, self.where, pattern, include_ends=self.include_ends)
        layers = []
        for layer in found:
            reason = self._objection(layer, pattern)
            edits += [refused(node, reason) for node in layer.nodes if reason]
            layers += [] if reason else [layer]
        if self.share < 1.0:
            losses = self._losses(model, context, layers, pattern)
            chosen = affordable(losses, self.share)
            layers = [layer for layer in layers if layer in chosen]
            edits += [
                refused(node, f"stays dense, since its output would lose {lost:.1%} and share is {self.share:g}")
                for layer, lost in losses.items()
                if layer not in layers
                for node in layer.nodes
            ]
        chooser = Chooser(
            pattern=pattern, method=self.method, reconstruct=self.reconstruct, damp=self.damp, block=self.block
        )
        editor, spool = Editor(model), Spool()
        for layer, moments in self._observed(model, context, layers):
            on_disk = isinstance(layer.value.const_value, ir.ExternalTensor | ir.LazyTensor)
            stored = layer.read()
            choice = chooser.choose(stored, moments)
            bias = bias_of(layer) if self.bias_correction and moments is not None else None
            if bias is not None and moments is not None:
                correct(editor, layer, bias, stored.weight - choice.rows, moments.means)
            stored.write(editor, choice.rows, choice.mask)
            if on_disk:
                spool.take(layer.value)
            shared = f", shared by {len(layer.nodes)} nodes" if len(layer.nodes) > 1 else ""
            for node in layer.nodes:
                mark_chosen(node, self.name)
                edits.append(applied(node, f"{pattern} by {self.method}{shared}; {choice.detail}"))
        if any(edit.action == "applied" for edit in edits):  # old biases, and weights that were Constant nodes
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _losses(
        self, model: ir.Model, context: Context, layers: Sequence[Layer], pattern: Pattern
    ) -> dict[Layer, float]:
        """What the output of each layer loses, all observed in the model as it comes."""
        found: Iterator[tuple[Layer, Moments | None]] = ((layer, None) for layer in layers)
        if self.method != "magnitude":
            found = replace(self._observation, products=False).run(model, context, layers)
        return {layer: loss(layer, moments, self.method, pattern) for layer, moments in found}

    def _observed(
        self, model: ir.Model, context: Context, layers: Sequence[Layer]
    ) -> Iterator[tuple[Layer, Moments | None]]:
        """Layers in order with what is known of their inputs; those before have been masked by then."""
        if self.method == "magnitude" and not self.reconstruct:
            yield from ((layer, None) for layer in layers)
            return
        for chunk in self._observation.runs(layers):
            yield from self._observation.run(model, context, chunk)

    @property
    def _observation(self) -> Observation:
        return Observation(
            products=self.reconstruct or self.method == "sparsegpt",
            positions=self.positions,
            memory=self.memory_mb << 20,
            inputs=self.inputs_per_run,
            biases=self.bias_correction,
        )

    def _objection(self, layer: Layer, pattern: Pattern) -> str:
        """What is wrong with the content or size of a weight; empty if nothing is."""
        stored = layer.read()
        if stored.scale is None and not np.isfinite(stored.array).all():
            return "its weight holds NaN or infinity"
        if pattern.holds(stored.nonzero):
            return f"its weight is {pattern} sparse already"
        observation = self._observation
        needed = observation.needs(layer) * len({reader.key for reader in layer.readers})
        if observation.products and needed > observation.memory:
            return f"second moments of its inputs take {needed / 2**20:.0f} MiB; raise memory_mb"
        return ""
