"""N:M patterns of zeros in a model, whoever made them, and what packing such weights would save."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.model import all_nodes
from onnxcomp.ops import packed_bytes, smallest_pattern
from onnxcomp.passes._nm_layers import read_layer
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.skeleton import release
from onnxcomp.target import Array
from onnxcomp.verbs.results import PatternUse

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.UINT8)
_LEAST_ZEROS = 0.25
"""Share of zeros below which a weight is not looked at as a whole. Patterns have half, but for a group cut short."""
_BLOCK = 32
"""Rows of a sample: whole groups, whichever way the weight is stored."""
_BLOCKS = 4
_WIDTH = 4096


def find_patterns(model: ir.Model) -> tuple[PatternUse, ...]:
    """Patterns of float and 8-bit weights, largest first; a weight counts once, for the pattern that saves most."""
    found: dict[tuple[str, str], PatternUse] = {}
    for layer in _layers(model):
        use = _use(layer)
        if use is None:
            continue
        key = use.pattern, use.kind
        if (other := found.get(key)) is not None:
            use = PatternUse(
                pattern=use.pattern,
                kind=use.kind,
                weights=use.weights + other.weights,
                stored_bytes=use.stored_bytes + other.stored_bytes,
                packed_bytes=use.packed_bytes + other.packed_bytes,
                int8_bytes=use.int8_bytes + other.int8_bytes,
            )
        found[key] = use
    return tuple(sorted(found.values(), key=lambda use: -use.stored_bytes))


def _layers(model: ir.Model) -> Iterator[Layer]:
    """Every constant that a linear op multiplies by, once."""
    seen: set[ir.Value] = set()
    for node in all_nodes(model):
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.domain not in ("", "ai.onnx"):
            continue
        layer = read_layer(model, node)
        if isinstance(layer, Layer) and layer.value not in seen:
            seen.add(layer.value)
            yield layer


def _use(layer: Layer) -> PatternUse | None:
    tensor = ir.convenience.get_const_tensor(layer.value)
    zero = _zero(layer)
    if tensor is None or tensor.dtype not in _TYPES or zero is None or not tensor.size:
        return None
    bits = tensor.dtype.bitwidth
    try:
        found = _look(layer, tensor.numpy(), zero, bits)
    finally:
        if isinstance(tensor, ir.ExternalTensor):
            release(tensor)
    if found is None:
        return None
    pattern, shape = found
    return PatternUse(
        pattern=f"{pattern[0]}:{pattern[1]}",
        kind="matrix" if len(layer.shape) == 2 else "convolution",
        weights=1,
        stored_bytes=tensor.nbytes,
        packed_bytes=packed_bytes(shape, *pattern, bits),
        int8_bytes=packed_bytes(shape, *pattern, 8) + 4 * layer.outputs,
    )


def _zero(layer: Layer) -> Array | None:
    """What stands for 0, `()` or of the dimensions of the weight; None if it differs from block to block."""
    node = layer.dequantize
    zero = None if node is None or len(node.inputs) < 3 else constant(node.inputs[2])
    if node is None or zero is None:
        return np.zeros((), np.int8)
    if zero.size == 1:
        return zero.reshape(())
    if attribute(node, "block_size", 0):
        return None
    sizes = [1] * len(layer.shape)
    sizes[int(attribute(node, "axis", 1)) % len(sizes)] = -1
    return zero.reshape(sizes)


def _look(layer: Layer, array: Array, zero: Array, bits: int) -> tuple[tuple[int, int], tuple[int, ...]] | None:
    """The pattern of a weight and its shape as a matrix."""
    zero = np.broadcast_to(zero, array.shape)
    if _zeros(array, zero) < _LEAST_ZEROS:
        return None
    matrix = _matrix(layer, array)
    pattern = smallest_pattern(matrix, bits, _matrix(layer, zero) if zero.any() else 0)
    return None if pattern is None else (pattern, matrix.shape)


def _zeros(array: Array, zero: Array) -> float:
    """Share of zeros in a few blocks of a weight."""
    blocks = -(-len(array) // _BLOCK)
    found = total = 0
    for block in {blocks * i // _BLOCKS for i in range(_BLOCKS)}:
        part = slice(block * _BLOCK, (block + 1) * _BLOCK), slice(_WIDTH)
        sample = array[part] == zero[part]
        found, total = found + int(sample.sum()), total + sample.size
    return found / total


def _matrix(layer: Layer, array: Array) -> Array:
    """`(K, N)`; for a Conv, the channels of a group by its outputs and kernel positions."""
    if len(layer.shape) == 2:
        return array.T if layer.outputs_first else array
    return np.moveaxis(array, 1, 0).reshape(array.shape[1], -1)
