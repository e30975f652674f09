"""How a portable op finds the inputs that count: text that makes `kept` of an input, and the same in numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._op import Float

# `#` stands for the input.
ABOVE_THRESHOLD = """
    one_sided_int = Constant <value_int: int = @one_sided> ()
    is_one_sided = Cast <to = 9> (one_sided_int)
    magnitude = Abs (#)
    compared = Where (is_one_sided, #, magnitude)
    small = LessOrEqual (compared, threshold)
    zero_float = Constant <value_float = 0.0> ()
    zero = CastLike (zero_float, #)
    kept = Where (small, zero, #)
"""

# Of equal magnitudes ONNX's TopK takes those of lowest index.
LARGEST = """
    wanted_int = Constant <value_int: int = @k> ()
    vector = Constant <value_ints = [1]> ()
    wanted = Reshape (wanted_int, vector)
    there = Shape <start = -1> (#)
    count = Min (wanted, there)
    magnitude = Abs (#)
    largest, places = TopK (magnitude, count)
    shape = Shape (#)
    nothing = ConstantOfShape <value = int32[1] {0}> (shape)
    places_shape = Shape (places)
    ones = ConstantOfShape <value = int32[1] {1}> (places_shape)
    marks = ScatterElements <axis = -1> (nothing, places, ones)
    marked = Cast <to = 9> (marks)
    zero_float = Constant <value_float = 0.0> ()
    zero = CastLike (zero_float, #)
    kept = Where (marked, #, zero)
"""


def above_threshold(x: Float, threshold: npt.ArrayLike, one_sided: int) -> Float:
    """`x` with zeros in place of what is at most `threshold`, by magnitude or as it is. NaN is never dropped."""
    # Not `abs(x) > threshold`: that is false for NaN and would drop it.
    small = (x if one_sided else np.abs(x)) <= np.asarray(threshold, x.dtype)
    kept: Float = np.where(small, np.zeros((), x.dtype), x)
    return kept


def largest(x: Float, k: int) -> Float:
    """`x` with zeros but for the `k` largest magnitudes of each row; of equal ones those of lowest index, NaN first."""
    order = np.lexsort((-np.abs(x), ~np.isnan(x)), axis=-1)[..., :k]
    kept: Float = np.zeros_like(x)
    np.put_along_axis(kept, order, np.take_along_axis(x, order, axis=-1), axis=-1)
    return kept
