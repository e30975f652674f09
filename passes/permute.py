"""Channel permutation: another order of the inputs of linear layers, in which N:M sparsity costs less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from annotated_types import Ge
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.passes._nm_inputs import Observation
from onnxcomp.passes._nm_layers import find_layers
from onnxcomp.passes._nm_scores import SCORE_NAMES, Pattern, Score
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.passes._permutation_elementwise import ELEMENTWISE_RULES
from onnxcomp.passes._permutation_flow import Flow
from onnxcomp.passes._permutation_fold import fold
from onnxcomp.passes._permutation_labels import Labels
from onnxcomp.passes._permutation_layout import LAYOUT_RULES
from onnxcomp.passes._permutation_linear import LINEAR_RULES
from onnxcomp.passes._permutation_scores import Reader, best_order, problems, retained, seed_labels, space_readers
from onnxcomp.passes._permutation_search import Search, Searcher
from onnxcomp.passes._permutation_sizes import KnownSizes
from onnxcomp.rewrite import Context, Edit, IrPassAdapter, Pass, applied, refused
from onnxcomp.target import Array

_RULES = {**LINEAR_RULES, **ELEMENTWISE_RULES, **LAYOUT_RULES}
_TREATED = "onnxcomp.permute"  # metadata of a node whose inputs were reordered
_NOTHING = "no other order was found in which groups keep more"


@dataclass(frozen=True, kw_only=True)
class Permute(Pass):
    """Reorders channels so that important weights of an output do not compete in one group; outputs stay the same.

    Goes before `nm_mask`, with the same pattern. The order is folded into all constants that see the channels: rows of
    the layers before, columns of those behind, norms, biases, depthwise convolutions, embeddings. No op is added. Where
    a head's values are weighed by attention they move within the head, as channels of a grouped convolution within
    their group; heads of queries that share one of values share an order. An op that no rule covers keeps channels
    where they are. A vector that is shared gets a copy for each order, a matrix moves for all that read it.

    An order is taken only if all layers that read the channels keep more of their scores together than before.

    Attributes:
        pattern: "N:M" of the mask that comes behind it.
        score: What a weight is worth: its `magnitude`, which needs no data; `wanda`, times the norm of its input;
            `ria`, relative to its row and column as well.
        search: `deal` hands channels out by their total score (RIA, Zhang et al., ICLR 2024). `swaps` goes on from the
            better of that and what there is and exchanges pairs of channels between groups as long as that keeps more
            (Pool and Yu, NeurIPS 2021); `assignment` hands out one channel of every group at a time in the best way,
            and needs scipy.
        rounds: Of the two latter, sweeps over all slots of the groups at most.
        residual: Reorder residual streams, too: one order for all layers that read them.
        include_ends: Count layers that `nm_mask` leaves alone unless its `include_ends` is set.
        cache: A cache that is an input and an output of the graph may hold values in another order: the caller only
            ever feeds the one back into the other.
    """

    name: ClassVar[str] = "permute"
    summary: ClassVar[str] = "order of channels in which N:M sparsity keeps more, folded into the weights"

    pattern: str = "2:4"
    score: Score = "wanda"
    search: Search = "swaps"
    rounds: Annotated[int, Ge(1)] = 8
    residual: bool = True
    include_ends: bool = False
    cache: bool = False

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        pattern = Pattern.parse(self.pattern)
        counted, edits = find_layers(model, self.where, pattern, include_ends=self.include_ends)
        every, _ = find_layers(model, self.where, pattern, include_ends=True)
        reasons = {layer.value: reason for layer in every if (reason := _objection(layer, pattern))}
        for layer in counted:
            edits += [refused(node, reasons[layer.value]) for node in layer.nodes if layer.value in reasons]
        counted = [layer for layer in counted if layer.value not in reasons]
        spaces = _Spaces(config=self, editor=Editor(model), squares=self._squares(model, context, counted))
        shapes = KnownSizes(model)
        done = {layer.value: np.zeros((layer.groups, layer.channels), bool) for layer in every}
        for layer in counted:
            before = done[layer.value]
            if before.all():
                continue
            labels = Labels(before.size)
            flow = Flow(model=model, shapes=shapes, rules=_RULES, where=self.where, cache=self.cache, labels=labels)
            labels.fix(np.flatnonzero(before), "they were looked at with those of another layer")
            flow.spread(layer.value, seed_labels(layer, before))
            readers = space_readers(flow, every)
            for reader in readers:
                done[reader.layer.value] |= reader.codes >= 0
                if reader.layer.value in reasons:
                    labels.fix(reader.codes, f"{_names(reader)}: {reasons[reader.layer.value]}")
            values = {other.value for other in counted}
            edits += spaces.reorder(flow, [r for r in readers if r.layer.value in values], context.seed)
        if any(edit.action == "applied" for edit in edits):
            IrPassAdapter(common_passes.RemoveUnusedNodesPass())(model)
        return edits

    def _squares(self, model: ir.Model, context: Context, layers: Sequence[Layer]) -> dict[ir.Value, Array]:
        """Mean squares of the inputs of all layers, from one sweep over the data."""
        if self.score == "magnitude" or not layers:
            return {}
        observation = Observation(products=False, positions=1, memory=1 << 62, inputs=1 << 62)
        return {layer.value: moments.squares for layer, moments in observation.run(model, context, layers)}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Spaces:
    """Reorders one space after the other.

    Attributes:
        config: The pass.
        editor: Of the main graph.
        squares: Mean squares of the inputs of layers, by weight; reordered with them.
        spool: Takes weights that were on disk.
    """

    config: Permute
    editor: Editor
    squares: dict[ir.Value, Array]
    spool: Spool = field(default_factory=Spool)

    def reorder(self, flow: Flow, readers: Sequence[Reader], seed: int) -> list[Edit]:
        """Finds an order for all that moves together and folds it, or says why not."""
        config, labels = self.config, flow.labels
        pattern, classes = Pattern.parse(config.pattern), flow.classes()

        def refuse(reason: str) -> list[Edit]:
            return [refused(node, reason) for reader in readers for node in reader.layer.nodes]

        found = list(problems(readers, classes, pattern))
        if not found:
            reason = labels.reasons[-1] if labels.reasons else f"there are no two groups of {pattern.size}"
            return refuse(f"its inputs cannot be reordered: {reason}")
        if not config.residual and flow.meets(classes >= 0):
            return refuse("its inputs are a residual stream; residual = true reorders it, too")
        searcher = Searcher(pattern=pattern, search=config.search, rounds=config.rounds, seed=seed)
        order = best_order(readers, found, self._scores, searcher, labels.count)
        if np.array_equal(order, np.arange(labels.count)):
            return refuse(_NOTHING)
        if broken := flow.broken(order):
            return refuse(f"its inputs cannot be reordered: {broken}")
        shares = [self._shares(reader, order, pattern) for reader in readers]
        if sum(after for _, after, _ in shares) <= sum(before for before, _, _ in shares):
            return refuse(_NOTHING)
        fold(self.editor, self.spool, flow, order)
        edits = []
        for reader, share in zip(readers, shares, strict=True):
            edits += self._report(reader, reader.moved(order), *share)
        return edits

    def _scores(self, reader: Reader) -> Array:
        return reader.scores(self.config.score, self.squares.get(reader.layer.value))

    def _shares(self, reader: Reader, order: Array, pattern: Pattern) -> tuple[float, float, float]:
        """Score that is kept as it is, that is kept in another order, and all of it."""
        scores = self._scores(reader)
        total = float(scores.sum(dtype=np.float64))
        return retained(scores, None, pattern), retained(scores, reader.moved(order), pattern), total or 1.0

    def _report(self, reader: Reader, moved: Array, before: float, after: float, total: float) -> list[Edit]:
        layer, config = reader.layer, self.config
        for node in layer.nodes:
            node.metadata_props[_TREATED] = config.pattern
        if (moved == np.arange(layer.channels)).all():
            return [refused(node, _NOTHING) for node in layer.nodes]
        if layer.value in self.squares:
            old = self.squares[layer.value].reshape(layer.groups, layer.taps, layer.channels)
            new = np.take_along_axis(old, moved[:, None, :], axis=2)
            self.squares[layer.value] = new.reshape(layer.groups, -1)
        detail = f"{config.pattern} keeps {before / total:.1%} -> {after / total:.1%} of {SCORE_NAMES[config.score]}"
        return [applied(node, f"inputs reordered by {config.search}; {detail}") for node in layer.nodes]


def _objection(layer: Layer, pattern: Pattern) -> str:
    """What is wrong with the content of a weight; empty if nothing is."""
    if any(_TREATED in node.metadata_props for node in layer.nodes):
        return "its inputs are reordered already"
    stored = layer.read()
    if stored.scale is None and not np.isfinite(stored.array).all():
        return "its weight holds NaN or infinity"
    if pattern.holds(stored.nonzero):
        return f"its weight is {pattern} sparse already; permute goes before nm_mask"
    return ""


def _names(reader: Reader) -> str:
    return ", ".join(f"{n.op_type} {n.name!r}" for n in reader.layer.nodes)
