"""Writes thresholds into the graph: portable ops where the weight is float, masks before products that are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, become, redirect, users
from onnxcomp.ops import DOMAIN, OPS, SPARSITY
from onnxcomp.passes._activations import LAYOUT
from onnxcomp.passes._dense import Dense
from onnxcomp.passes._feed_forward import FeedForward, Part
from onnxcomp.passes._site_weights import Storage, Weights
from onnxcomp.passes._sites import MARK, Site
from onnxcomp.target import Array

# Some tools that write functions out do not know of default values of attributes.
_WRITTEN = {"one_sided": 0}


class Rewriter:
    """Edits one model; what several sites need (a mask, a turned weight) is made once.

    Args:
        model: The model.
        method: Noted at every product that is treated.
        storage: How weights of thresholded products are stored.
    """

    def __init__(self, model: ir.Model, method: str, storage: Storage = "keep") -> None:
        self._model, self._method = model, method
        self._editor = Editor(model)
        self._weights = Weights(self._editor, storage)
        self._masks: dict[tuple[ir.Value, bytes], ir.Value] = {}

    def drop(self, site: Site, threshold: Array, sparsity: float | None = None) -> str:
        """Drops values of at most `threshold`, a scalar or one value a channel; returns what was written.

        Args:
            site: Where.
            threshold: The threshold.
            sparsity: Share of values that it drops, to be noted at the product: a target decides by it.
        """
        written = self._drop(site, threshold)
        if sparsity is not None:
            site.dense.node.metadata_props[SPARSITY] = f"{sparsity:.4f}"
        return written

    def _drop(self, site: Site, threshold: Array) -> str:
        block = site.block
        if block is None or site.observed is site.dense.source:
            return self._input(site.dense, threshold)
        if block.gate is None:
            return self._input(site.dense, threshold)
        if not _unfit(block) and (written := self._gated(block, threshold)):
            return written
        assert block.product is not None
        masked = self._mask(block.activated, threshold)
        redirect(block.activated, masked, [block.product])
        return f"{self._written(masked)} and {self._input(site.dense, np.zeros((), np.float32))}"

    def keep_largest(self, site: Site, count: int) -> str:
        """Keeps the `count` largest magnitudes of each row of a product's input."""
        dense = site.dense
        stored = self._weights.of(dense)
        dense.node.metadata_props[SPARSITY] = f"{max(0.0, 1 - count / dense.inputs):.4f}"
        if stored is not None:
            return self._become(dense, f"TopKMatMul{stored.suffix}", [dense.source, *stored.values], {"k": count})
        masked = self._largest(dense.source, count)
        redirect(dense.source, masked, [dense.node])
        dense.node.metadata_props[MARK] = self._method
        return "a TopK mask before the product, whose weight no kernel takes in its format"

    def _input(self, dense: Dense, threshold: Array) -> str:
        source = dense.node.inputs[0]
        assert source is not None
        stored = self._weights.of(dense)
        if stored is not None:
            limit = self._limit(dense, source, threshold)
            return self._become(dense, f"ThresholdMatMul{stored.suffix}", [source, *stored.values, limit], _WRITTEN)
        dense.node.metadata_props[MARK] = self._method
        if not threshold.any():
            return "the product, whose weight no kernel takes in its format"
        masked = self._mask(source, threshold)
        redirect(source, masked, [dense.node])
        return f"{self._written(masked)} before the product, whose weight no kernel takes in its format"

    def _gated(self, block: FeedForward, threshold: Array) -> str:
        """Writes a GatedMLP; returns its name, or nothing if no such op takes the weights."""
        down, gate = block.down, block.gate
        assert gate is not None
        weights = self._weights.part(block.up, by_output=True), self._weights.of(down)
        if weights[0] is None or weights[1] is None or weights[0].suffix != weights[1].suffix:
            return ""
        if gate.merged:
            self._own_product(gate)
        limit = self._limit(down, block.activated, threshold)
        inputs = [block.activated, block.up.dense.source, *weights[0].values, *weights[1].values, limit]
        return self._become(down, f"GatedMLP{weights[0].suffix}", inputs, _WRITTEN)

    def _become(
        self, dense: Dense, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, int] | None = None
    ) -> str:
        """Makes a product a portable op in place; a bias of its own becomes an Add. Returns the op's name."""
        node = dense.node
        bias = dense.bias if dense.bias in node.inputs else None
        OPS[op_type].install(self._model)
        become(node, op_type, inputs, attributes, DOMAIN)
        node.metadata_props[MARK] = self._method
        if bias is not None:
            self._editor.add_behind(node.outputs[0], bias)
        return op_type

    def _own_product(self, part: Part) -> None:
        """Computes some channels of a product by a product of their own."""
        node = part.dense.node
        name = f"{node.name}_{part.start}_{part.stop}"
        output = self._editor.before(
            node, "MatMul", [part.dense.source, self._weights.columns(part)], name=name, like=part.value
        )
        bias = part.dense.bias
        if bias is not None:
            tensor = ir.convenience.get_const_tensor(bias)
            assert tensor is not None
            values = self._editor.weight(f"{name}_bias", tensor.numpy()[part.start : part.stop])
            output = self._editor.before(node, "Add", [output, values], name=f"{name}_biased", like=part.value)
        redirect(part.value, output, users(part.value))

    def _mask(self, value: ir.Value, threshold: Array) -> ir.Value:
        """`value` without what is at most `threshold`."""
        key = (value, np.asarray(threshold).tobytes())
        if key in self._masks:
            return self._masks[key]
        name = f"{value.name}_kept"
        if threshold.ndim == 0:
            attributes = {"lambd": float(threshold), "bias": 0.0}
            masked = self._editor.after(value, "Shrink", [value], name=name, attributes=attributes, like=value)
        else:
            limit = self._editor.weight(f"{value.name}_threshold", _cast(threshold, value.dtype))
            zero = self._editor.weight(f"{value.name}_zero", _cast(np.zeros((), np.float32), value.dtype))
            size = self._editor.after(value, "Abs", [value], name=f"{value.name}_magnitude", like=value)
            boolean = ir.DataType.BOOL
            small = self._editor.after(
                size, "LessOrEqual", [size, limit], name=f"{value.name}_small", like=value, dtype=boolean
            )
            masked = self._editor.after(small, "Where", [small, zero, value], name=name, like=value)
        self._masks[key] = masked
        return masked

    def _largest(self, value: ir.Value, count: int) -> ir.Value:
        name, after = value.name, self._editor.after
        zero = self._editor.weight(f"{name}_zero", _cast(np.zeros((), np.float32), value.dtype))
        amount = self._editor.weight(f"{name}_count", np.array([count], np.int64))
        last = [
            self._editor.weight(f"{name}_{k}", np.array([v])) for k, v in (("last", -1), ("end", 2**31), ("axis", -1))
        ]
        size = after(value, "Abs", [value], name=f"{name}_magnitude", like=value)
        node = ir.node("TopK", [size, amount], {"axis": -1}, num_outputs=2, name=f"{name}_largest")
        for output, part in zip(node.outputs, ("values", "indices"), strict=True):
            output.name = f"{name}_largest_{part}"
        producer = size.producer()
        assert producer is not None
        self._editor.graph.insert_after(producer, node)
        least = after(node.outputs[0], "Slice", [node.outputs[0], *last], name=f"{name}_least")
        kept = after(least, "GreaterOrEqual", [size, least], name=f"{name}_is_kept", like=value, dtype=ir.DataType.BOOL)
        return after(kept, "Where", [kept, value, zero], name=f"{name}_kept", like=value)

    def _written(self, masked: ir.Value) -> str:
        node = masked.producer()
        return "Shrink" if node is not None and node.op_type == "Shrink" else "Abs, LessOrEqual, Where"

    def _limit(self, dense: Dense, compared: ir.Value, threshold: Array) -> ir.Value:
        return self._editor.weight(f"{dense.node.name}_threshold", _cast(threshold, compared.dtype or dense.dtype))


def _unfit(block: FeedForward) -> str:
    """Why a block cannot be one GatedMLP; empty if it can."""
    if block.gate is not None and block.gate.merged and block.gate.dense.quantized:
        return "gate and up are one quantized product"
    if block.up.dense.bias is not None:
        return "the layer that is multiplied has a bias"
    assert block.product is not None
    moved = any(node.op_type in LAYOUT for node in block.ops)
    if moved or block.linear is not block.up.value or block.down.source is not block.product.outputs[0]:
        return "a layout changes between its layers"
    return ""


def _cast(array: Array, dtype: ir.DataType | None) -> Array:
    if dtype != ir.DataType.FLOAT16:
        return np.asarray(array, np.float32)
    return np.minimum(array, np.finfo(np.float16).max).astype(np.float16)
