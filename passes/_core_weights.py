"""Weights of core neurons: the graph that takes them out of the whole, and the graph that computes with them.

All inputs of the second are outputs of the first of the same name: `core_up.N` (K, kept), `core_down.N` (kept, N), with
a gate `core_gate.N`, and where a first product has a bias `core_up_bias.N` (kept,). In int8, each output channel has a
scale, `core_up_scale.N`, and the sum of its integers, `core_up_sum.N`, by which the zero point of the activation is
taken off behind the product: onnxruntime runs a MatMulInteger without zero points straight on the weight as it is
bound, and packs it anew in every run with one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, redirect, users
from onnxcomp.errors import PassError
from onnxcomp.passes._core_layers import Layer, Storage
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.passes._dynamic import Editors
from onnxcomp.passes._feed_forward import Part
from onnxcomp.quant import weight_grid
from onnxcomp.target import Array

_FLOAT, _INT8, _INT32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64


class Gatherer:
    """Makes of a model the graph from `core_index` to the weights of these neurons, which are stored neuron by neuron.

    Args:
        model: The model; its own inputs, outputs and nodes go with `finish`.
        weights: How weights are stored.
        bits: Of an integer.
        spool: Takes weights that shall not stay in memory; None to keep them.
    """

    def __init__(self, model: ir.Model, weights: Storage, bits: int, spool: Spool | None) -> None:
        self._model, self._graph = model, model.graph
        self._editor = Editor(model)
        self._weights, self._bits, self._spool = weights, bits, spool
        self._stored: dict[Any, tuple[ir.Value, ...]] = {}
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []

    def add(self, layer: Layer) -> None:
        """Adds the weights of one layer."""
        index = ir.Value(name=layer.name("index"), shape=ir.Shape((layer.kept,)), type=ir.TensorType(_INT64))
        self._inputs.append(index)
        for role, part in layer.first.items():
            rows, *vectors = self._first(part, layer.dtype)
            taken = self._take(rows, index, f"{role}_rows", layer)
            turned = self._editor.after(
                taken, "Transpose", [taken], name=layer.name(role), attributes={"perm": [1, 0]}
            )  # fmt: skip
            self._put_out(turned, rows.dtype, (part.dense.inputs, layer.kept))
            for vector, what in zip(vectors, ("scale", "sum"), strict=False):
                self._put_out(self._take(vector, index, f"{role}_{what}", layer), vector.dtype, (layer.kept,))
            bias = layer.bias(part)
            if bias is not None:
                stored = self._editor.weight(f"{part.dense.node.name}_bias", bias.astype(layer.dtype.numpy()))
                self._put_out(self._take(stored, index, f"{role}_bias", layer), stored.dtype, (layer.kept,))
        self._down(layer, index)

    def finish(self) -> None:
        """Gives the graph its new inputs and outputs; the nodes of the model are then read by nothing."""
        for values, new in ((self._graph.outputs, self._outputs), (self._graph.inputs, self._inputs)):
            values.clear()
            values.extend(new)
        self._model.metadata_props.clear()  # may tell of a streaming state

    def _down(self, layer: Layer, index: ir.Value) -> None:
        dense = layer.block.down
        rows = self._once((dense.node.inputs[1], "down", layer.dtype), lambda: self._make_down(layer))[0]
        taken = self._take(rows, index, "down", layer)
        self._put_out(taken, rows.dtype, (layer.kept, dense.outputs))
        if self._weights == "int8":
            ones = self._editor.weight(f"core_ones_{layer.kept}", np.ones((1, layer.kept), np.uint8))
            total = self._editor.after(taken, "MatMulInteger", [ones, taken], name=layer.name("down_sum"))
            self._put_out(total, _INT32, (1, dense.outputs))

    def _make_down(self, layer: Layer) -> tuple[ir.Value, ...]:
        dense = layer.block.down
        matrix = dense.matrix()
        if self._weights == "int8":
            return (self._weight(f"{dense.node.name}_q8", _integers(matrix, self._bits, dense.node)[0]),)
        return (self._weight(f"{dense.node.name}_rows", np.ascontiguousarray(matrix, layer.dtype.numpy())),)

    def _first(self, part: Part, dtype: ir.DataType) -> tuple[ir.Value, ...]:
        return self._once(
            (part.dense.node.inputs[1], part.start, part.stop, dtype), lambda: self._make_first(part, dtype)
        )

    def _make_first(self, part: Part, dtype: ir.DataType) -> tuple[ir.Value, ...]:
        """One row a neuron; in int8 scale and sum of each as well."""
        node, name = part.dense.node, f"{part.dense.node.name}_{part.start}"
        matrix = part.dense.matrix()[:, part.start : part.stop]
        if self._weights == "float":
            return (self._weight(f"{name}_rows", np.ascontiguousarray(matrix.T, dtype.numpy())),)
        integers, scale = _integers(matrix, self._bits, node)
        return (
            self._weight(f"{name}_q8", np.ascontiguousarray(integers.T)),
            self._weight(f"{name}_scale", scale),
            self._weight(f"{name}_sum", integers.sum(axis=0, dtype=np.int32)),
        )

    def _once(self, key: Any, make: Any) -> tuple[ir.Value, ...]:
        """What `make` returns; weights that layers share are made once."""
        if key not in self._stored:
            self._stored[key] = make()
        return self._stored[key]

    def _weight(self, name: str, array: Array) -> ir.Value:
        value = self._editor.weight(name, array)
        if self._spool is not None:
            self._spool.take(value)
        return value

    def _take(self, rows: ir.Value, index: ir.Value, what: str, layer: Layer) -> ir.Value:
        return self._editor.after(rows, "Gather", [rows, index], name=layer.name(what), attributes={"axis": 0})

    def _put_out(self, value: ir.Value, dtype: ir.DataType | None, shape: Sequence[int]) -> None:
        assert dtype is not None
        value.dtype, value.shape = dtype, ir.Shape(shape)
        self._outputs.append(value)


class Reducer:
    """Makes blocks compute with weights that are inputs of the graph.

    Args:
        model: The model.
        weights: How the weights are stored.
        bits: Of an integer.
    """

    def __init__(self, model: ir.Model, weights: Storage, bits: int) -> None:
        self._graph = model.graph
        self._weights, self._bits = weights, bits
        self._editors = Editors(model)
        self._editor = self._editors.of(self._graph)
        self._points: dict[ir.Value, ir.Value] = {}

    def reduce(self, layer: Layer) -> None:
        """Rewrites one block."""
        for role, part in layer.first.items():
            anchor = part.dense.node
            value = self._product(anchor, part.dense.source, role, layer, (part.dense.inputs, layer.kept))
            if part.dense.bias is not None:
                bias = self._input(layer.name(f"{role}_bias"), layer.dtype, (layer.kept,))
                value = self._editor.before(
                    anchor, "Add", [value, bias], name=f"{anchor.name}_{role}_biased", like=part.value
                )
            value.dtype = layer.dtype
            value.shape = None if part.value.shape is None else ir.Shape(part.value.shape)
            _narrow(value, layer.kept)
            redirect(part.value, value, users(part.value))
        for node in layer.inner:
            for output in node.outputs:
                _narrow(output, layer.kept)
        self._down(layer)

    def _down(self, layer: Layer) -> None:
        dense, node = layer.block.down, layer.block.down.node
        value = self._product(node, dense.source, "down", layer, (layer.kept, dense.outputs))
        if dense.bias is not None and dense.output is node.outputs[0]:
            value = self._editor.before(node, "Add", [value, dense.bias], name=f"{node.name}_biased")
        # The last op takes the place of the product, whose output may be one of the graph.
        last = value.producer()
        assert last is not None
        inputs = tuple(last.inputs)
        node.op_type, node.domain = last.op_type, last.domain
        node.attributes.clear()
        self._graph.remove(last, safe=True)
        node.resize_inputs(len(inputs))
        for position, given in enumerate(inputs):
            node.replace_input_with(position, given)

    def _product(self, anchor: ir.Node, x: ir.Value, role: str, layer: Layer, shape: tuple[int, int]) -> ir.Value:
        """`x` times the weight of a role, before `anchor`."""
        name = f"{anchor.name}_{role}"
        if self._weights == "float":
            weight = self._input(layer.name(role), layer.dtype, shape)
            return self._editor.before(anchor, "MatMul", [x, weight], name=f"{name}_core")
        weight = self._input(layer.name(role), _INT8, shape)
        if role == "down":
            scale = self._editor.weight(
                f"{name}_scale", _integers(layer.block.down.matrix(), self._bits, anchor)[1]
            )  # fmt: skip
            total = self._input(layer.name("down_sum"), _INT32, (1, shape[1]))
        else:
            scale = self._input(layer.name(f"{role}_scale"), _FLOAT, (shape[1],))
            total = self._input(layer.name(f"{role}_sum"), _INT32, (shape[1],))
        integers, step, point = self._editors.quantized(x, self._graph)
        if x not in self._points:
            self._points[x] = self._editor.after(
                point, "Cast", [point], name=f"{x.name}_point", attributes={"to": _INT32.value}
            )  # fmt: skip
        before = self._editor.before
        raw = before(anchor, "MatMulInteger", [integers, weight], name=f"{name}_core")
        shift = before(anchor, "Mul", [total, self._points[x]], name=f"{name}_shift")
        exact = before(anchor, "Sub", [raw, shift], name=f"{name}_exact")
        number = before(anchor, "Cast", [exact], name=f"{name}_number", attributes={"to": _FLOAT.value})
        factor = before(anchor, "Mul", [scale, step], name=f"{name}_factor")
        return before(anchor, "Mul", [number, factor], name=f"{name}_real")

    def _input(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self._graph.inputs.append(value)
        return value


def _integers(matrix: Array, bits: int, node: ir.Node) -> tuple[Array, Array]:
    """Integers (K, N) of a weight and the scale of each column."""
    if not np.isfinite(matrix).all():
        raise PassError(f'the weight of {node.name} holds NaN or infinity, which int8 has not; use weights = "float"')
    grid = weight_grid(matrix, bits, 1, "mse")
    return grid.quantize(matrix), grid.scale


def _narrow(value: ir.Value, kept: int) -> None:
    """Gives the last axis its new length."""
    if value.shape is not None and len(value.shape):
        value.shape = ir.Shape([*value.shape[:-1], kept])
