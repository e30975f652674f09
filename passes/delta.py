"""A model for one frame becomes one for a stream of frames, which computes only what changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.edit import Editor
from onnxcomp.errors import OnnxcompError, PassError
from onnxcomp.model import fix_shapes
from onnxcomp.ops import MIN_OPSET
from onnxcomp.passes._delta_cells import cell_inputs, cell_values, stream_cell, why_not_cell
from onnxcomp.passes._delta_holds import Holds
from onnxcomp.passes._delta_scopes import States
from onnxcomp.passes._delta_search import Budget, find_thresholds, hardly_changes, note_densities, run_dense
from onnxcomp.passes._delta_shapes import Shapes, find_shapes, static_shape
from onnxcomp.passes._delta_sites import Site, find_sites, rnn_nodes, taken
from onnxcomp.passes._delta_weights import to_int8
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.select import Select

Level = Annotated[float, Ge(0.0)]


@dataclass(frozen=True, kw_only=True)
class Delta(Pass):
    """Makes a per-frame model a step model that carries its state and sends on only what changed.

    In front of convolutions and of products with constant weights, a value that changed by at most a threshold since it
    was last sent keeps the value that was sent: an element of a product's input alone, of a map all channels of a place
    together, by the root mean square of their changes. What was sent is state: a graph input `..._in` and a graph
    output `..._out`, listed in the model's metadata, and zero before the first step, in which everything is sent.

    * `residual` compares with what was last sent, so that small changes add up until they are sent: the kept residual
      of DeltaCNN (Parger et al., arXiv 2203.03996) and of delta networks (Neil et al., arXiv 1612.05571);
    * `quantized` rounds values to multiples of the threshold and sends every change: the Delta Activation Layer
      (Siddiqui et al., arXiv 2107.07305). A stream equals the model with rounded values exactly, whatever came before.

    GRU and LSTM nodes of one step become `DeltaGRU` and `DeltaLSTM`; hidden values that the model itself hands from
    step to step are listed by the pass `carry` before. All else, nonlinear or not, is computed from held values as it
    was, so that with a threshold of 0 outputs are the dense model's. It pays where a target has kernels that skip what
    was not sent; elsewhere the step model runs, but no faster.

    Attributes:
        semantics: See above.
        threshold: Largest change that is not sent; or patterns of node names or module paths with one each, the first
            that fits a reader of the value counting, 0 where none fits. Without it, thresholds are searched.
        max_error: Relative error of the outputs that a stream of calibration feeds may have, as root mean square over
            that of the dense outputs, worst output. Feeds are taken for a sequence in the order given.
        min_agreement: Instead: share of calibration steps in which the largest element of the first output, the class,
            stays the same.
        search: `global` holds the same share of changes back everywhere; `layers` more where that saves much and costs
            little, which takes one run of the sequence for each value.
        frames: Most calibration feeds to search on.
        weights: `int8` stores the float weights of products as integers with a scale an output channel.
    """

    name: ClassVar[str] = "delta"
    summary: ClassVar[str] = "streams: computes only what changed since the last step; state as inputs and outputs"
    min_opset: ClassVar[int] = MIN_OPSET

    semantics: Literal["residual", "quantized"] = "residual"
    threshold: Level | dict[str, Level] | None = None
    max_error: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    min_agreement: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    search: Literal["global", "layers"] = "global"
    frames: Annotated[int, Ge(2)] = 64
    weights: Literal["keep", "int8"] = "keep"

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        given = [n for n in ("threshold", "max_error", "min_agreement") if getattr(self, n) is not None]
        if len(given) > 1:
            raise PassError(f"{given[0]} and {given[1]} both say how much may change; give one of them")
        if self.threshold is None and context.feeds is None:
            raise PassError("thresholds are found on a calibration sequence: give one with --data, or set threshold")
        if self.semantics == "quantized" and self.threshold == 0:
            raise PassError("values cannot be rounded to multiples of 0; give a threshold, or semantics = residual")

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        sites, reasons = find_sites(model, self.where)
        edits = [refused(node, reason) for node, reason in reasons]
        states = States(model)
        cells = [n for n in rnn_nodes(model, self.where) if self._may(n, states.why_not(_graph(n)), edits)]
        if not sites and not cells:
            return edits
        edits += _settle(model, context)
        asked = [s.value for s in sites if not states.why_not(s.graph)] + [v for n in cells for v in cell_inputs(n)]
        shapes = find_shapes(model, dict.fromkeys(asked), context)
        sites = [s for s in sites if self._fits(s, states, shapes, edits)]
        cells = [n for n in cells if self._may(n, why_not_cell(n, shapes), edits)]
        if not sites and not cells:
            return edits
        dense = None
        if context.feeds is not None:
            values = {v: False for n in cells for v in cell_values(n)} | {s.value: s.pixels for s in sites}
            dense = run_dense(model, values, context, self.frames)
        if self.weights == "int8":
            to_int8(model, sites)
        holds = Holds(model, Editor(model), states, self.semantics)
        for site in sites:
            level = self._level(site.readers)
            rounded = self.semantics == "quantized" and (level > 0 or self.threshold is None)
            holds.add(site, *shapes[site.value], level, rounded=rounded)
        for node in cells:
            stream_cell(node, holds, shapes, self._level([node]))
        if self.threshold is None and dense is not None:
            if hardly_changes(dense, self._budget()):
                detail = (
                    "the outputs hardly change on the calibration sequence, so that it cannot tell what unsent changes "
                    "cost: give one in which more happens, or a smaller budget"
                )
                edits.append(Edit(action="refused", node="", op_type="model", detail=detail))
            detail = find_thresholds(holds, dense, self._budget(), context, self.search)
            edits.append(Edit(action="applied", node="", op_type="model", detail=detail))
        if dense is not None and len(dense.feeds) > 1:
            note_densities(holds, dense, context)
        return [*edits, *(applied(p.reader, p.describe(self.semantics)) for p in holds.places)]

    def _may(self, node: ir.Node, reason: str, edits: list[Edit]) -> bool:
        if reason:
            edits.append(refused(node, reason))
        return not reason

    def _fits(self, site: Site, states: States, shapes: Shapes, edits: list[Edit]) -> bool:
        reason = states.why_not(site.graph)
        if not reason and site.value not in shapes:
            reason = _unknown(states.is_main(site.graph))
        if not reason and taken(site.value):
            reason = "its input is held already"
        if reason:
            edits += [refused(node, reason) for node in site.readers]
        return not reason

    def _budget(self) -> Budget:
        if self.min_agreement is not None:
            return Budget(agreement=self.min_agreement)
        return Budget(error=0.02 if self.max_error is None else self.max_error)

    def _level(self, readers: Sequence[ir.Node]) -> float:
        if self.threshold is None:
            return 0.0
        if not isinstance(self.threshold, dict):
            return float(self.threshold)
        for pattern, level in self.threshold.items():
            if any(Select(name=(pattern,))(n) or Select(module=(pattern,))(n) for n in readers):
                return level
        return 0.0


def _graph(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _settle(model: ir.Model, context: Context) -> list[Edit]:
    """Fixes the shapes of inputs to those of the sample: state has to have a size."""
    if context.sample is None:
        return []
    open_ = {
        name: tuple(array.shape)
        for name, array in context.sample.items()
        if (value := next((v for v in model.graph.inputs if v.name == name), None)) is not None
        and static_shape(value) is None
    }
    if not open_:
        return []
    text = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in open_.items())
    trial = model.clone()
    fix_shapes(trial, open_)
    try:
        context.run_sample(trial, [v.name or "" for v in trial.graph.outputs])
    except OnnxcompError:  # branches that are never taken may not fit the shapes
        detail = f"shapes stay open, since the model does not load with fixed ones; state is for {text} only"
    else:
        fix_shapes(model, open_)
        detail = f"shapes fixed, since state has a size: {text}"
    return [Edit(action="applied", node="", op_type="model", detail=detail)]


def _unknown(main: bool) -> str:
    where = "" if main else ", from a sample that takes its branch"
    return f"the shape of its input is not known; give --data, or fix the shapes of the model's inputs{where}"
