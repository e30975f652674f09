"""Recognises feed-forward blocks: two layers with an activation between, or a gate, in graphs of any exporter.

`y = act(x W_up) W_down`, or `y = (act(x W_gate) * x W_up) W_down` with gate and up as two products or as one that is
split. Names play no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcomp.edit import attribute, constant, users
from onnxcomp.passes._activations import Elementwise, behind_layout, follow
from onnxcomp.passes._dense import Dense, find_dense


@dataclass(frozen=True, kw_only=True)
class Part:
    """Output channels `start` to `stop` of a product, which are all of them unless it is gate and up in one.

    Attributes:
        value: The value that holds them.
        dense: The product.
        start: First channel.
        stop: Behind the last channel.
    """

    value: ir.Value
    dense: Dense
    start: int
    stop: int

    @property
    def merged(self) -> bool:
        """Whether the product has other output channels as well."""
        return self.stop - self.start != self.dense.outputs


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """A feed-forward block.

    Attributes:
        up: The layer that is not activated if there is a gate, else the first layer.
        gate: The layer that is activated; None without a gate.
        down: The last layer.
        activation: `silu`, `gelu`, `gelu_tanh`, `quick_gelu`, `relu`, `relu_squared`, `thresholded_relu`, `sigmoid`,
            `tanh`, or `other`.
        activated: Output of the activation; without a gate, what `down` reads, up to its layout.
        ops: The ops of the activation, the last one first.
        linear: What the gate multiplies; None without a gate.
        product: The node that multiplies; None without a gate.
    """

    up: Part
    gate: Part | None
    down: Dense
    activation: str
    activated: ir.Value
    ops: tuple[ir.Node, ...]
    linear: ir.Value | None
    product: ir.Node | None

    @property
    def hidden(self) -> int:
        """Number of neurons."""
        return self.down.inputs

    @property
    def products(self) -> tuple[ir.Node, ...]:
        """The nodes of its layers."""
        parts = (self.up.dense, *(() if self.gate is None else (self.gate.dense,)), self.down)
        return tuple(dict.fromkeys(d.node for d in parts))


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What was found in a model.

    Attributes:
        blocks: Feed-forward blocks, in order.
        dense: All products with a constant matrix.
        reasons: Why a product is the last layer of no block; for those that belong to none.
    """

    blocks: tuple[FeedForward, ...]
    dense: tuple[Dense, ...]
    reasons: Mapping[ir.Node, str]


def find_feed_forward(model: ir.Model) -> Blocks:
    """Finds the feed-forward blocks of the main graph."""
    dense, reasons = find_dense(model)
    parts = _parts(dense)
    blocks: list[FeedForward] = []
    for layer in dense:
        found = _block(layer, parts)
        if isinstance(found, str):
            reasons[layer.node] = found
        else:
            blocks.append(found)
    inside = {node for block in blocks for node in block.products}
    return Blocks(
        blocks=tuple(blocks), dense=tuple(dense), reasons={n: r for n, r in reasons.items() if n not in inside}
    )


def _block(down: Dense, parts: Mapping[ir.Value, Part]) -> FeedForward | str:
    chain = follow(down.source, parts)
    if isinstance(chain, str):
        return f"no feed-forward block ends in it: {chain}"
    for root in chain.roots:
        if parts[root].stop - parts[root].start != down.inputs:
            return f"no feed-forward block ends in it: {parts[root].dense.node.name} has another number of channels"
    if len(chain.roots) == 1:
        name = chain.name()
        if name == "identity":
            return "no feed-forward block ends in it: there is no activation before it"
        (root,) = chain.roots
        return FeedForward(
            up=parts[root], gate=None, down=down, activation=name, activated=behind_layout(down.source),
            ops=chain.nodes, linear=None, product=None,
        )  # fmt: skip
    return _gated(down, chain, parts)


def _gated(down: Dense, chain: Elementwise, parts: Mapping[ir.Value, Part]) -> FeedForward | str:
    refusal = "no feed-forward block ends in it: its input is no product of an activated and a linear layer"
    product = behind_layout(down.source).producer()
    if len(chain.roots) != 2 or product is None or product.op_type != "Mul":
        return refusal
    sides: dict[str, tuple[ir.Value, Elementwise]] = {}
    for value in product.inputs:
        side = follow(value, parts) if value is not None else refusal
        if value is None or isinstance(side, str) or len(side.roots) != 1:
            return refusal
        kind = side.name()
        sides["linear" if kind == "identity" else kind] = (value, side)
    linear = sides.pop("linear", None)
    if linear is None or len(sides) != 1:
        return refusal
    ((activation, (activated, ops)),) = sides.items()
    return FeedForward(
        up=parts[linear[1].roots[0]], gate=parts[ops.roots[0]], down=down, activation=activation, activated=activated,
        ops=ops.nodes, linear=linear[0], product=product,
    )  # fmt: skip


def _parts(dense: list[Dense]) -> dict[ir.Value, Part]:
    """Every output of a product, and every range of channels that a Split or Slice takes of one."""
    found: dict[ir.Value, Part] = {}
    for layer in dense:
        found[layer.output] = Part(value=layer.output, dense=layer, start=0, stop=layer.outputs)
        for node in users(layer.output):
            if node.op_type == "Split" and node.domain in ("", "ai.onnx") and _last_axis(node, layer.output, 0):
                found |= _split(node, layer)
            elif node.op_type == "Slice" and node.domain in ("", "ai.onnx"):
                found |= _slice(node, layer)
    return found


def _split(node: ir.Node, layer: Dense) -> dict[ir.Value, Part]:
    sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    given = attribute(node, "split") if sizes is None else sizes.tolist()
    if given is None:
        each = -(-layer.outputs // len(node.outputs))
        given = [each] * (len(node.outputs) - 1)
        given.append(layer.outputs - sum(given))
    starts = [sum(given[:i]) for i in range(len(given))]
    return {
        value: Part(value=value, dense=layer, start=start, stop=start + size)
        for value, start, size in zip(node.outputs, starts, given, strict=True)
    }


def _slice(node: ir.Node, layer: Dense) -> dict[ir.Value, Part]:
    arrays = [None if v is None else constant(v) for v in node.inputs[1:]]
    if len(arrays) < 3 or any(a is None or a.size != 1 for a in arrays):
        return {}
    start, stop, axis, *step = [int(a.reshape(())) for a in arrays if a is not None]
    if step not in ([], [1]) or not _is_last(axis, layer.output):
        return {}
    start, stop, _ = slice(start, stop).indices(layer.outputs)
    value = node.outputs[0]
    return {value: Part(value=value, dense=layer, start=start, stop=stop)} if start < stop else {}


def _last_axis(node: ir.Node, value: ir.Value, default: int) -> bool:
    return _is_last(int(attribute(node, "axis", default)), value)


def _is_last(axis: int, value: ir.Value) -> bool:
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)
