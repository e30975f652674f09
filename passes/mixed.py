"""Mixed precision: int8 where it pays, float where int8 costs too much or is no faster, 4 bits where size demands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import onnx_ir as ir
from annotated_types import Ge, Gt, Le
from typing_extensions import override

from onnxcomp.passes._forms import Search
from onnxcomp.passes._narrow import narrow
from onnxcomp.passes._sensitivity import Trials, exactly
from onnxcomp.passes._timings import Timer
from onnxcomp.passes.quantize import Quantize
from onnxcomp.rewrite import Context, Edit, Pass, refused
from onnxcomp.stats import Observer

_MIN_SQNR = 25.0
_LEFT = "onnxcomp.mixed"  # key in the metadata of a node that stays in float


@dataclass(frozen=True, kw_only=True)
class Mixed(Pass):
    """Quantizes like `quantize`, but chooses the form of each linear op: 8 bits, float, or 4-bit weights.

    Ops that run no faster on integers *as measured on the target* stay in float from the start, if the whole model is
    not slower for it. Times are taken in several rounds; where they are too noisy to tell, the op is quantized. The
    others go back to float in the order of the error that they cause alone, end to end, for each microsecond that they
    save, until `min_sqnr` and `max_drop` hold. Without a target to measure on, multiply-accumulates stand for time.
    `max_time` and `max_size` go before fidelity: ops return to 8 bits until both hold. If the model is still too large,
    matrices get 4-bit weights in blocks, those first that cost least for each byte saved, where the target has a kernel
    for them (Conv has none). Static integers of fewer than 8 bits are stored in bytes and run no faster, so they are
    not among the choices.

    Attributes:
        min_sqnr: SQNR of the worst output against the original to reach, in dB, on the calibration feeds compared;
            25 if neither this nor `max_drop` is given.
        max_drop: Most of these feeds, as a share, whose largest output element may move (top-1 for class scores).
        max_time: Most of the float model's time to take, as measured.
        max_size: Most bytes of weights to take; up to 1, as a share of those of the float model.
        samples: Feeds that outputs are compared on, spread evenly over the data.
        quantize: How ops are quantized; its `where` is ignored for that of this pass.
    """

    name: ClassVar[str] = "mixed"
    summary: ClassVar[str] = "int8, float or 4-bit weights by layer, by measured error and measured time"
    min_opset: ClassVar[int] = Quantize.min_opset

    min_sqnr: Annotated[float, Gt(0.0), Le(120.0)] | None = None
    max_drop: Annotated[float, Ge(0.0), Le(1.0)] | None = None
    max_time: Annotated[float, Gt(0.0), Le(1.0)] | None = None
    max_size: Annotated[float, Gt(0.0)] | None = None
    samples: Annotated[int, Ge(1), Le(256)] = 8
    quantize: Quantize = field(default_factory=Quantize)

    def _step(self, model: ir.Model) -> Quantize:
        skip = tuple(exactly(n.name or "") for n in _left(model))
        return replace(self.quantize, where=replace(self.where, skip=(*self.where.skip, *skip)))

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        self._step(model).requires(model, context)

    @override
    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        return self._step(model).observers(model, context)

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        step = self._step(model)
        earlier = [refused(n, "an earlier run of mixed left it in float") for n in _left(model) if self.where(n)]
        if not context.statistics:  # nothing to quantize
            return [*step.apply(model, context), *earlier]
        trials = Trials(model=model, context=context, step=step, samples=self.samples)
        nodes = {n.name or "": n for n in trials.linears()}
        limit = self.min_sqnr if self.min_sqnr is not None or self.max_drop is not None else _MIN_SQNR
        search = Search(
            trials=trials,
            costs=trials.costs(nodes.values()),
            timer=Timer(measure=context.timer, sample=context.sample),
            min_sqnr=limit,
            max_drop=self.max_drop,
            max_time=self.max_time,
            max_size=self.max_size,
        )
        forms = search.run()
        edits = trials.quantize(model, trials.where_not({*forms.floats, *forms.narrow}))
        edits += narrow(model, forms.narrow, trials)
        edits += [*earlier, *(refused(nodes[name], reason) for name, reason in forms.floats.items())]
        for name in forms.floats:
            nodes[name].metadata_props[_LEFT] = "float"
        return [*edits, Edit(action="applied", node="", op_type="model", detail=search.outcome(forms))]


def _left(model: ir.Model) -> list[ir.Node]:
    """The ops that an earlier run left in float; they stay so, or a second run would quantize some of them."""
    return [node for node in model.graph if _LEFT in node.metadata_props]
