"""`NMMatMul`: MatMul by a weight of which N of every M consecutive rows are stored, in floats and in int8."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._nm_packing import unpack_nm
from onnxcomp.ops._op import Float, PortableOp

_REST = "indices uint8 [ceil(S/8) * bits, N] -> Y [..., N]; float; attributes m, k"
_Array = npt.NDArray[Any]


def nm_matmul(x: Float, values: Float, indices: _Array, *, m: int, k: int) -> Float:
    """Product with a packed weight: `x @ unpack_nm(values, indices)`.

    Args:
        x: Inputs, floating, `[..., K]`.
        values: Weights that are kept, `[S, N]`, see `pack_nm`; read in the type of `x`.
        indices: Where they stand, uint8.
        m: Size of a group.
        k: K.

    Returns:
        `[..., N]`, of the type of `x`.
    """
    product: Float = np.matmul(x, unpack_nm(values, indices, m=m, k=k).astype(x.dtype, copy=False))
    return product


# A column of indices is one stream of bits. The byte in which an index begins is shifted until no other bits are left;
# what lies in the next byte is added: of each byte, the bits of the index that began before it, if any did.
# Runtimes fold all of this when they load a model, and hold every step of all layers until they are through, so what is
# as large as the weight stays in bytes as long as it can. No shape depends on content: ONNX Runtime does not fold that.
_UNPACK = """
    m_int = Constant <value_int: int = @m> ()
    k_int = Constant <value_int: int = @k> ()
    one = Constant <value_ints = [1]> ()
    size = Reshape (m_int, one)
    inputs = Reshape (k_int, one)
    padded = Add (inputs, size)
    above = Sub (padded, one)
    groups = Div (above, size)
    zero_int = Constant <value_ints = [0]> ()
    slots = Shape <start = 0, end = 1> (values)
    columns = Shape <start = 1, end = 2> (values)
    kept = Div (slots, groups)
    eight = Constant <value_ints = [8]> ()
    seven = Constant <value_ints = [7]> ()
    slots_above = Add (slots, seven)
    words = Div (slots_above, eight)
    bytes = Shape <start = 0, end = 1> (indices)
    bits = Div (bytes, words)

    start = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    free = Sub (eight, bits)
    free_byte = Cast <to = 2> (free)

    slot_count = Squeeze (slots)
    slot = Range (start, slot_count, step)
    slot_start = Mul (slot, bits)
    byte = Div (slot_start, eight)
    bit = Mod (slot_start, eight)
    grid = Concat <axis = 0> (groups, kept)
    byte_grid = Reshape (byte, grid)
    column_grid = Concat <axis = 0> (groups, kept, one)
    bit_grid = Reshape (bit, column_grid)
    first_bytes = Gather <axis = 0> (indices, byte_grid)
    room = Sub (free, bit_grid)
    left = Max (room, zero_int)
    right = Add (bit_grid, left)
    left_byte = Cast <to = 2> (left)
    right_byte = Cast <to = 2> (right)
    begun = BitShift <direction = "LEFT"> (first_bytes, left_byte)
    low = BitShift <direction = "RIGHT"> (begun, right_byte)

    stream = Mul (slots, bits)
    stream_above = Add (stream, seven)
    used = Div (stream_above, eight)
    used_count = Squeeze (used)
    used_bytes = Slice (indices, zero_int, used, zero_int)
    row = Range (start, used_count, step)
    row_start = Mul (row, eight)
    row_slot = Div (row_start, bits)
    before = Mod (row_start, bits)
    before_column = Unsqueeze (before, one)
    raised = Add (before_column, free)
    raised_byte = Cast <to = 2> (raised)
    continued = BitShift <direction = "LEFT"> (used_bytes, raised_byte)
    ended = BitShift <direction = "RIGHT"> (continued, free_byte)
    is_split = Greater (before_column, zero_int)
    no_bits = Constant <value = uint8 {0}> ()
    high = Where (is_split, ended, no_bits)
    row_group = Div (row_slot, kept)
    row_lane = Mod (row_slot, kept)
    group_column = Unsqueeze (row_group, one)
    lane_column = Unsqueeze (row_lane, one)
    row_place = Concat <axis = 1> (group_column, lane_column)
    place_bytes = ScatterND <reduction = "add"> (low, row_place, high)
    places = Cast <to = 6> (place_bytes)

    grouped_shape = Concat <axis = 0> (groups, kept, columns)
    grouped = Reshape (stored, grouped_shape)
    empty_shape = Concat <axis = 0> (groups, size, columns)
    empty = Expand (zero, empty_shape)
    filled = ScatterElements <axis = 1> (empty, places, grouped)
    rows = Mul (groups, size)
    matrix = Concat <axis = 0> (rows, columns)
    filled_rows = Reshape (filled, matrix)
    weight = Slice (filled_rows, zero_int, inputs, zero_int)
"""

# In float32 whatever the inputs are. CastLike on a weight would not be folded where the function was written out before
# ONNX Runtime reads it, nor is there a float16 kernel for all that makes the weight.
_PRODUCT = """
    X_float = Cast <to = 1> (X)
    Y_float = MatMul (X_float, weight_float)
    Y = CastLike (Y_float, X)
"""


def nm_op() -> PortableOp:
    """`NMMatMul`, whose values are floats."""

    def reference(x: Float, values: Float, indices: _Array, *, m: int, k: int) -> Float:
        return nm_matmul(x, values, indices, m=m, k=k)

    return PortableOp(
        name="NMMatMul",
        summary="MatMul by a weight of which N of every M consecutive rows are stored",
        signature=f"X [..., K], values float or float16 [S, N], {_REST}",
        body=f"""
        NMMatMul <m, k> (X, values, indices) => (Y) {{
            stored = Cast <to = 1> (values)
            zero = Constant <value = float {{0.0}}> ()
            {_UNPACK}
            weight_float = Identity (weight)
            {_PRODUCT}
        }}
        """,
        reference=reference,
    )


def nm_int8_op() -> PortableOp:
    """`NMMatMulInt8`, whose values are integers with a scale a column."""

    def reference(x: Float, values: _Array, indices: _Array, scale: Float, *, m: int, k: int, exact: int = 0) -> Float:
        # In float32 whatever the input is, as in the body: runtimes fold that for float16, too.
        weight = unpack_nm(values, indices, m=m, k=k).astype(np.float32) * scale.astype(np.float32)
        product: Float = np.matmul(x, weight.astype(x.dtype, copy=False))
        return product

    return PortableOp(
        name="NMMatMulInt8",
        summary="MatMul by a weight of which N of every M consecutive rows are stored, int8 weight",
        signature=f"X [..., K], values int8 [S, N], scale [N], {_REST}",
        body=f"""
        NMMatMulInt8 <m, k, exact: int = 0> (X, values, indices, scale) => (Y) {{
            stored = Identity (values)
            zero = Constant <value = int8 {{0}}> ()
            {_UNPACK}
            integers = Cast <to = 1> (weight)
            factors = Cast <to = 1> (scale)
            weight_float = Mul (integers, factors)
            {_PRODUCT}
        }}
        """,
        reference=reference,
    )
