"""Puts holds into a graph: the nodes, their thresholds and their state."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, redirect, users
from onnxcomp.macs import count_macs
from onnxcomp.ops import DELTA_OPS, DOMAIN
from onnxcomp.passes._delta_scopes import Slot, States
from onnxcomp.passes._delta_sites import Site
from onnxcomp.target import Array


@dataclass(kw_only=True)
class Place:
    """A value that is held.

    Attributes:
        node: The op that holds it.
        reader: The first convolution, product or cell that reads it, for the report.
        slot: Its state.
        threshold: Its threshold, an initializer.
        pixels: Axis 1 is sent as a whole.
        source: Name of the value in the model as it was; None if it has none.
        cost: Multiply-accumulates that read the value.
        density: Share of elements or places that were sent in each calibration step after the first, 0 to 1.
    """

    node: ir.Node
    reader: ir.Node
    slot: Slot
    threshold: ir.Value
    pixels: bool
    source: str | None
    cost: int
    density: tuple[float, ...] = ()

    @property
    def level(self) -> float:
        """The threshold."""
        assert self.threshold.const_value is not None
        return float(self.threshold.const_value.numpy())

    @level.setter
    def level(self, level: float) -> None:
        assert self.threshold.dtype is not None
        array = np.array(level, self.threshold.dtype.numpy())
        self.threshold.const_value = ir.tensor(array, name=self.threshold.name)

    def describe(self, semantics: str) -> str:
        """What was done, for the report."""
        what = "rounded to multiples of" if semantics == "quantized" and self.level else "sent from a change above"
        text = f"input {what} {self.level:.3g}; state of {self.slot.spec.nbytes} bytes"
        if not self.density:
            return text
        share, most = float(np.mean(self.density)), max(self.density)
        return f"{text}; {share:.1%} of {'places' if self.pixels else 'elements'} sent a step, {most:.1%} at most"


class Holds:
    """The held values of a model.

    Args:
        model: The model.
        editor: Of its main graph.
        states: Where state is added.
        semantics: `residual` or `quantized`.
    """

    def __init__(self, model: ir.Model, editor: Editor, states: States, semantics: str) -> None:
        self.model, self.editor, self.states = model, editor, states
        self.quantized = semantics == "quantized"
        self.places: list[Place] = []
        self._started: ir.Value | None = None

    def add(self, site: Site, shape: tuple[int, ...], dtype: ir.DataType, level: float, *, rounded: bool) -> None:
        """Holds the value of a site for all who read it.

        Args:
            site: The site.
            shape: Shape of its value.
            dtype: Type of its value.
            level: Threshold, or step if `rounded`.
            rounded: Rounds to multiples of `level`, and sends every change.
        """
        value, graph = site.value, site.graph
        readers = users(value)
        editor = self.editor if graph is self.model.graph else Editor(self.model, graph)
        threshold = self.threshold(f"{value.name}_{'step' if rounded else 'threshold'}", level, dtype)
        source, limit = value, threshold
        if rounded:
            scaled = editor.after(value, "Div", [value, threshold], name=f"{value.name}_scaled", like=value)
            whole = editor.after(scaled, "Round", [scaled], name=f"{value.name}_rounded", like=value)
            source = editor.after(whole, "Mul", [whole, threshold], name=f"{value.name}_stepped", like=value)
            limit = self.threshold(f"{value.name}_zero", 0.0, dtype)
        slot = self.states.add(graph, f"{value.name}_sent", shape, dtype)
        op = "DeltaHoldPixels" if site.pixels else "DeltaHold"
        held = editor.after(source, op, [source, slot.read, self.started(), limit], name=f"{value.name}_held")
        held.shape, held.dtype = ir.Shape(shape), dtype
        node = held.producer()
        assert node is not None
        node.domain = DOMAIN
        DELTA_OPS[op].install(self.model)
        redirect(value, held, readers)
        self.states.put(slot, held)
        self.places.append(
            Place(
                node=node, reader=site.readers[0], slot=slot, threshold=threshold, pixels=site.pixels,
                source=value.name, cost=sum(count_macs(n) for n in site.readers),
            )
        )  # fmt: skip

    @property
    def costs(self) -> Array:
        """Multiply-accumulates that read each place, 1 where they are not known."""
        return np.array([max(p.cost, 1) for p in self.places], np.float64)

    def threshold(self, name: str, level: float, dtype: ir.DataType) -> ir.Value:
        """A scalar of a type, in the main graph."""
        return self.editor.weight(name, np.array(level, dtype.numpy()))

    def started(self) -> ir.Value:
        """False in the first step of a stream."""
        if self._started is None:
            slot = self.states.add(self.model.graph, "delta_started", (), ir.DataType.BOOL)
            true = self.editor.weight("delta_true", np.array(True))
            self._started = slot.read
            self.states.put(slot, true)
        return self._started
