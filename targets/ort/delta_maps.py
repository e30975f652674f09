"""Convolutional parts of a streaming model in the layout of the kernels: maps whose pixels lie together, and masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxcomp import native
from onnxcomp.edit import Editor, constant
from onnxcomp.target import Array
from onnxcomp.targets.ort.delta_states import StreamStates
from onnxcomp.targets.ort.dense_forms import later

_TO_CHANNELS = (0, 3, 1, 2)


@dataclass(frozen=True)
class Map:
    """A map in the layout of the kernels.

    Attributes:
        held: What was last sent, `[N, H, W, C]`.
        mask: Pixels that were sent in this step, `[N, H, W]`.
    """

    held: ir.Value
    mask: ir.Value


@dataclass(frozen=True)
class Layer:
    """An op that a kernel can compute, not yet in the graph.

    Attributes:
        value: What it computes, `[N, C, H, W]`.
        op: The kernel.
        sources: The maps that it reads, as the model has them.
        weights: Names and readers of its weights, in the kernel's layout, with their shapes.
        attributes: Its attributes.
        activated: It has an activation already.
    """

    value: ir.Value
    op: str
    sources: tuple[ir.Value, ...]
    weights: tuple[tuple[str, Callable[[], Array], tuple[int, ...]], ...] = ()
    attributes: Mapping[str, int | float] = field(default_factory=dict)
    activated: bool = False

    def with_activation(self, value: ir.Value, code: int, alpha: float, beta: float) -> Layer:
        """The same with an activation behind it."""
        attributes = {**self.attributes, "activation": code, "alpha": alpha, "beta": beta}
        return replace(self, value=value, attributes=attributes, activated=True)


class Maps:
    """The maps of a model that kernels compute.

    Args:
        model: The model.
        editor: Of its main graph.
        states: Its states.
        started: False in the first step of a stream.
    """

    def __init__(self, model: ir.Model, editor: Editor, states: StreamStates, started: ir.Value) -> None:
        self._model, self._editor, self._states, self._started = model, editor, states, started
        self.layers: dict[ir.Value, Layer] = {}
        self.ready: dict[ir.Value, Map] = {}
        self._numbers: dict[bytes, ir.Value] = {}

    def __contains__(self, value: ir.Value | None) -> bool:
        return value is not None and (value in self.layers or value in self.ready)

    def of(self, value: ir.Value) -> Map:
        """The map of a value, computed from here on if it was not; it sends whatever differs at all."""
        found = self.ready.get(value)
        if found is None:
            layer = self.layers[value]
            last = self._states.new(f"{value.name}_sent", pixels(value))
            found = self._emit(layer, value, last, np.zeros(1, np.float32), np.zeros(1, np.float32))
            self._states.put(last, found.held)
            self.ready[value] = found
        return found

    def hold(self, node: ir.Node, source: ir.Value, step: Array) -> None:
        """Computes what a hold holds by a kernel, which then updates the state of the hold.

        Args:
            node: The hold.
            source: The value before it, without rounding.
            step: Multiples of which it is rounded to, one or one a channel; 0 for none.
        """
        last, level = node.inputs[1], constant(node.inputs[3])
        held = node.outputs[0]
        assert last is not None
        assert level is not None
        threshold = np.ravel(level).astype(np.float32)
        layer = self.layers.get(source)
        if layer is None:
            known = source in self.ready  # computed by a kernel, for others as well
            layer = Layer(source, "DeltaUnary", (source,)) if known else Layer(source, "DeltaEnter", ())
        found = self._emit(layer, held, last, threshold, step)
        self._states.take_over(last, held, found.held, pixels(held))
        self.ready[held] = found

    def leave(self, value: ir.Value) -> ir.Value:
        """A map as the rest of the model reads it, `[N, C, H, W]`."""
        held = self.of(value).held
        return self._editor.after(
            held,
            "Transpose",
            [held],
            name=f"{value.name}_channels",
            attributes={"perm": list(_TO_CHANNELS)},
            like=value,
        )

    def _emit(self, layer: Layer, value: ir.Value, last: ir.Value, threshold: Array, step: Array) -> Map:
        """Puts a kernel behind the node that computes `value`."""
        anchor = value.producer()
        assert anchor is not None
        maps = [self.of(source) for source in layer.sources]
        before: list[ir.Node] = []
        while layer.op == "DeltaConcat" and len(maps) > 2:  # the kernel joins two
            maps[:2] = [self._join(anchor, maps[0], maps[1], before)]
        inputs = [v for m in maps for v in (m.held, m.mask)] or [layer.value]
        inputs += [later(self._editor, name, read, ir.DataType.FLOAT, shape) for name, read, shape in layer.weights]
        inputs += [last, self._started, self._number(threshold), self._number(step)]
        node, found = self._node(anchor, layer.op, inputs, layer.attributes, pixels(value))
        self._model.graph.insert_after(anchor, [*before, node])
        return found

    def _join(self, anchor: ir.Node, first: Map, second: Map, nodes: list[ir.Node]) -> Map:
        """The channels of two maps in one; the node is added to `nodes`."""
        sizes = [[int(d) for d in m.held.shape or () if isinstance(d, int)] for m in (first, second)]
        shape = (*sizes[0][:3], sizes[0][3] + sizes[1][3])
        last = self._states.new(f"{anchor.outputs[0].name}_joined", shape)
        nothing = self._number(np.zeros(1, np.float32))
        inputs = [first.held, first.mask, second.held, second.mask, last, self._started, nothing, nothing]
        node, found = self._node(anchor, "DeltaConcat", inputs, {}, shape)
        nodes.append(node)
        self._states.put(last, found.held)
        return found

    def _node(
        self,
        anchor: ir.Node,
        op: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, int | float],
        shape: tuple[int, ...],
    ) -> tuple[ir.Node, Map]:
        name = f"{anchor.name or anchor.outputs[0].name}_delta"
        outputs = [ir.Value(name=self._editor.free(f"{name}_{what}")) for what in ("held", "mask")]
        outputs[0].type, outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        outputs[1].type, outputs[1].shape = ir.TensorType(ir.DataType.UINT8), ir.Shape(shape[:3])
        node = ir.node(
            op, inputs, dict(attributes), domain=native.DOMAIN, outputs=outputs, name=self._editor.free_node(name)
        )
        node.metadata_props.update(anchor.metadata_props)
        return node, Map(*outputs)

    def _number(self, array: Array) -> ir.Value:
        key = array.tobytes()
        if key not in self._numbers:
            self._numbers[key] = self._editor.weight("delta_level", array)
        return self._numbers[key]


def is_map(value: ir.Value | None) -> bool:
    """Whether a value is a float map of known shape."""
    return (
        value is not None
        and value.dtype == ir.DataType.FLOAT
        and value.shape is not None
        and len(value.shape) == 4
        and all(isinstance(d, int) and d > 0 for d in value.shape)
    )


def channels(value: ir.Value) -> tuple[int, int, int, int]:
    """`[N, C, H, W]` of a map."""
    assert value.shape is not None
    n, c, h, w = (int(d) for d in value.shape if isinstance(d, int))
    return n, c, h, w


def pixels(value: ir.Value) -> tuple[int, int, int, int]:
    """`[N, H, W, C]` of a map."""
    shape = channels(value)
    return shape[0], shape[2], shape[3], shape[1]
