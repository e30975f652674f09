"""Nodes that choose core neurons inside a graph, from what the last product of a feed-forward block reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor
from onnxcomp.passes._core_layers import Layer
from onnxcomp.target import Array

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_ROUNDING = 1e-3  # a number of neurons this close below a whole one is that one: shares are computed in float32


class Chooser:
    """Adds the nodes; constants are shared by all layers.

    Args:
        model: The model.
        token_share: Share of a token's values above zero that are its core.
        magnitude: Takes magnitudes for the values.
    """

    def __init__(self, model: ir.Model, token_share: float, *, magnitude: bool) -> None:
        self._editor = Editor(model)
        self._graph = model.graph
        self._token_share, self._magnitude = token_share, magnitude
        self._constants: dict[bytes, ir.Value] = {}

    def counts(self, layer: Layer) -> ir.Value:
        """For how many tokens each neuron is core: float32 `(neurons,)`, an output of the graph.

        Core of a token are its largest values, or magnitudes, above zero: as many for all tokens as `token_share` of
        the mean number of those.
        """
        size, n = layer.block.hidden, layer.number
        table, number = (None, size), (1, 1)

        def op(
            op_type: str,
            what: str,
            shape: Sequence[int | None] | None,
            *inputs: ir.Value,
            at: int = 0,
            **attributes: Any,
        ) -> ir.Value:
            dtype = ir.DataType(attributes.get("to", _FLOAT))
            return self._after(inputs[at], op_type, inputs, f"core_{what}.{n}", dtype, shape, attributes)

        def compare(op_type: str, what: str, *inputs: ir.Value, at: int = 0) -> ir.Value:
            return self._after(inputs[at], op_type, inputs, f"core_{what}.{n}", _BOOL, table)

        rows = layer.block.down.source
        if rows.dtype != _FLOAT:
            rows = op("Cast", "float", None, rows, to=_FLOAT.value)
        rows = op("Reshape", "rows", table, rows, self._ints(-1, size))
        if self._magnitude:
            rows = op("Abs", "magnitude", table, rows)
        positive = compare("Greater", "positive", rows, self._floats(0.0))
        ones = op("Cast", "ones", table, positive, to=_FLOAT.value)
        share = op("ReduceMean", "share", number, ones, keepdims=1)
        wish = op("Mul", "wish", number, share, self._floats(self._token_share * size))
        wish = op(
            "Max", "least", number, op("Add", "shifted", number, wish, self._floats(_ROUNDING)), self._floats(1.0)
        )
        count = op("Reshape", "number", (1,), op("Cast", "whole", number, wish, to=_INT64.value), self._ints(1))
        count.dtype = _INT64
        values, _ = self._largest(rows, count, f"core_top.{n}", _FLOAT, (None, None), {"axis": -1, "sorted": 1})
        limit = op("Gather", "limit", (None, 1), values, self._ints(-1), axis=-1)
        core = compare("And", "token", compare("GreaterOrEqual", "large", rows, limit, at=1), positive)
        marks = op("Cast", "marks", table, core, to=_FLOAT.value)
        return self._put_out(op("ReduceSum", "count", (size,), marks, self._ints(0), keepdims=0))

    def most_frequent(self, layer: Layer, counts: ir.Value, *, put_out: bool) -> ir.Value:
        """The neurons of the largest counts, ascending: int64 `(kept,)`; of equal ones those of lower number.

        Args:
            layer: The layer.
            counts: Of its neurons.
            put_out: Makes it the output `core_index`.
        """
        kept, n = self._ints(layer.kept), layer.number
        attributes = {"axis": 0, "sorted": 1}
        _, found = self._largest(counts, kept, f"core_frequent.{n}", _FLOAT, (layer.kept,), attributes)
        name = layer.name("index") if put_out else f"core_own.{n}"
        index, _ = self._largest(found, kept, name, _INT64, (layer.kept,), attributes | {"largest": 0})
        return self._put_out(index) if put_out else index

    def nearest(self, layer: Layer, index: ir.Value, counts: ir.Value, centres: Array) -> ir.Value:
        """Number of the centre that is nearest to a set of neurons: int64 scalar, output `core_cluster`.

        Args:
            layer: The layer whose neurons they are.
            index: The neurons; those that are core of no token, which only fill it up, do not count.
            counts: Of all neurons.
            centres: float32 `(clusters, neurons)`.
        """
        size, kept = layer.block.hidden, (layer.kept,)
        often = self._after(index, "Gather", [counts, index], "core_often", _FLOAT, kept, {"axis": 0})
        ones = self._after(often, "Min", [often, self._floats(1.0)], "core_set_ones", _FLOAT, kept)
        zeros = self._array(np.zeros(size, np.float32))
        marks = self._after(ones, "ScatterElements", [zeros, index, ones], "core_set", _FLOAT, (size,), {"axis": 0})
        count = (len(centres),)
        products = self._after(marks, "MatMul", [self._array(centres), marks], "core_products", _FLOAT, count)
        # Least distance |s - c|^2 = |s|^2 - 2 (s c - |c|^2 / 2)
        half = self._array(np.asarray(np.square(centres).sum(axis=1) / 2, np.float32))
        scores = self._after(products, "Sub", [products, half], "core_scores", _FLOAT, count)
        attributes = {"axis": 0, "keepdims": 0}
        return self._put_out(self._after(scores, "ArgMax", [scores], "core_cluster", _INT64, (), attributes))

    def of_cluster(self, layer: Layer, cluster: ir.Value, tables: Array) -> ir.Value:
        """The row of `tables`, int64 `(clusters, kept)`, that belongs to a cluster, as output `core_index`."""
        inputs = [self._array(tables), cluster]
        name = layer.name("index")
        return self._put_out(self._after(cluster, "Gather", inputs, name, _INT64, (layer.kept,), {"axis": 0}))

    def _largest(
        self,
        value: ir.Value,
        count: ir.Value,
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int | None],
        attributes: Mapping[str, Any],
    ) -> Sequence[ir.Value]:
        """Values and indices of a TopK."""
        last = value if count.producer() is None else count
        values = self._after(last, "TopK", [value, count], name, dtype, shape, attributes)
        node = values.producer()
        assert node is not None
        node.resize_outputs(2)
        indices = node.outputs[1]
        indices.name, indices.dtype, indices.shape = f"{values.name}_at", _INT64, ir.Shape(shape)
        return node.outputs

    def _after(
        self,
        value: ir.Value,
        op_type: str,
        inputs: Sequence[ir.Value],
        name: str,
        dtype: ir.DataType,
        shape: Sequence[int | None] | None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        output = self._editor.after(value, op_type, inputs, name=name, attributes=attributes)
        output.dtype = dtype
        output.shape = None if shape is None else ir.Shape(shape)
        return output

    def _put_out(self, value: ir.Value) -> ir.Value:
        self._graph.outputs.append(value)
        return value

    def _ints(self, *values: int) -> ir.Value:
        return self._array(np.array(values, np.int64))

    def _floats(self, value: float) -> ir.Value:
        return self._array(np.array(value, np.float32))

    def _array(self, array: Array) -> ir.Value:
        key = str((array.dtype, array.shape)).encode() + array.tobytes()
        if key not in self._constants:
            self._constants[key] = self._editor.weight(f"core_constant_{len(self._constants)}", array)
        return self._constants[key]
