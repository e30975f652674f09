"""SmoothQuant and RepQ-ViT: scale of outlier channels moves from activations into weights before `quantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Le
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.opset import opset
from onnxcomp.passes._scale_folds import Linear, Source, explicit_source
from onnxcomp.passes._scale_sites import Site, find_sites, layers_before, may_be_scaled
from onnxcomp.passes._smooth_search import Layer, Method, search
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.stats import ChannelRange, Group, Observer, RowSample

_TREATED = "onnxcomp.smooth"  # metadata of a linear op for whose input a scale was searched


@dataclass(frozen=True, kw_only=True)
class Smooth(Pass):
    """Scales, and where that is free shifts, each channel of the input of linear ops so that it quantizes better.

    The inverse goes into what puts the activation out: the gamma and beta of a norm, in one op or decomposed into Mul
    and Add; the columns of the value projection, which attention passes on; the columns of a layer before ReLU,
    LeakyReLU or a gate that multiplies. The scale goes into the weights of all layers that read the activation, the
    shift into their biases. The float function stays what it was, and nothing is added to the graph.

    Behind a GELU there is no such place. With `explicit`, a Mul is inserted there if it pays. Where few channels are
    massive, as in single tokens of vision transformers (Sun et al., arXiv 2402.17762), it may also take up to eight of
    them out of the layer, and adds their product with their rows of the weight in float.

    Attributes:
        method: `smoothquant` (Xiao et al., arXiv 2211.10438), `repq` (Li et al., arXiv 2212.08254), or `best`, which
            tries both, SmoothQuant's scale of centred channels, and a scale of the widest channels alone, at every
            activation.
        alpha: SmoothQuant's exponent; searched for each activation if None.
        activation_bits: As `quantize` will be told.
        weight_bits: As `quantize` will be told.
        rows: Rows of each activation that are sampled: half of them to choose by, half to decide whether to keep.
        min_gain: Least relative fall of the held-out output error for a scale to be kept.
        explicit: Insert a Mul where nothing takes the scale for free; it costs a pass over the tensor.
        explicit_gain: Least relative fall of the held-out output error for a Mul to be inserted.
    """

    name: ClassVar[str] = "smooth"
    summary: ClassVar[str] = "SmoothQuant and RepQ: outlier channels scaled into the weights, folded for free"

    method: Method = "best"
    alpha: Annotated[float, Ge(0.0), Le(1.0)] | None = None
    activation_bits: Annotated[int, Ge(2), Le(8)] = 8
    weight_bits: Annotated[int, Ge(2), Le(8)] = 8
    rows: Annotated[int, Ge(32), Le(1 << 20)] = 1024
    min_gain: Annotated[float, Ge(0.0), Le(1.0)] = 0.02
    explicit: bool = False
    explicit_gain: Annotated[float, Ge(0.0), Le(1.0)] = 0.8

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return {
            site.name: Group(RowSample(self.rows, seed=context.seed), ChannelRange())
            for site in find_sites(model, self.where, _TREATED)[0]
            if self.explicit or may_be_scaled(model, site)
        }

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        sites, edits = find_sites(model, self.where, _TREATED)
        proven = layers_before(model, context, sites)
        editor = Editor(model)
        for site in sites:
            source = proven.get(site.value, site.source)
            if isinstance(source, str) and self.explicit:
                source = explicit_source(site.value, site.nodes)
            if isinstance(source, str):
                edits += [refused(node, f"{source}; explicit = true may insert a Mul") for node in site.nodes]
            else:
                edits += self._smooth(editor, site, source, context, opset(model))
        if any(e.action == "applied" for e in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _smooth(self, editor: Editor, site: Site, source: Source, context: Context, version: int) -> list[Edit]:
        nodes = site.nodes
        seen = context.statistic(site.name, ChannelRange)
        weight_bits = min(self.weight_bits, 7) if context.capabilities.reduce_range else self.weight_bits
        layer = Layer(
            rows=context.statistic(site.name, RowSample).sample,
            low=seen.low,
            high=seen.high,
            weight=np.concatenate([linear.matrix for linear in site.linears], axis=1),
            activation_bits=self.activation_bits,
            weight_bits=weight_bits,
            groups=source.groups,
        )
        alphas = [i / 20 for i in range(21)] if self.alpha is None else [self.alpha]
        shifts = source.shifts and all(linear.bias is not None for linear in site.linears)
        for node in nodes:
            node.metadata_props[_TREATED] = self.method
        apart = source.costs and self.method == "best" and version >= 12 and all(map(_can_lose, site.linears))
        found, ratio = search(layer, self.method, alphas, shifts=shifts, seed=context.seed, apart=apart)
        needed = self.explicit_gain if source.costs else self.min_gain
        if not ratio <= 1.0 - needed:
            return [refused(node, f"no scale lowers the held-out output error by {needed:.0%}") for node in nodes]
        divisor, factor = found.scale.copy(), found.scale.copy()
        divisor[found.apart], factor[found.apart] = np.inf, 0.0
        source.divide(editor, divisor, found.shift)
        for linear in site.linears:
            if len(found.apart):
                linear.take_apart(editor, site.value, found.apart)
            linear.scale_inputs(editor, factor, found.shift)
        detail = f"{found.label}, {source.place}; held-out output error x {ratio:.3f}"
        return [applied(node, detail) for node in nodes]


def _can_lose(linear: Linear) -> bool:
    """Whether a product can be added behind its bias; without one, runtimes take MatMul and Add for a float Gemm."""
    return linear.bias is not None and linear.bias.user is not linear.node and not _is_output(linear.bias.user)


def _is_output(node: ir.Node) -> bool:
    return any(v.is_graph_output() for v in node.outputs)
