"""Training-free activation sparsity: values too small to matter are dropped before the products that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge, Gt, Le, Lt
from typing_extensions import override

from onnxcomp.errors import PassError
from onnxcomp.ops import MIN_OPSET
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._site_rewrite import Rewriter
from onnxcomp.passes._site_thresholds import Calibration, allocate
from onnxcomp.passes._site_weights import Storage
from onnxcomp.passes._site_worth import slower
from onnxcomp.passes._sites import Method, Site, find_sites
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.select import Select
from onnxcomp.target import Array

Share = Annotated[float, Ge(0.0), Lt(1.0)]


@dataclass(frozen=True, kw_only=True)
class Threshold(Pass):
    """Gives activations of transformers thresholds, calibrated to a share of values to drop.

    In a feed-forward block `(act(x W_gate) * x W_up) W_down`, with `a` the activated gate and `u` what it multiplies:

    * `cats` drops small `|a|`, one threshold a layer (Lee et al., arXiv 2404.08763);
    * `chess` drops small `|a| E|u|`, one threshold a channel (He et al., arXiv 2409.01366);
    * `fatrelu` drops small outputs of a ReLU (Song et al., ProSparse, arXiv 2402.13516);
    * `cett` drops neurons of small output `|a u| ||w||`, `w` their row of W_down (Luo et al., arXiv 2411.02335);
    * `topk` keeps so many of the largest `|a u|` of each token (Li et al., arXiv 2210.06313).

    The first three decide before `u` is computed, so that W_up is skipped as well. In front of all products of
    attention and feed-forward blocks,

    * `teal` drops small inputs `|x|` (Liu et al., arXiv 2408.14690);
    * `wina` drops small `|x| ||w||`, `w` the row of weights that reads `x` (Chen et al., arXiv 2505.19427).

    What is dropped are weights that need not be read, for one token at a time; many tokens drop little in common. The
    ops written run everywhere, and without a kernel they are slower than what they replace.

    Attributes:
        method: See above.
        sparsity: Share of values to drop; or patterns of node names or module paths with a share each, the first that
            fits a product's name counting.
        cett: Tail error to allow instead of a share, for `method = "cett"`; inputs of attention keep to `sparsity`.
        value: Score to drop up to, instead of a share: fixed, whatever the data.
        attention: Drops inputs of the projections of queries and of the output as well; keys and values, which later
            tokens read, stay exact. For methods other than `teal` and `wina`.
        column_norms: Multiplies scores by the norm of the weights that read the value.
        allocate: `greedy` gives more sparsity to the layers whose outputs suffer least, `sparsity` being the mean.
        max_error: With `greedy`, raises sparsity until the outputs of layers have this mean relative squared error.
        rows: Tokens sampled to measure errors on.
        weights: `int8` and `int4` store the weights of these products in the integer formats of the ops. With `keep`,
            float weights stay, and products whose weights are quantized otherwise only get a mask before them.
        only_if_faster: Leaves products alone, for `weight_only` to quantize, where the target was measured to compute
            one token faster with a dense product of weights of the same type.
    """

    name: ClassVar[str] = "threshold"
    summary: ClassVar[str] = "activation sparsity without training: CATS, CHESS, TEAL, WINA, FATReLU, top-k, CETT"
    min_opset: ClassVar[int] = MIN_OPSET

    method: Method = "chess"
    sparsity: Share | dict[str, Share] = 0.5
    cett: Annotated[float, Gt(0.0), Lt(1.0)] | None = None
    value: Annotated[float, Ge(0.0)] | None = None
    attention: bool = False
    column_norms: bool = False
    allocate: Literal["uniform", "greedy"] = "uniform"
    max_error: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    rows: Annotated[int, Ge(16), Le(1 << 16)] = 256
    weights: Storage = "keep"
    only_if_faster: bool = True

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        given = [n for n in ("cett", "value", "max_error") if getattr(self, n) is not None]
        if len(given) > 1:
            raise PassError(f"{given[0]} and {given[1]} both say how much to drop; give one of them")
        if self.cett is not None and self.method != "cett":
            raise PassError('cett is a target of method = "cett" only')
        if self.max_error is not None and self.allocate != "greedy":
            raise PassError('max_error needs allocate = "greedy"')
        if self.allocate == "greedy" and (isinstance(self.sparsity, dict) or set(given) & {"cett", "value"}):
            raise PassError('allocate = "greedy" chooses the sparsity of each layer; give one number for their mean')
        if self.method == "topk" and (self.value is not None or self.attention):
            raise PassError('method = "topk" keeps a number of values; it takes neither value nor attention')

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        sites, edits, dense = find_sites(
            model, self.method, self.where, attention=self.attention, column_norms=self.column_norms
        )
        wanted = {site: share for site in sites if (share := self._share(site)) is not None}
        edits += [refused(s.node, "no pattern of sparsity fits its name") for s in sites if s not in wanted]
        if not wanted:
            return edits
        rewriter = Rewriter(model, self.method, self.weights)
        found: dict[Site, tuple[float, Array | None]]
        if self.method == "topk" and self.allocate == "uniform":
            found = {site: (share, None) for site, share in wanted.items()}
        else:
            found = self._thresholds(model, wanted, context)
        shares = {}
        for site, (share, value) in found.items():
            if self.only_if_faster and (reason := slower(site, share, self.weights, context.capabilities)):
                edits.append(refused(site.node, f"{reason}; set only_if_faster = false to drop them all the same"))
                continue
            shares[site] = share
            if value is None:
                what = rewriter.keep_largest(site, max(1, round((1.0 - share) * site.dense.inputs)))
            else:
                what = rewriter.drop(site, value, share)
            edits.append(applied(site.node, f"{what}: {self.method}, {share:.1%} of its values dropped"))
        IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return [*edits, _summary(shares, dense)]

    def _thresholds(
        self, model: ir.Model, wanted: dict[Site, float], context: Context
    ) -> dict[Site, tuple[float, Array | None]]:
        """Sparsity on calibration data and threshold of each site; no threshold for those that keep a number."""
        sites = list(wanted)
        data = Calibration(model, sites, context)
        data.observe(self.rows if self.allocate == "greedy" or self.cett is not None else 0)
        if self.allocate == "greedy":
            assert not isinstance(self.sparsity, dict)
            wanted = allocate(sites, {s: data.errors(s) for s in sites}, self.sparsity, self.max_error)
        if self.method == "topk":
            return {site: (share, None) for site, share in wanted.items()}
        thresholds = {}
        for site in sites:
            if self.value is not None:
                thresholds[site] = data.fixed(site, self.value)
            elif self.cett is not None and site.by_norms and site.block is not None:
                thresholds[site] = data.tail(site, self.cett)
            else:
                thresholds[site] = data.threshold(site, wanted[site])
        return {site: (t.sparsity, t.value) for site, t in thresholds.items()}

    def _share(self, site: Site) -> float | None:
        if not isinstance(self.sparsity, dict):
            return self.sparsity
        for pattern, share in self.sparsity.items():
            if Select(name=(pattern,))(site.node) or Select(module=(pattern,))(site.node):
                return share
        return None


def _summary(shares: dict[Site, float], dense: Sequence[Dense]) -> Edit:
    total = sum(d.inputs * d.outputs for d in dense)
    skipped = sum(site.weights * share for site, share in shares.items())
    detail = (
        f"{len(shares)} thresholds; for one token {skipped / total:.1%} of the weights in products need not be read"
    )
    return Edit(action="applied", node="", op_type="model", detail=detail)
