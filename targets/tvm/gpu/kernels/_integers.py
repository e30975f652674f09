"""Integers and halves in words of 32 bits, to floats.

The units that convert have a quarter of the rate of others, or less, so bits are put in place in a mantissa instead.
Which byte, half or nibble is an expression that is constant once loops are unrolled.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

_MAGIC = 0x4B000000
"""Bits of 2^23: what lies in the lowest of its mantissa is added to it."""

_SIXTEEN = 0x41800000
"""Bits of 16.0."""


def _with_magic(word: Any, byte: Any) -> Any:
    select = T.Cast("uint32", T.int32(0x7540) + byte)
    bits = T.call_pure_extern("uint32", "__byte_perm", T.reinterpret("uint32", word), T.uint32(_MAGIC), select)
    return T.reinterpret("float32", bits)


def flipped(word: Any) -> Any:
    """Four int8 of an int32 word, each plus 128, as uint8."""
    return T.bitwise_xor(word, T.int32(-0x7F7F7F80))


def from_flipped(word: Any, byte: Any) -> Any:
    """An int8 of what `flipped` made, as float32."""
    return _with_magic(word, byte) - T.float32(2**23 + 128)


def from_byte(word: Any, byte: Any, plus: int = 0) -> Any:
    """A uint8 of an int32 word as float32, and a number added."""
    return _with_magic(word, byte) - T.float32(2**23 - plus)


def from_half(word: Any, index: Any) -> Any:
    """The lower or the upper half of an int32 word as float32."""
    bits = T.bitwise_and(T.shift_right(word, 16 * index), T.int32(0xFFFF))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


def opaque_sixteen(count: Any) -> Any:
    """16.0, float32, as a value that the compiler does not know; `count` is any int32 expression that is not negative.

    It would put a constant into each instruction, and one that takes two constants is two instructions.
    """
    return T.reinterpret("float32", T.bitwise_or(T.bitwise_and(count, T.int32(-(2**31))), T.int32(_SIXTEEN)))


def sixteen_plus(word: Any, nibble: Any, sixteen: Any) -> Any:
    """16 + a nibble of an int32 word, as float32, with what `opaque_sixteen` gave."""
    shift = 19 - 4 * nibble  # to the highest bits of a mantissa, where it adds as much to 16
    left, right = T.shift_left(word, T.max(shift, 0)), T.shift_right(word, T.max(0 - shift, 0))
    moved = T.if_then_else(shift >= 0, left, right)
    return T.reinterpret(
        "float32", T.bitwise_or(T.bitwise_and(moved, T.int32(15 << 19)), T.reinterpret("int32", sixteen))
    )
