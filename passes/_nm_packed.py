"""Packed weights: what they hold, how they get into a graph, and the products that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, become, constant, users
from onnxcomp.ops import DOMAIN, NM_OPS, pack_nm
from onnxcomp.passes._disk_weights import Spool
from onnxcomp.passes._nm_pack_layers import alpha_of, matrix, tensor_of
from onnxcomp.passes._nm_scores import Pattern
from onnxcomp.passes._nm_weights import Layer
from onnxcomp.target import Array

Values: TypeAlias = Literal["keep", "float16", "int8"]

_MOST = 127  # of the integers that a weight is quantized to


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Inputs of the op that multiplies by a packed weight.

    Attributes:
        values: `[S, N]`.
        indices: Packed, uint8.
        scale: `[N]`, of integers only.
    """

    values: Array
    indices: Array
    scale: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.values.nbytes + self.indices.nbytes + (0 if self.scale is None else self.scale.nbytes)


def value_bits(layer: Layer, values: Values) -> int:
    """Bits of a stored value."""
    if layer.dequantize is not None or values == "int8":
        return 8
    return 16 if values == "float16" else tensor_of(layer).dtype.bitwidth


def stored_bytes(layer: Layer) -> int:
    """Bytes of a weight before it is packed, with scale and zero point."""
    held = [layer.value, *(layer.dequantize.inputs[1:] if layer.dequantize is not None else ())]
    tensors = [ir.convenience.get_const_tensor(value) for value in held if value is not None]
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack(layer: Layer, pattern: Pattern, values: Values) -> Packed | str:
    """Packs a weight that keeps to a pattern, or says why its values cannot be stored as asked."""
    alpha = alpha_of(layer)
    with matrix(layer) as weight:
        held, indices = pack_nm(weight, pattern.kept, pattern.size)
    if layer.dequantize is not None:
        scale = constant(layer.dequantize.inputs[1])
        assert scale is not None
        spread = np.broadcast_to(scale.astype(np.float32).reshape(-1) * np.float32(alpha), layer.outputs)
        return Packed(values=held, indices=indices, scale=np.ascontiguousarray(spread))
    if alpha != 1.0:
        with np.errstate(over="ignore"):
            held = (held.astype(np.float32) * np.float32(alpha)).astype(held.dtype)
        if not np.isfinite(held).all():
            return "its weight times alpha is not finite"
    if values == "keep":
        return Packed(values=held, indices=indices, scale=None)
    if not np.isfinite(held).all():
        return "its weight holds NaN or infinity"
    largest = np.abs(held).max(axis=0).astype(np.float32)
    if values == "float16":
        if largest.max() > np.finfo(np.float16).max:
            return f"its weight reaches {largest.max():.3g}, more than float16 holds"
        return Packed(values=held.astype(np.float16), indices=indices, scale=None)
    scale = np.where(largest > 0.0, largest / np.float32(_MOST), np.float32(1.0))
    scale = np.maximum(scale, np.finfo(np.float32).tiny)
    return Packed(values=_nearest(held, scale), indices=indices, scale=scale)


def _nearest(values: Array, scale: Array) -> Array:
    """Integers for values, some rows at a time."""
    integers = np.empty(values.shape, np.int8)
    step = max(1, (1 << 22) // values.shape[1])
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        integers[part] = np.clip(np.rint(values[part].astype(np.float32) / scale), -_MOST, _MOST)
    return integers


class PackedRewriter:
    """Writes packed weights into the main graph of a model."""

    def __init__(self, model: ir.Model) -> None:
        self._model, self._editor, self._spool = model, Editor(model), Spool()

    def write(self, layer: Layer, packed: Packed, pattern: Pattern) -> None:
        """Makes all products by a weight read it in packed form; what nobody reads after that goes.

        If it lay in a file, the packed one goes to a file as well.
        """
        on_disk = isinstance(layer.value.const_value, ir.ExternalTensor | ir.LazyTensor)
        name = layer.value.name or "weight"
        inputs = [
            self._editor.weight(f"{name}_{pattern.kept}_{pattern.size}_values", packed.values),
            self._editor.weight(f"{name}_{pattern.kept}_{pattern.size}_indices", packed.indices),
        ]
        if packed.scale is not None:
            inputs.append(self._editor.weight(f"{name}_{pattern.kept}_{pattern.size}_scale", packed.scale))
        for value in inputs if on_disk else ():
            self._spool.take(value)
        op = NM_OPS["NMMatMul" if packed.scale is None else "NMMatMulInt8"]
        op.install(self._model)
        for node in layer.nodes:
            weight, bias = node.inputs[1], self._bias(node)
            left = node.inputs[2] if len(node.inputs) > 2 else None
            become(node, op.name, [node.inputs[0], *inputs], {"m": pattern.size, "k": layer.columns}, DOMAIN)
            if bias is not None:
                self._editor.add_behind(node.outputs[0], bias)
            self._drop(weight)
            self._drop(left)

    def _bias(self, node: ir.Node) -> ir.Value | None:
        """What a Gemm adds to its product, times beta."""
        bias, beta = node.inputs[2] if len(node.inputs) > 2 else None, float(attribute(node, "beta", 1.0))
        if bias is None or beta == 1.0:
            return bias
        if beta == 0.0:
            return None
        array = constant(bias)
        if array is not None:
            return self._editor.weight(f"{bias.name}_scaled", (array * array.dtype.type(beta)).astype(array.dtype))
        factor = self._editor.weight(f"{node.name}_beta", np.asarray(beta, np.float32))
        like = self._editor.before(node, "CastLike", [factor, bias], name=f"{node.name}_beta_like")
        return self._editor.before(node, "Mul", [bias, like], name=f"{bias.name}_scaled", like=bias)

    def _drop(self, value: ir.Value | None) -> None:
        """Removes a constant that nobody reads any more, with what transposes or dequantizes it."""
        if value is None or users(value) or value.is_graph_output() or value.is_graph_input():
            return
        producer = value.producer()
        if producer is None:
            self._model.graph.initializers.pop(value.name or "", None)
        elif producer.op_type in ("Constant", "DequantizeLinear", "Transpose") and len(producer.outputs) == 1:
            inputs = list(producer.inputs)
            self._model.graph.remove(producer, safe=True)
            for held in inputs:
                self._drop(held)
