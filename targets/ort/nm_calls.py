"""Calls of N:M products, whose weights lowering unpacks or packs anew."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.ops import DOMAIN, NM_OPS, unpack_nm
from onnxcomp.target import Array
from onnxcomp.targets.ort.dense_forms import drop_unused

_GROUP = 4  # inputs that a slot of a kernel selects from


@dataclass(frozen=True)
class NmCall:
    """A call of an N:M product with a constant weight.

    Attributes:
        node: The node.
        parts: Values, indices and, of integers, the scale.
        m: Size of a group.
        stored: Weights of a group that are stored.
        k: Rows of the weight.
        n: Its columns.
    """

    node: ir.Node
    parts: tuple[ir.Value, ...]
    m: int
    stored: int
    k: int
    n: int

    @property
    def int8(self) -> bool:
        """Whether the values are integers with a scale."""
        return len(self.parts) == 3

    @property
    def kept(self) -> int | None:
        """How many of four consecutive weights a kernel stores; None if there is no kernel for the pattern."""
        if self.m % _GROUP == 0 and self.stored <= 2:  # as many in a part of a group at most
            return self.stored
        return 2 if (self.m, self.stored) == (2, 1) else None

    @property
    def pattern(self) -> str:
        """N:M as text."""
        return f"{self.stored}:{self.m}"

    def weight(self) -> Array:
        """Values as a matrix, (k, n)."""
        values, indices = (constant(value) for value in self.parts[:2])
        assert values is not None
        assert indices is not None
        return unpack_nm(values, indices, m=self.m, k=self.k)


def is_nm_call(node: ir.Node) -> bool:
    """Whether a node calls an N:M product, constant weight or not."""
    return node.domain == DOMAIN and node.op_type in NM_OPS


def nm_call(node: ir.Node) -> NmCall | str:
    """What a node calls, or why it has to run by the body of its function."""
    found = []
    for value in node.inputs[1:]:
        if value is None or value.const_value is None or value.is_graph_input():
            return "its weight is not a constant; it runs by its function body"
        found.append(value)
    values = found[0].const_value
    assert values is not None
    slots, n = values.shape.numpy()
    m, k = int(attribute(node, "m")), int(attribute(node, "k"))
    return NmCall(node, tuple(found), m, slots // -(-k // m), k, n)


def drop_uncalled(model: ir.Model) -> None:
    """Takes packed weights and functions of N:M products away that nothing uses any more."""
    drop_unused(model)
    called = {n.op_identifier() for n in model.graph.all_nodes()}
    for identifier in [f for f in model.functions if f[0] == DOMAIN and f[1] in NM_OPS and f not in called]:
        del model.functions[identifier]
