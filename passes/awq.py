"""AWQ: weights of channels that carry large inputs are scaled up before `weight_only`, so that they lose less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Le
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.passes._awq_search import Trial
from onnxcomp.passes._scale_folds import Source
from onnxcomp.passes._scale_sites import Site, find_sites, layers_before, may_be_scaled
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.stats import Observer, RowSample

_TREATED = "onnxcomp.awq"  # metadata of a linear op for whose weight a scale was searched


@dataclass(frozen=True, kw_only=True)
class Awq(Pass):
    """Multiplies rows of weights by a scale that grows with the inputs they meet; goes before `weight_only`.

    AWQ (Lin et al., arXiv 2306.00978): `mean|x|^alpha` of each channel, alpha searched for each activation by the error
    that rounding leaves in the outputs. The inverse goes where `smooth` puts it: into the gain of the norm before, or
    the columns of the layer before. The float function stays what it was, and nothing is added to the graph.

    Attributes:
        bits: As `weight_only` will be told.
        block_size: Likewise.
        symmetric: Likewise.
        rows: Rows of each activation that are sampled: half of them to choose by, half to decide whether to keep.
        min_gain: Least relative fall of the held-out output error for a scale to be kept.
    """

    name: ClassVar[str] = "awq"
    summary: ClassVar[str] = "AWQ: weights that meet large inputs are scaled up before weight_only, folded for free"

    bits: Literal[4, 8] = 4
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    rows: Annotated[int, Ge(32), Le(1 << 20)] = 512
    min_gain: Annotated[float, Ge(0.0), Le(1.0)] = 0.02

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return {
            site.name: RowSample(self.rows, seed=context.seed)
            for site in find_sites(model, self.where, _TREATED)[0]
            if may_be_scaled(model, site)
        }

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        sites, edits = find_sites(model, self.where, _TREATED)
        proven = layers_before(model, context, sites)
        editor = Editor(model)
        for site in sites:
            source = proven.get(site.value, site.source)
            if isinstance(source, str):
                edits += [refused(node, source) for node in site.nodes]
            else:
                edits += self._scale(editor, site, source, context)
        if any(e.action == "applied" for e in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _scale(self, editor: Editor, site: Site, source: Source, context: Context) -> list[Edit]:
        nodes = site.nodes
        for node in nodes:
            node.metadata_props[_TREATED] = "searched"
        trial = Trial(
            context.statistic(site.name, RowSample).sample,
            np.concatenate([linear.matrix for linear in site.linears], axis=1),
            bits=self.bits,
            block_size=self.block_size,
            symmetric=self.symmetric,
            groups=source.groups,
            seed=context.seed,
        )
        alpha, ratio = trial.best()
        if not ratio <= 1.0 - self.min_gain:
            return [refused(n, f"no scale lowers the held-out output error by {self.min_gain:.0%}") for n in nodes]
        scale, nowhere = trial.scale(alpha), np.zeros(site.channels)
        source.divide(editor, scale, nowhere)
        for linear in site.linears:
            linear.scale_inputs(editor, scale, nowhere)
        detail = f"awq alpha {alpha:.2f}, {source.place}; held-out output error x {ratio:.3f}"
        return [applied(node, detail) for node in nodes]
