"""Weights as rows whose consecutive entries form groups, read from and written back to floats or integers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, users
from onnxcomp.passes._gram import Window
from onnxcomp.passes._nm_solve import Snap
from onnxcomp.target import Array


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A linear op that reads a weight.

    Attributes:
        node: The op.
        cut: Window of a Conv.
    """

    node: ir.Node
    cut: Window | None

    @property
    def key(self) -> tuple[str, Window | None]:
        """Readers of the same key see the same rows."""
        source = self.node.inputs[0]
        return "" if source is None else source.name or "", self.cut


@dataclass(kw_only=True, eq=False)
class Layer:
    """A constant that linear ops multiply by.

    Attributes:
        value: The constant: floats, or the integers that `dequantize` reads.
        dequantize: DequantizeLinear between the constant and the ops, if any.
        outputs_first: It is stored as (N, K) or, for a Conv, (N, channels of a group, kernel).
        shape: As it is stored.
        groups: Groups of channels.
        readers: The ops.
        reason: Why it has to stay as it is; empty if it need not.
    """

    value: ir.Value
    dequantize: ir.Node | None
    outputs_first: bool
    shape: tuple[int, ...]
    groups: int
    readers: list[Reader] = field(default_factory=list)
    reason: str = ""

    @property
    def nodes(self) -> list[ir.Node]:
        """The ops that multiply by it."""
        return [reader.node for reader in self.readers]

    @property
    def taps(self) -> int:
        """Kernel positions of a Conv."""
        return math.prod(self.shape[2:])

    @property
    def channels(self) -> int:
        """Inputs of an output at a kernel position: the axis along which weights are grouped."""
        return self.shape[1 if self.outputs_first else 0]

    @property
    def outputs(self) -> int:
        """N."""
        return self.shape[0 if self.outputs_first else 1]

    @property
    def columns(self) -> int:
        """K, inputs of an output."""
        return self.channels * self.taps

    def order(self) -> Array:
        """Where the columns of `rows` stand among inputs of which channels come first and kernel positions second."""
        return np.arange(self.columns).reshape(self.channels, self.taps).T.reshape(-1)

    def read(self) -> Stored:
        """The weight, read anew every time."""
        array = constant(self.value)
        assert array is not None
        if self.dequantize is None:
            return Stored(layer=self, array=array, zero=np.zeros((), array.dtype), scale=None)
        parts = [constant(v) for v in self.dequantize.inputs[1:] if v is not None]
        assert parts[0] is not None
        scale = self._spread(parts[0].astype(np.float64))
        zero = np.zeros((), np.int32) if len(parts) < 2 or parts[1] is None else parts[1].astype(np.int32)
        return Stored(layer=self, array=array, zero=self._spread(zero), scale=scale)

    def rows(self, array: Array) -> Array:
        """An array in the shape of the constant as (groups, N / groups, K), kernel positions first."""
        if not self.outputs_first:
            array = array.T
        grouped = array.reshape(self.groups, len(array) // self.groups, self.channels, self.taps)
        return np.ascontiguousarray(grouped.swapaxes(2, 3)).reshape(*grouped.shape[:2], -1)

    def stored(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        grouped = rows.reshape(*rows.shape[:2], self.taps, self.channels).swapaxes(2, 3)
        array = grouped.reshape(-1, self.channels, *self.shape[2:])
        return np.ascontiguousarray(array if self.outputs_first else array.T)

    def _spread(self, parameter: Array) -> Array:
        """Scale or zero point of a tensor, a channel or a block, in the shape of the constant."""
        assert self.dequantize is not None
        if parameter.size == 1:
            return np.broadcast_to(parameter.reshape(()), self.shape)
        axis = int(attribute(self.dequantize, "axis", 1)) % len(self.shape)
        if block := int(attribute(self.dequantize, "block_size", 0)):
            return np.repeat(parameter, block, axis=axis)[tuple(map(slice, self.shape))]
        sizes = [1] * len(self.shape)
        sizes[axis] = -1
        return np.broadcast_to(parameter.reshape(sizes), self.shape)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Content of a weight.

    Attributes:
        layer: Whose it is.
        array: As it is stored.
        zero: What stands for zero, in its shape or `()`.
        scale: Step of the integers, float64 in its shape; None for floats.
    """

    layer: Layer
    array: Array
    zero: Array
    scale: Array | None

    @property
    def nonzero(self) -> Array:
        """Bool, as rows."""
        return self.layer.rows(self._integers() != self.zero if self.scale is not None else self.array != 0)

    @property
    def weight(self) -> Array:
        """What it stands for, float64 as rows."""
        if self.scale is None:
            return self.layer.rows(self.array.astype(np.float64))
        return self.layer.rows((self._integers() - self.zero) * self.scale)

    def snap(self, rows: Array) -> Array:
        """Nearest values that can be stored, float64 as rows; an integer weight keeps its grid."""
        if self.scale is None:
            return rows
        integers = self._nearest(self.layer.stored(rows))
        return self.layer.rows((integers - self.zero) * self.scale)

    def snaps(self) -> list[Snap | None]:
        """For each group of channels what rounds columns to values that can be stored; None where all can."""
        if self.scale is None:
            return [None] * self.layer.groups
        zero, scale = self.layer.rows(np.broadcast_to(self.zero, self.layer.shape)), self.layer.rows(self.scale)
        integers = self._integers()
        grid = (int(integers.min()), int(integers.max()))
        return [partial(_round, scale[g], zero[g], grid) for g in range(self.layer.groups)]

    def write(self, editor: Editor, rows: Array, mask: Array) -> None:
        """Puts other values into the graph, for all readers; what is not in the mask becomes an exact zero.

        A weight whose value did not change keeps its bits.
        """
        layer = self.layer
        same, kept = layer.stored(rows == self.weight), layer.stored(mask)
        new = self._nearest(layer.stored(rows)) if self.scale is not None else layer.stored(rows)
        new = np.where(kept, new, self.zero).astype(self.array.dtype)
        array = np.where(kept & same, self.array, new).astype(self.array.dtype)
        tensor = layer.value.const_value
        if layer.value.producer() is None and tensor is not None:
            # In place, so that no second copy of all weights is in memory until unused ones are removed.
            layer.value.const_value = ir.tensor(array, dtype=tensor.dtype, name=layer.value.name)
        else:
            redirect(layer.value, editor.weight(layer.value.name or "weight", array), users(layer.value))

    def _integers(self) -> Array:
        return self.array.astype(np.int32)

    def _nearest(self, array: Array) -> Array:
        """Integers for values, within those that the weight has: a narrow grid stays narrow."""
        assert self.scale is not None
        integers = self._integers()
        return _nearest(array, self.scale, self.zero, (int(integers.min()), int(integers.max())))


def _nearest(array: Array, scale: Array, zero: Array, limits: tuple[int, int]) -> Array:
    return np.asarray(np.clip(np.rint(array / np.where(scale > 0.0, scale, 1.0)) + zero, *limits).astype(np.int32))


def _round(scale: Array, zero: Array, limits: tuple[int, int], columns: slice, array: Array) -> Array:
    scale, zero = scale[:, columns], zero[:, columns]
    return np.asarray((_nearest(array, scale, zero, limits) - zero) * scale)
