"""Finds out how far another order of one layer's inputs reaches: all positions of all values that move with them.

Labels spread from the axis along which a weight is summed, through every node that a labelled value touches, until
nothing changes any more. There is one rule for each op type, which says what the positions of its values have to do
with one another. Labels that no rule covers stay where they are, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import in_main_graph, users
from onnxcomp.passes._permutation_labels import Labels, join, labelled, occurrences
from onnxcomp.passes._permutation_relations import Place, Relation
from onnxcomp.passes._permutation_sizes import KnownSizes
from onnxcomp.passes._turns import Sizes, constant_shape
from onnxcomp.select import Select
from onnxcomp.target import Array

_FREE = frozenset({"Shape", "Size"})
# Ops on the way from a constant to the op that it is a weight of, which no selector has to take.
_ON_THE_WAY = frozenset({"Transpose", "Identity", "Cast", "DequantizeLinear", "Reshape", "Unsqueeze", "Squeeze"})
_SUMS = frozenset({"Add", "Sum", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})


@dataclass(kw_only=True)
class Flow:
    """All that moves with the inputs of one layer.

    Attributes:
        model: The model; it is not changed.
        shapes: Shapes of its values.
        rules: Rule by domain and op type.
        where: Nodes whose constants may change.
        cache: Graph inputs and outputs may move: the caller feeds the one back into the other.
        labels: Of positions.
    """

    model: ir.Model
    shapes: KnownSizes
    rules: Mapping[tuple[str, str], Rule]
    where: Select
    cache: bool
    labels: Labels
    _strands: dict[Place, list[Array]] = field(default_factory=dict)
    _relations: dict[ir.Node, list[Relation]] = field(default_factory=dict)
    _kept: dict[ir.Node, list[tuple[Array, tuple[int, ...]]]] = field(default_factory=dict)
    _pending: dict[ir.Node, None] = field(default_factory=dict)

    def spread(self, value: ir.Value, codes: Array) -> None:
        """Labels a weight, and everything that has to move with it."""
        self.put(value, codes)
        while self._pending and not self.labels.fixed().all():
            node = next(reversed(self._pending))
            del self._pending[node]
            self._visit(node)
        self._pending.clear()
        if self.cache:
            self._pair_ends()

    @property
    def places(self) -> list[Place]:
        """All places with labels."""
        return list(self._strands)

    def strands(self, place: Place) -> list[Array]:
        """Arrays of labels of a place."""
        return self._strands.get(place, [])

    def sizes(self, value: ir.Value | None) -> Sizes | None:
        """Sizes of a value; None if not even their number is known."""
        return self.shapes.of(value)

    def place(self, node: ir.Node, index: int) -> Place | None:
        """Where the labels of an input are kept: a vector that is shared belongs to each of its readers."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        shape = _constant_shape(value)
        vector = shape is not None and sum(s > 1 for s in shape) <= 1
        return (node, index) if vector and len(value.uses()) > 1 else value

    def put(self, place: Place, codes: Array) -> None:
        """Labels the positions of a place."""
        value = value_of(place)
        sizes = self.sizes(value)
        if not labelled(codes) or not (codes >= 0).any():
            return
        if sizes is None or any(sizes[a] != codes.shape[a] for a in labelled(codes)):
            self.labels.fix(codes, f"the shape of {value.name!r} is not known")
            return
        if not join(self.labels, self._strands.setdefault(place, []), codes):
            return
        if (value.is_graph_input() or value.is_graph_output()) and not (self.cache and value.const_value is None):
            what = "an input" if value.is_graph_input() else "an output"
            self.labels.fix(codes, f"{value.name!r} is {what} of the graph")
        if isinstance(place, ir.Value):
            producer = value.producer()
            self._pending.update(dict.fromkeys(users(value) if producer is None else [producer, *users(value)]))

    def classes(self) -> Array:
        """A number for each label: those of the same number may change places. -1 for those that have to stay."""
        labels = self.labels
        roots = labels.find(np.arange(labels.count))
        found = np.zeros(labels.count, np.int64)
        for strands in self._strands.values():
            for codes in strands:
                present = labels.find(codes)
                counts = np.bincount(present[present >= 0], minlength=labels.count)
                found = _refined(found, counts)
        for codes, axes in (kept for kepts in self._kept.values() for kept in kepts):
            keys = np.zeros(codes.shape, np.int64)
            for axis in axes:
                along = np.arange(codes.shape[axis]).reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
                keys = keys * codes.shape[axis] + along
            found = _refined(found, occurrences(labels.find(codes), keys, labels.count))
        found[labels.fixed() | (roots != np.arange(labels.count))] = -1
        return found

    def broken(self, order: Array) -> str:
        """Which node would compute something else with labels in that order; empty if none would."""
        for node, relations in self._relations.items():
            if not all(relation.holds(self, order) for relation in relations):
                return f"{node.op_type} {node.name!r} would see the channels in two different orders"
        return ""

    def meets(self, moved: Array) -> bool:
        """Whether labels that move pass through a sum of two activations: a residual stream."""
        for node in self._relations:
            if node.op_type in _SUMS:
                computed = [v for v in node.inputs if v is not None and _constant_shape(v) is None]
                if sum(self._moves(v, moved) for v in computed) > 1:
                    return True
        return False

    def _moves(self, value: ir.Value, moved: Array) -> bool:
        return any(moved[c[c >= 0]].any() for c in map(self.labels.find, self.strands(value)))

    def _visit(self, node: ir.Node) -> None:
        around = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if node.op_type in _FREE or node.op_type == "Constant":
            return
        if not in_main_graph(self.model, node):
            self._fix(around, f"{node.op_type} {node.name!r} in a subgraph reads the channels")
            return
        if node not in self._relations:
            rule = self.rules.get((node.domain.removeprefix("ai.onnx"), node.op_type))
            self._relations[node] = [] if rule is None else list(rule(self, node) or [])
        covered: set[Place] = set()
        self._kept[node] = []
        for relation in self._relations[node]:
            covered.update(relation.places)
            self._kept[node] += relation.spread(self)
        values = {value_of(place) for place in covered}
        for value in around:
            if value not in values:
                reason = f"{node.op_type} {node.name!r} does not commute with another order of {value.name!r}"
                self._fix([value], reason)
        if node.op_type not in _ON_THE_WAY and not self.where(node):
            given = [self.place(node, i) for i in range(len(node.inputs))]
            changed = [p for p in given if p is not None and p in self._strands and is_weight(value_of(p))]
            for codes in (c for p in changed for c in self.strands(p)):
                self.labels.fix(codes, f"{node.op_type} {node.name!r} is not selected")

    def _fix(self, places: Sequence[Place], reason: str) -> None:
        for codes in (c for place in places for c in self.strands(place)):
            self.labels.fix(codes, reason)

    def _pair_ends(self) -> None:
        """Labels stay where a graph output is not fed back into an input that moves likewise."""
        ends = [p for p in self._strands if isinstance(p, ir.Value) and (p.is_graph_input() or p.is_graph_output())]
        kinds: dict[bytes, list[list[Array]]] = {}
        for value in ends:
            for codes in self.strands(value):
                key = repr(codes.shape).encode() + self.labels.find(codes).tobytes()
                kinds.setdefault(key, [[], []])[int(value.is_graph_output())].append(codes)
        for inputs, outputs in kinds.values():
            if len(inputs) != len(outputs):
                for codes in (*inputs, *outputs):
                    self.labels.fix(codes, "the cache has not as many inputs as outputs")


Rule: TypeAlias = Callable[[Flow, ir.Node], Sequence[Relation] | None]
"""What an op asks of the order of channels; None or nothing if it does not commute with any other."""


def value_of(place: Place) -> ir.Value:
    """The value at a place."""
    if isinstance(place, ir.Value):
        return place
    value = place[0].inputs[place[1]]
    assert value is not None
    return value


def _constant_shape(value: ir.Value) -> tuple[int, ...] | None:
    """Shape of what is stored, and not computed from something stored."""
    return constant_shape(value) if is_weight(value) else None


def is_weight(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None and (producer is None or producer.op_type == "Constant")


def _refined(classes: Array, keys: Array) -> Array:
    """Classes of labels that are in the same class and have the same key."""
    if (keys == keys[0]).all():
        return classes
    _, found = np.unique(np.stack([classes, keys]), axis=1, return_inverse=True)
    return np.asarray(found.reshape(-1))
