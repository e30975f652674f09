"""Linear ops that `quantize` has treated in the same run, with what is needed to choose other integers for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, in_main_graph, users
from onnxcomp.model import all_nodes
from onnxcomp.passes._bias import find_bias
from onnxcomp.passes._gram import Window, window
from onnxcomp.qdq import float_weight, read_activation, read_weight
from onnxcomp.quant import Grid
from onnxcomp.rewrite import Edit, refused
from onnxcomp.select import Select
from onnxcomp.target import Array

_CHOSEN = "onnxcomp.integers"  # metadata of a linear op whose integers were chosen, with the name of the pass


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear:
    """A linear op with a quantized weight whose float original is known.

    Attributes:
        node: The op.
        weight: Output of the weight's DequantizeLinear.
        observed: Value that is observed for its input.
        grid: Quantizer between the two, if any.
        cut: Window of a Conv.
        columns: K, inputs that an output reads.
        has_bias: The mean error can be taken off a bias without a new op.
    """

    node: ir.Node
    weight: ir.Value
    observed: str
    grid: Grid | None
    cut: Window | None
    columns: int
    has_bias: bool

    @property
    def key(self) -> tuple[ir.Value | None, Window | None]:
        """Layers of the same key see the same rows."""
        return self.node.inputs[0], self.cut

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return 1 if self.cut is None else self.cut.groups

    def mark(self, name: str) -> None:
        """Notes that the pass `name` chose the integers."""
        mark_chosen(self.node, name)

    def stored(self) -> tuple[Array, Array, Array]:
        """Float weight, integers and scales: float64 (groups, outputs of a group, K), the scales with K = 1."""
        array, found = float_weight(self.weight), read_weight(self.weight)
        assert array is not None
        assert found is not None
        integers = self._rows(found[0])
        scale = np.broadcast_to(found[1].astype(np.float64), integers.shape[0] * integers.shape[1])
        return self._rows(array), integers, scale.reshape(*integers.shape[:2], 1)

    def array(self, integers: Array) -> Array:
        """Integers (groups, outputs of a group, K) in the shape and type in which they are stored."""
        found = read_weight(self.weight)
        assert found is not None
        like = found[0]
        turned = integers.reshape(like.shape if _output_axis(self.node) == 0 else like.shape[::-1])
        return np.ascontiguousarray(turned if _output_axis(self.node) == 0 else turned.T, like.dtype)

    def _rows(self, array: Array) -> Array:
        turned = array if _output_axis(self.node) == 0 else array.T
        return np.asarray(turned.reshape(self.groups, len(turned) // self.groups, -1), np.float64)


def mark_chosen(node: ir.Node, name: str) -> None:
    """Notes at a linear op that the pass `name` chose the integers of its weight, so that no other does."""
    node.metadata_props[_CHOSEN] = name


def find_quantized(model: ir.Model, where: Select, name: str) -> tuple[list[QuantizedLinear], list[Edit]]:
    """Linear ops whose integers the pass `name` may choose, in graph order, and refusals of the others."""
    layers: list[QuantizedLinear] = []
    edits: list[Edit] = []
    for node in all_nodes(model):
        if node.op_type not in ("Conv", "MatMul", "Gemm") or node.domain not in ("", "ai.onnx") or not where(node):
            continue
        found = _find(model, node, name)
        if isinstance(found, str):
            edits.append(refused(node, found))
        else:
            layers.append(found)
    return layers, edits


def _find(model: ir.Model, node: ir.Node, name: str) -> QuantizedLinear | str:
    if not in_main_graph(model, node):
        return "it stands in a subgraph or function, whose values calibration cannot observe"
    if _CHOSEN in node.metadata_props:
        return f"{node.metadata_props[_CHOSEN]} chose its integers already"
    source, weight, stored = node.inputs[0], node.inputs[1], read_weight(node.inputs[1])
    if source is None or weight is None or stored is None:
        return f"its second input is no quantized weight; {name} goes after quantize"
    array, (integers, scale, axis) = float_weight(weight), stored
    if array is None:
        return f"its float weight is not known any more: quantize and {name} go into one recipe"
    if array.shape != integers.shape or (scale.ndim and axis != _output_axis(node)):
        return "its weight was rearranged after it was quantized"
    if len(users(weight)) > 1:
        return "its weight is shared with another op"
    activation = read_activation(source)
    grid = None
    if activation is not None and activation.grid.axis is None:
        source, grid = activation.value, activation.grid
    return QuantizedLinear(
        node=node,
        weight=weight,
        observed=source.name or "",
        grid=grid,
        cut=window(node, array.shape[2:]),
        columns=array.size // array.shape[_output_axis(node)],
        has_bias=find_bias(node) is not None or (node.op_type != "MatMul" and grid is not None),
    )


def _output_axis(node: ir.Node) -> int:
    """Axis of the outputs in the weight."""
    return 0 if node.op_type == "Conv" or attribute(node, "transB", 0) else 1
