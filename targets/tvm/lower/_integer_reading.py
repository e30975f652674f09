"""Reads quantized tensors of a graph: where codes come from, where they go, and constants."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant, sole_reader
from onnxcomp.target import Array

_BYTES = {ir.DataType.UINT8: "uint8", ir.DataType.INT8: "int8"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float value that is dequantized from codes with one scale.

    Attributes:
        codes: The 8-bit tensor.
        scale: A float32.
        zero: Zero point.
        dtype: `uint8` or `int8`.
    """

    codes: ir.Value
    scale: np.float32
    zero: int
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Sink:
    """Where a float value goes that nothing but a quantizer reads, maybe behind a clamp.

    Attributes:
        last: The QuantizeLinear node.
        scale: A float32.
        zero: Zero point.
        dtype: `uint8` or `int8`.
        low: Least code, clamps included.
        high: Greatest code, clamps included.
    """

    last: ir.Node
    scale: np.float32
    zero: int
    dtype: str
    low: int
    high: int

    @property
    def attributes(self) -> dict[str, int | str]:
        """Those of a node of ours that puts out these codes."""
        return {"dtype": self.dtype, "zero": self.zero, "low": self.low, "high": self.high}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A constant of integers.

    Attributes:
        load: Reads the integers, int8, less the zero point.
        scale: Float32, one number or one a channel.
        axis: Of the channels.
    """

    load: Callable[[], Array]
    scale: Array
    axis: int | None


def source(value: ir.Value | None) -> Source | None:
    """What `value` is dequantized from, unless it is constant or something else."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "DequantizeLinear" or (codes := node.inputs[0]) is None:
        return None
    scale, zero = constant(node.inputs[1]), _zero_point(node)
    if scale is None or scale.size != 1 or scale.dtype != np.float32 or zero is None or zero.size != 1:
        return None
    if codes.dtype not in _BYTES or ir.convenience.get_const_tensor(codes) is not None:
        return None
    return Source(
        codes=codes, scale=np.float32(scale.reshape(())), zero=int(zero.reshape(())), dtype=_BYTES[codes.dtype]
    )


def sink(value: ir.Value) -> Sink | None:
    """Where `value` is quantized, if it is with one scale to 8 bits, and nothing else reads it."""
    bounds: list[tuple[float, float]] = []
    while (node := sole_reader(value)) is not None and not node.domain:
        if node.op_type == "QuantizeLinear":
            if (found := quantizer(node)) is None:
                return None
            low = max([found.low, *(_code(found, low) for low, _ in bounds)])
            high = min([found.high, *(_code(found, high) for _, high in bounds)])
            return replace(found, low=low, high=high) if low <= high else None
        if (limit := _clamp(node)) is None or node.inputs[0] is not value:
            return None
        bounds.append(limit)
        value = node.outputs[0]
    return None


def weight(value: ir.Value | None) -> Weight | None:
    """The integers that a constant is dequantized from; None if they do not fit into int8 without their zero point."""
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "DequantizeLinear" or attribute(node, "block_size", 0):
        return None
    stored, scale, zero = _stored(node.inputs[0]), constant(node.inputs[1]), _zero_point(node)
    if stored is None or scale is None or zero is None or scale.dtype != np.float32:
        return None
    integers = stored()
    axis = attribute(node, "axis", 1) % max(1, integers.ndim) if scale.size > 1 else None
    if integers.dtype not in (np.int8, np.uint8) or (zero.size > 1 and axis is None):
        return None
    shape = _along(axis, integers.ndim, zero)
    least, most = _extent(integers, zero, shape)
    if least < -128 or most > 127:
        return None

    def load() -> Array:
        centred = stored().astype(np.int16) - zero.reshape(shape).astype(np.int16)
        return np.asarray(centred.astype(np.int8))

    return Weight(load=load, scale=scale.reshape(-1), axis=axis)


def _stored(value: ir.Value | None) -> Callable[[], Array] | None:
    """Reads integers that are stored, or that a constant is quantized to in the graph; None if it is no constant."""
    if constant(value) is not None:
        return lambda: np.asarray(constant(value))
    node = value.producer() if value is not None else None
    if node is None or node.domain or node.op_type != "QuantizeLinear" or attribute(node, "block_size", 0):
        return None
    given = node.inputs[0]
    floats, scale, zero = constant(given), constant(node.inputs[1]), _zero_point(node)
    if floats is None or scale is None or zero is None or zero.dtype not in (np.int8, np.uint8):
        return None
    axis = attribute(node, "axis", 1) % max(1, floats.ndim)
    steps, centre = (c.reshape(_along(axis, floats.ndim, c)) for c in (scale, zero))

    def quantized() -> Array:
        array = constant(given)
        assert array is not None
        return np.asarray(np.clip(np.rint(array / steps) + centre, *limits(zero.dtype.name)).astype(zero.dtype))

    return quantized


def _along(axis: int | None, rank: int, numbers: Array) -> list[int]:
    """Shape in which one number, or one a channel, is spread over a tensor."""
    return [-1 if i == axis else 1 for i in range(rank)] if numbers.size > 1 else []


def _extent(integers: Array, zero: Array, shape: Sequence[int]) -> tuple[int, int]:
    if not zero.any():
        return int(integers.min()), int(integers.max())
    centred = integers.astype(np.int16) - zero.reshape(shape).astype(np.int16)
    return int(centred.min()), int(centred.max())


def bias(value: ir.Value | None, scale: Array, size: int) -> Array | None:
    """A constant bias in integers of `scale`, (size,); None if it is not constant. int64, zeros if there is none."""
    if value is None:
        return np.zeros(size, np.int64)
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear" and not node.domain:
        integers, own, zero = constant(node.inputs[0]), constant(node.inputs[1]), _zero_point(node)
        if integers is None or own is None or zero is None or zero.any() or integers.dtype != np.int32:
            return None
        if integers.size != size or own.size not in (1, size):
            return None
        if np.allclose(own.reshape(-1), scale, rtol=1e-3, atol=0.0):
            return integers.reshape(-1).astype(np.int64)
        values = integers.reshape(-1) * own.reshape(-1).astype(np.float64)
    else:
        found = constant(value)
        if found is None or found.size not in (1, size):
            return None
        values = np.broadcast_to(found.reshape(-1).astype(np.float64), (size,))
    return np.rint(values / scale).astype(np.int64)


def float_bias(value: ir.Value | None, size: int) -> Array | None:
    """A constant or dequantized bias as float32, (size,); None if it is neither."""
    node = value.producer() if value is not None else None
    found = constant(value)
    if node is not None and node.op_type == "DequantizeLinear" and not node.domain:
        integers, scale, zero = constant(node.inputs[0]), constant(node.inputs[1]), _zero_point(node)
        if integers is None or scale is None or zero is None or zero.any() or integers.dtype != np.int32:
            return None
        found = (integers.reshape(-1).astype(np.float32) * scale.reshape(-1)).astype(np.float32)
    if found is None or found.dtype != np.float32 or found.size not in (1, size):
        return None
    if found.size == size and found.shape[-1:] != (size,):
        return None
    return np.broadcast_to(found.reshape(-1), (size,))


def quantizer(node: ir.Node) -> Sink | None:
    """What a QuantizeLinear node does, if it has one scale and puts out 8 bits."""
    scale, zero = constant(node.inputs[1]), _zero_point(node)
    if scale is None or scale.size != 1 or scale.dtype != np.float32 or zero is None or zero.size != 1:
        return None
    dtype = zero.dtype.name if len(node.inputs) > 2 and node.inputs[2] is not None else "uint8"
    if dtype not in _BYTES.values() or (node.outputs[0].dtype or ir.DataType[dtype.upper()]) not in _BYTES:
        return None
    info = np.iinfo(dtype)
    return Sink(
        last=node,
        scale=np.float32(scale.reshape(())),
        zero=int(zero.reshape(())),
        dtype=dtype,
        low=int(info.min),
        high=int(info.max),
    )


def _clamp(node: ir.Node) -> tuple[float, float] | None:
    """Limits of a Relu or Clip."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    if node.op_type != "Clip":
        return None
    ends = []
    for index, missing in ((1, -math.inf), (2, math.inf)):
        value = node.inputs[index] if len(node.inputs) > index else None
        found = constant(value)
        if value is not None and (found is None or found.size != 1):
            return None
        ends.append(missing if found is None else float(found.reshape(())))
    return ends[0], ends[1]


def _code(sink: Sink, value: float) -> int:
    """Code that a quantizer gives to `value`."""
    scaled = np.clip(np.float32(value) / sink.scale, -1024, 1024)
    return int(np.clip(np.rint(scaled) + sink.zero, *limits(sink.dtype)))


def limits(dtype: str) -> tuple[int, int]:
    """Least and greatest number of a type."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _zero_point(node: ir.Node) -> Array | None:
    """Constant zero point, 0 where it is left out; None if it is not constant."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return np.zeros((), np.int32) if value is None else constant(value)
