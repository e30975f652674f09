"""Passes over a model, the context they run in, and the pipeline that runs them in order.

A pass is one frozen dataclass: its fields are its configuration and at the same time the keys of a recipe. It says
what it wants observed, then edits the model in place and reports every edit and every refusal.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar

import onnx_ir as ir

from onnxcomp.calibrate import Runner, by_row, collect
from onnxcomp.edit import defaults_hidden
from onnxcomp.errors import CalibrationError, GraphError, OnnxcompError, PassError
from onnxcomp.metrics import sqnr
from onnxcomp.model import ModelSize, check_graph, model_size, quiet, root_cause
from onnxcomp.opset import opset, raise_opset
from onnxcomp.select import Select
from onnxcomp.stats import Group, Observer
from onnxcomp.target import Array, Capabilities, Feed

Progress: TypeAlias = Callable[[str, int, int | None], None]
"""Called with what is being done, how many steps are done, and how many there are (None if unknown)."""

AnyObserver = TypeVar("AnyObserver", bound=Observer)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One change that a pass made, or one that it refused to make.

    Attributes:
        action: `applied` or `refused`.
        node: Name of the node that was considered.
        op_type: Its op type.
        detail: What was done, or why not.
    """

    action: Literal["applied", "refused"]
    node: str
    op_type: str
    detail: str


def applied(node: ir.Node, detail: str) -> Edit:
    """Edit that was made at `node`."""
    return Edit(action="applied", node=node.name or "", op_type=node.op_type, detail=detail)


def refused(node: ir.Node, reason: str) -> Edit:
    """Edit that was not made at `node`, and why."""
    return Edit(action="refused", node=node.name or "", op_type=node.op_type, detail=reason)


class Sweep(Protocol):
    """Shows the calibration data to observers."""

    def __call__(self, model: ir.Model, observers: Mapping[str, Observer], limit: int | None = None) -> None:
        """Runs the data, or `limit` feeds spread evenly over it, through `model`."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a pass may know besides the model.

    Attributes:
        capabilities: Of the target that the model is rewritten for.
        statistics: Value name to the observer that the pass asked for, filled by calibration.
        seed: Seed of everything random.
        runner: Runs a model and returns named intermediate values; None when there is no data.
        sample: One feed of the calibration data; None when there is no data.
        sweep: Shows all calibration data to more observers, on the model as it is by then; None when there is no data.
            For a pass whose statistics are too large to be held at once, or depend on its own edits. Given a limit, it
            uses no more feeds than that.
        feeds: The calibration feeds in order, for a pass that takes them for a sequence; None when there is no data.
        timer: Measures a model on the target with the sample feed; returns microseconds by name of a compute node, and
            those of the whole run under the empty name. None where nothing can be measured.
    """

    capabilities: Capabilities
    statistics: Mapping[str, Observer] = field(default_factory=dict)
    seed: int = 0
    runner: Runner | None = None
    sample: Feed | None = None
    sweep: Sweep | None = None
    feeds: Iterable[Feed] | None = None
    timer: Callable[[ir.Model, Feed], Mapping[str, float]] | None = None

    def statistic(self, name: str, kind: type[AnyObserver]) -> AnyObserver:
        """The observer of value `name`.

        Raises:
            CalibrationError: If it was not observed, or with another kind of observer.
        """
        observer = self.statistics.get(name)
        parts = observer.parts if isinstance(observer, Group) else (observer,)
        found = next((p for p in parts if isinstance(p, kind)), None)
        if found is None:
            raise CalibrationError(f"value {name!r} has no {kind.__name__}; give calibration data with --data")
        return found

    def run_sample(self, model: ir.Model, values: Sequence[str]) -> dict[str, Array]:
        """Runs the sample feed through `model` and returns the named values.

        Raises:
            CalibrationError: If there is no data.
        """
        if self.runner is None or self.sample is None:
            raise CalibrationError("this pass has to run the model; give calibration data with --data")
        return self.runner(model, values)(self.sample)


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """A graph rewrite. Subclasses are frozen dataclasses with keyword-only fields.

    Attributes:
        name: Name in recipes and in the entry point group `onnxcomp.passes`.
        summary: One line for `onnxcomp list passes`.
        min_opset: Opset of the default domain that the pass writes; an older model is converted before the pass runs.
        selective: A selector that takes no node leaves the graph as it is; False for a pass that tidies all of it.
        where: The nodes it may touch.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    min_opset: ClassVar[int] = 1
    selective: ClassVar[bool] = True
    # Read by pydantic when a recipe is validated: a key that is no field is an error, and "4" is not 4.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "strict": True}

    where: Select = Select()

    def needed_opset(self, context: Context) -> int:
        """Opset that the pass writes as it is configured, for this target."""
        return self.min_opset

    def requires(self, model: ir.Model, context: Context) -> None:  # noqa: B027 - most passes work on every model
        """Refuses early, before calibration, when the pass cannot work on this model or target.

        Raises:
            PassError: With the reason.
        """

    def observers(self, model: ir.Model, context: Context) -> Mapping[str, Observer]:
        """What has to be observed before `apply`: name of a value of the main graph to a fresh observer."""
        return {}

    @abstractmethod
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place.

        Returns:
            Every edit and every refusal with its reason.

        Raises:
            PassError: If the model cannot be rewritten at all.
        """


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What one pass of a pipeline did.

    Attributes:
        name: Name of the pass.
        config: Its configuration.
        edits: What it did and what it refused.
        size: Size of the model after it.
        seconds: Wall time, calibration included.
        sqnr: SQNR in dB of the pass's output against its input on the sample feed, worst output; None unless the
            pipeline checks numerically.
    """

    name: str
    config: Pass
    edits: tuple[Edit, ...]
    size: ModelSize
    seconds: float
    sqnr: float | None = None

    @property
    def applied(self) -> int:
        """Number of edits made."""
        return sum(e.action == "applied" for e in self.edits)


Check = Literal["none", "graph", "numeric"]


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """Passes that run in order for one target.

    Attributes:
        passes: The passes.
        capabilities: Of the target.
        runner: Runs probe models for calibration; needed only when a pass observes or `check` is `numeric`.
        check: `graph` validates the model after every pass; `numeric` also compares outputs on the first feed.
        seed: Seed of everything random.
        timer: See `Context.timer`.
    """

    passes: Sequence[Pass]
    capabilities: Capabilities
    runner: Runner | None = None
    check: Check = "graph"
    seed: int = 0
    timer: Callable[[ir.Model, Feed], Mapping[str, float]] | None = None

    def run(
        self, model: ir.Model, data: Iterable[Feed] | None = None, progress: Progress | None = None
    ) -> tuple[PassReport, ...]:
        """Rewrites `model` in place.

        Args:
            model: The model.
            data: Calibration feeds, iterated for every pass that observes; batches are cut into single samples.
            progress: Told about every pass and every feed.

        Returns:
            One report a pass.

        Raises:
            CalibrationError: If a pass observes and there is no data.
            PassError: If a pass fails; the message names it.
        """
        data = self.samples(model, data)
        context = self.context(data)
        known = _complaint(model) if self.check != "none" else None
        return tuple(self._run_pass(p, model, context, data, known, progress) for p in self.passes)

    def samples(self, model: ir.Model, data: Iterable[Feed] | None) -> Iterable[Feed] | None:
        """The data cut into single samples, where `model` treats each of a batch alone."""
        return data if data is None or self.runner is None else by_row(model, data, self.runner)

    def context(self, data: Iterable[Feed] | None = None) -> Context:
        """What passes may know before any of them runs."""
        context = Context(capabilities=self.capabilities, seed=self.seed, runner=self.runner, timer=self.timer)
        if data is None or self.runner is None:
            return context
        sweep = _sweep_over(data, self.runner, None)
        return replace(context, sample=next(iter(data), None), sweep=sweep, feeds=data)

    def _run_pass(
        self,
        step: Pass,
        model: ir.Model,
        context: Context,
        data: Iterable[Feed] | None,
        known: str | None,
        progress: Progress | None,
    ) -> PassReport:
        started = time.perf_counter()
        if progress:
            progress(step.name, 0, None)
        try:
            edits = _raise_opset(model, step.needed_opset(context))
            step.requires(model, context)
            if data is not None and self.runner is not None:
                told = _named(progress, f"{step.name}: calibrate")
                context = replace(context, sweep=_sweep_over(data, self.runner, told))
            observers = step.observers(model, context)
            if observers:
                if context.sweep is None:
                    raise CalibrationError("it needs calibration data; give some with --data")
                context.sweep(model, observers)
                context = replace(context, statistics=observers)
            before = self._outputs(model, context)
            edits += step.apply(model, context)
            complaint = _complaint(model) if self.check != "none" else None
            if complaint not in (None, known):
                raise GraphError(complaint)
        except OnnxcompError as error:
            raise type(error)(f"pass {step.name!r}: {error}") from error
        return PassReport(
            name=step.name,
            config=step,
            edits=tuple(edits),
            size=model_size(model),
            seconds=time.perf_counter() - started,
            sqnr=_worst_sqnr(before, self._outputs(model, context)),
        )

    def _outputs(self, model: ir.Model, context: Context) -> dict[str, Array]:
        if self.check != "numeric" or context.sample is None:
            return {}
        return context.run_sample(model, [v.name or "" for v in model.graph.outputs])


def _complaint(model: ir.Model) -> str | None:
    """What is not valid in the graph. Runtimes run what the checker refuses, so it counts only if it is new."""
    try:
        check_graph(model)
    except GraphError as error:
        return str(error)
    return None


def _sweep_over(data: Iterable[Feed], runner: Runner, progress: Callable[[int, int | None], None] | None) -> Sweep:
    def sweep(model: ir.Model, observers: Mapping[str, Observer], limit: int | None = None) -> None:
        step = max(len(data) // limit, 1) if limit is not None and isinstance(data, Sized) else 1
        feeds = data if limit is None else list(islice(data, 0, step * limit, step))
        collect(model, observers, feeds, runner, progress)

    return sweep


def _raise_opset(model: ir.Model, needed: int) -> list[Edit]:
    before = opset(model)
    if not raise_opset(model, needed):
        return []
    return [Edit(action="applied", node="", op_type="model", detail=f"opset {before} converted to {needed}")]


def _named(progress: Progress | None, text: str) -> Callable[[int, int | None], None] | None:
    return None if progress is None else lambda done, total: progress(text, done, total)


def _worst_sqnr(before: Mapping[str, Array], after: Mapping[str, Array]) -> float | None:
    shared = [sqnr(before[k], after[k]) for k in before if k in after and before[k].dtype.kind != "O"]
    return min(shared) if shared else None


class IrPassAdapter:
    """Runs `onnx_ir` passes inside one of ours and turns an exception into a `PassError`.

    The passes do not see default values of graph inputs, which some would take for constants.
    """

    def __init__(self, *passes: ir.passes.PassBase) -> None:
        self._passes = passes

    def __call__(self, model: ir.Model) -> bool:
        """Runs the passes in order on `model`, in place.

        Returns:
            Whether any of them changed the model.
        """
        changed = False
        for step in self._passes:
            try:
                with defaults_hidden(model), quiet():
                    result = step(model)
            except Exception as error:
                raise PassError(f"{type(step).__name__} failed: {root_cause(error)}") from error
            if result.model is not model:
                raise GraphError(f"{type(step).__name__} does not work in place")
            changed |= result.modified
        return changed
