"""The formats that a weight of a portable op comes in: the inputs that hold it, and how they are read as floats.

fp32 (or what type the input has): the matrix itself. int8: integers and one scale a column. int4: two integers a byte,
low bits first, along the columns, of which 32 share a scale and a zero point; so every row can be read on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._op import Float

GROUP = 32
"""Columns of a 4-bit weight that share a scale."""

_Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of weights. `@` in the texts stands for the name of the weight, `%` for what it multiplies.

    Attributes:
        suffix: Of the names of ops with such weights.
        inputs: Names of the inputs.
        shapes: The inputs with shapes, of a weight of `R` rows and `C` columns.
        note: For the summary of an op.
        body: Text that makes `@_float`, the weight in the type of `%`.
        dequantize: The same in numpy; takes the inputs and a type.
    """

    suffix: str
    inputs: str
    shapes: str
    note: str
    body: str
    dequantize: Callable[..., Float]

    def parameters(self, weight: str) -> str:
        """Names of the inputs that hold `weight`."""
        return self.inputs.replace("@", weight)

    def signature(self, weight: str, rows: str, columns: str) -> str:
        """The inputs with their shapes."""
        names = {"@": weight, "R": rows, "C": columns}
        return "".join(names.get(letter, letter) for letter in self.shapes)

    def decode(self, weight: str, like: str) -> str:
        """Text that makes `{weight}_float`."""
        return self.body.replace("@", weight).replace("%", like)


def _same(w: Float, dtype: npt.DTypeLike) -> Float:
    return w.astype(dtype, copy=False)


def _from_int8(w: _Array, scale: Float, dtype: npt.DTypeLike) -> Float:
    values: Float = w.astype(dtype) * scale.astype(dtype)
    return values


def _from_int4(w: _Array, scale: Float, zero_point: _Array, dtype: npt.DTypeLike) -> Float:
    codes = np.stack([w & 15, w >> 4], axis=-1).reshape(*scale.shape, GROUP).astype(dtype)
    values: Float = (codes - zero_point[..., None].astype(dtype)) * scale[..., None].astype(dtype)
    return values.reshape(len(w), -1)


FLOAT = Format(
    suffix="",
    inputs="@",
    shapes="@ [R, C]",
    note="",
    body="@_float = Identity (@)",
    dequantize=_same,
)

INT8 = Format(
    suffix="Int8",
    inputs="@, @_scale",
    shapes="@ int8 [R, C], @_scale [C]",
    note=", int8 weight",
    body="""
    @_integers = CastLike (@, %)
    @_factors = CastLike (@_scale, %)
    @_float = Mul (@_integers, @_factors)
    """,
    dequantize=_from_int8,
)

# Nibbles are parted with what opset 16 has for uint8: shift and remainder.
INT4 = Format(
    suffix="Int4",
    inputs="@, @_scale, @_zero_point",
    shapes=f"@ uint8 [R, C/2], @_scale float or float16 [R, C/{GROUP}], @_zero_point uint8 [] or [R, C/{GROUP}]",
    note=", 4-bit weight",
    body=f"""
    @_last = Constant <value_ints = [-1]> ()
    @_four = Constant <value = uint8 {{4}}> ()
    @_sixteen = Constant <value = uint8 {{16}}> ()
    @_group = Constant <value_ints = [{GROUP}]> ()
    @_flat = Constant <value_ints = [0, -1]> ()
    @_low = Mod (@, @_sixteen)
    @_high = BitShift <direction = "RIGHT"> (@, @_four)
    @_low_column = Unsqueeze (@_low, @_last)
    @_high_column = Unsqueeze (@_high, @_last)
    @_pairs = Concat <axis = -1> (@_low_column, @_high_column)
    @_groups = Shape (@_scale)
    @_grouped_shape = Concat <axis = 0> (@_groups, @_group)
    @_grouped = Reshape (@_pairs, @_grouped_shape)
    @_codes = CastLike (@_grouped, %)
    @_zero_column = Unsqueeze (@_zero_point, @_last)
    @_zeros = CastLike (@_zero_column, %)
    @_centred = Sub (@_codes, @_zeros)
    @_scale_column = Unsqueeze (@_scale, @_last)
    @_factors = CastLike (@_scale_column, %)
    @_scaled = Mul (@_centred, @_factors)
    @_float = Reshape (@_scaled, @_flat)
    """,
    dequantize=_from_int4,
)

FORMATS = (FLOAT, INT8, INT4)
"""All formats."""
