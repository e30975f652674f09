"""Feed-forward blocks whose neurons can be taken apart, and the names under which their weights are handed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import users
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._feed_forward import FeedForward, Part, find_feed_forward
from onnxcomp.qdq import dequantized_weight
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select
from onnxcomp.target import Array

Storage = Literal["float", "int8"]

MARK = "onnxcomp.core_neurons"
"""Metadata of the last product of a block whose neurons are chosen in the graph."""

_SIZED = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile"})  # may hold the number of neurons


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A feed-forward block of which some neurons are kept.

    Attributes:
        number: Which of the model's feed-forward blocks it is, from 0.
        block: The block.
        inner: Nodes between its first products and its last one.
        kept: Number of neurons that are kept.
        dtype: Element type of its activations.
    """

    number: int
    block: FeedForward
    inner: tuple[ir.Node, ...]
    kept: int
    dtype: ir.DataType

    @property
    def node(self) -> ir.Node:
        """The product that is reported, which is the last one."""
        return self.block.down.node

    @property
    def first(self) -> Mapping[str, Part]:
        """The first products by role: `gate` if there is one, and `up`."""
        return _first(self.block)

    def name(self, what: str) -> str:
        """Name of a graph input or output."""
        return f"core_{what}.{self.number}"

    def bias(self, part: Part) -> Array | None:
        """Bias of each of the part's neurons, `(neurons,)`; None without one."""
        return _bias(part)


def find_layers(
    model: ir.Model, where: Select, *, keep: float, skip: int, weights: Storage
) -> tuple[list[Layer], list[Edit]]:
    """Blocks that are selected and can be taken apart, in order, and refusals of all other selected products.

    What is found does not depend on what is then done with it, so that graphs for different stages fit together.

    Args:
        model: The model.
        where: Selects blocks by their last product.
        keep: Share of the neurons of a block to keep.
        skip: Number of blocks at the start that stay as they are.
        weights: How weights are to be stored.
    """
    found = find_feed_forward(model)
    edits = [refused(node, reason) for node, reason in found.reasons.items() if where(node)]
    layers: list[Layer] = []
    for number, block in enumerate(found.blocks):
        node = block.down.node
        if not where(node):
            continue
        inner, dtype = _inner(block), _dtype(block.down)
        reason = f"one of the first {skip} feed-forward blocks, which stay dense" if number < skip else ""
        reason = reason or _objection(block, inner)
        if not reason and weights == "int8" and dtype != ir.DataType.FLOAT:
            reason = "its activations are float16; DynamicQuantizeLinear takes float32"
        if reason:
            edits.append(refused(node, reason))
        else:
            kept = max(1, round(keep * block.hidden))
            layers.append(Layer(number=number, block=block, inner=inner, kept=kept, dtype=dtype))
    return layers, edits


def _first(block: FeedForward) -> dict[str, Part]:
    return {"up": block.up} if block.gate is None else {"gate": block.gate, "up": block.up}


def _inner(block: FeedForward) -> tuple[ir.Node, ...]:
    """Nodes on the way back from the last product to the first ones."""
    ends = {part.value for part in _first(block).values()}
    nodes: dict[ir.Node, None] = {}
    pending: list[ir.Value | None] = [block.down.source]
    while pending:
        value = pending.pop()
        if value is None or value in ends or ir.convenience.get_const_tensor(value) is not None:
            continue
        node = value.producer()
        if node is not None and node not in nodes:
            nodes[node] = None
            pending += node.inputs
    return tuple(nodes)


def _objection(block: FeedForward, inner: tuple[ir.Node, ...]) -> str:
    """Why neurons cannot be taken out of a block; empty if they can."""
    node, parts = block.down.node, _first(block).values()
    if MARK in node.metadata_props:
        return "its neurons are chosen in this graph already; the other stages start from the dense model"
    for part in parts:
        if part.dense.bias is not None and _bias(part) is None:
            return f"the bias of {part.dense.node.name} is no constant vector"
    values = [p.value for p in parts] + [v for n in inner for v in n.outputs]
    for value in values:
        outside = [reader for reader in users(value) if reader is not node and reader not in inner]
        if value.is_graph_output() or outside:
            return f"{value.name} is read outside the block as well"
    for op in inner:
        if op.op_type in _SIZED:
            return f"{op.op_type} {op.name} inside may hold the number of neurons"
        if any(_is_vector(value) for value in op.inputs):
            return f"{op.op_type} {op.name} has a constant for each neuron"
    return ""


def _bias(part: Part) -> Array | None:
    array = dequantized_weight(part.dense.bias)
    if array is None or array.size not in (1, part.dense.outputs):
        return None
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (part.dense.outputs,))[part.start : part.stop])


def _is_vector(value: ir.Value | None) -> bool:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.size > 1


def _dtype(dense: Dense) -> ir.DataType:
    """Element type of a product: that of its float weight, or of the scales of a quantized one."""
    if dense.dtype is not None:
        return dense.dtype
    node: ir.Node | None = dense.node
    while node is not None and node.op_type not in ("DequantizeLinear", "MatMulNBits"):
        index = 0 if node.op_type == "Transpose" else 1
        value = node.inputs[index]
        node = None if value is None else value.producer()
    scale = None if node is None else node.inputs[1 if node.op_type == "DequantizeLinear" else 2]
    tensor = None if scale is None else ir.convenience.get_const_tensor(scale)
    return ir.DataType.FLOAT if tensor is None else tensor.dtype
