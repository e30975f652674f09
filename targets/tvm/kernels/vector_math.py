"""Functions of float32 vectors that stay vectors: TVM's own go through the C library, a value at a time.

An argument is a float32 expression of any number of lanes. NaN passes through everywhere. Results below
2e-38 may be zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

_ROUNDER = 12582912.0
"""1.5 * 2^23: added to a small float, it leaves the nearest integer in the low bits."""
_LOWEST = -86.9
"""Below this, `exp` is zero: half of the power of two would be denormal."""
_HIGHEST = 89.0
"""From here on `exp` overflows."""

_EXP = (
    1.0,
    1.0,
    0.49999992032260382,
    0.16666419189110568,
    0.041668231808211498,
    0.0083748984672498278,
    0.0013836742000989286,
)
"""Minimax polynomial of exp over half an octave, lowest power first."""
_TWICE_EXP = tuple(2 * c for c in _EXP)

_ERF_ABOVE = (
    -1.60960333262415e-02,
    -2.95459980854025e-03,
    -7.34990630326855e-04,
    -5.69250639462346e-05,
    -2.10102402082508e-06,
    2.77068142495902e-08,
    -2.72614225801306e-10,
)
_ERF_BELOW = (
    -1.42647390514189e-02,
    -7.37332916720468e-03,
    -1.68282697438203e-03,
    -2.13374055278905e-04,
    -1.45660718464996e-05,
)
_TANH_ABOVE = (
    4.89352455891786e-03,
    6.37261928875436e-04,
    1.48572235717979e-05,
    5.12229709037114e-08,
    -8.60467152213735e-11,
    2.00018790482477e-13,
    -2.76076847742355e-16,
)
_TANH_BELOW = (4.89352518554385e-03, 2.26843463243900e-03, 1.18534705686654e-04, 1.19825839466702e-06)
"""Ratios of polynomials in the square of the argument, the numerator times the argument; as in Eigen."""

_LOG = (
    3.3333331174e-1,
    -2.4999993993e-1,
    2.0000714765e-1,
    -1.6668057665e-1,
    1.4249322787e-1,
    -1.2420140846e-1,
    1.1676998740e-1,
    -1.1514610310e-1,
    7.0376836292e-2,
)


def like(x: Any, value: float) -> Any:
    """A constant of the element type and number of lanes of `x`."""
    return tirx.const(value, x.ty.dtype)


def clamp(x: Any, low: float, high: float) -> Any:
    """`x` between two bounds; a NaN stays one."""
    # The order matters: a comparison with NaN is false, and then the second operand is taken.
    return T.min(like(x, high), T.max(like(x, low), x))


def exp(x: Any) -> Any:
    """Natural exponential; about 1 ulp."""

    # exp(x) = 2^n * exp(r) with n whole. Half of 2^n is used, and twice the polynomial: 2^128 has no float.
    def scaled(rounded: Any) -> Any:
        n = rounded - like(x, _ROUNDER)
        rest = x - n * like(x, 0.693359375) + n * like(x, 2.12194440e-4)
        return _bound(rest, lambda r: _polynomial(r, _TWICE_EXP)) * _half_power_of_two(rounded)

    # Bound to a name, or TVM takes the addition and the subtraction of the same number for nothing.
    value = _bound(clamp(x, _LOWEST, _HIGHEST) * like(x, math.log2(math.e)) + like(x, _ROUNDER), scaled)
    return tirx.Select(x < like(x, _LOWEST), like(x, 0.0), value)


def sigmoid(x: Any) -> Any:
    """Logistic function."""
    return like(x, 1.0) / (like(x, 1.0) + exp(like(x, 0.0) - x))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent; relative error below 1e-6."""
    limit = 7.90531110763549805
    return _odd_ratio(clamp(x, -limit, limit), _TANH_ABOVE, _TANH_BELOW)


def erf(x: Any) -> Any:
    """Error function; relative error below 1e-6."""
    return _odd_ratio(clamp(x, -4.0, 4.0), _ERF_ABOVE, _ERF_BELOW)


def log(x: Any) -> Any:
    """Natural logarithm; relative error below 1e-6, minus infinity for zero and for denormal arguments."""
    # Cephes' logf: the mantissa is brought into [sqrt(1/2), sqrt(2)), where a polynomial serves.
    smallest = _whole(x, 0x3F3504F3)

    def value(bits: Any) -> Any:
        n = T.cast(T.shift_right(bits, _whole(x, 23)), x.ty.dtype)
        mantissa = T.reinterpret(x.ty.dtype, T.bitwise_and(bits, _whole(x, 0x007FFFFF)) + smallest)
        return _bound(mantissa - like(x, 1.0), lambda m: series(m) + n * like(x, 0.693359375) + low(n))

    def low(n: Any) -> Any:
        return n * like(x, -2.12194440e-4)

    def series(m: Any) -> Any:
        return m - m * m * like(x, 0.5) + _polynomial(m, _LOG) * m * m * m

    result = _bound(T.reinterpret(_integer(x), x) - smallest, value)
    result = tirx.Select(x < like(x, 2.0**-126), like(x, -math.inf), result)
    result = tirx.Select(x < like(x, 0.0), like(x, math.nan), result)
    return tirx.Select(x < like(x, math.inf), result, x + x)


def rsqrt(x: Any) -> Any:
    """One over the square root."""
    return like(x, 1.0) / T.sqrt(x)


def last(x: Any, count: Any) -> Any:
    """`x` with zeros in all lanes but the last `count`."""
    lanes = x.ty.dtype.lanes
    kept = T.ramp(T.int32(0), 1, lanes) >= T.broadcast(T.int32(lanes) - T.cast(count, "int32"), lanes)
    return tirx.Select(kept, x, like(x, 0.0))


def total(x: Any) -> Any:
    """Sum of the lanes."""
    return _folded(x, lambda a, b: a + b)


def largest(x: Any) -> Any:
    """Greatest of the lanes; one that is NaN may be left out."""
    return _folded(x, T.max)


def _folded(x: Any, combine: Callable[[Any, Any], Any]) -> Any:
    lanes = x.ty.dtype.lanes
    if lanes == 1:
        return x
    low, high = range(lanes // 2), range(lanes // 2, lanes)

    def halves(v: Any) -> Any:
        return combine(tirx.Shuffle([v], list(low)), tirx.Shuffle([v], list(high)))

    return _bound(x, lambda v: _folded(halves(v), combine))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    value = like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        value = value * x + like(x, coefficient)
    return value


def _odd_ratio(x: Any, above: Sequence[float], below: Sequence[float]) -> Any:
    def ratio(value: Any) -> Any:
        square = value * value
        return value * _polynomial(square, above) / _polynomial(square, below)

    return _bound(x, ratio)


def _bound(value: Any, body: Callable[[Any], Any]) -> Any:
    """An expression that names `value`, so that what `body` makes of the name does not repeat it."""
    name = tirx.Var("bound", value.ty.dtype)
    return tirx.Let(name, value, body(name))


def _half_power_of_two(rounded: Any) -> Any:
    """2^(n-1) of n in the low bits of a float, as `_ROUNDER` leaves it."""
    bits = T.shift_left(T.reinterpret(_integer(rounded), rounded), _whole(rounded, 23))
    return T.reinterpret(rounded.ty.dtype, bits + _whole(rounded, 126 << 23))


def _integer(x: Any) -> str:
    """The type of as many int32 as `x` has lanes."""
    return str(x.ty.dtype).replace("float32", "int32")


def _whole(x: Any, value: int) -> Any:
    return tirx.const(value, _integer(x))
