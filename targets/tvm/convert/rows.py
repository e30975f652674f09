"""Softmax and norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr


def softmax(call: Call) -> Expr:
    """`Softmax(x (..., n)[, mask])`, the mask of a shape that spreads to that of x; attribute `scale`."""
    x = call.inputs[0]
    *leading, n = call.shape(0)
    scale = float(call.attributes.get("scale", 1.0))
    mask = call.inputs[1] if len(call.inputs) > 1 else None
    has: tuple[bool, ...] | None = None
    if mask is None:
        outer = [math.prod(leading)]
        given = [call.reshaped(x, (*outer, n))]
    else:
        outer, has = merged(leading, call.shape(1)[:-1])
        shape = [size if own else 1 for size, own in zip(outer, has, strict=True)]
        given = [call.reshaped(x, (*outer, n)), call.reshaped(mask, (*shape, n))]
    function = call.kernels("softmax").softmax(
        call.machine, outer=tuple(map(_fixed, outer)), n=_fixed(n), mask=has, scale=scale
    )
    return call.reshaped(call.tir(function, given, shape=(*outer, n), dtype="float32"), (*leading, n))


def merged(leading: list[Any], mask: list[Any]) -> tuple[list[Any], tuple[bool, ...]]:
    """Axes of one tensor, neighbours joined that a mask has both or has neither of, and which of them it has."""
    sizes: list[Any] = []
    has: list[bool] = []
    for size, own in zip(leading, [1] * (len(leading) - len(mask)) + mask, strict=True):
        present = not (isinstance(own, int) and own == 1)
        if isinstance(size, int) and size == 1:
            continue
        if has and has[-1] == present:
            sizes[-1] = sizes[-1] * size
        else:
            sizes.append(size)
            has.append(present)
    return (sizes, tuple(has)) if sizes else ([1], (False,))


def layer_norm(call: Call) -> Expr:
    """`LayerNorm(x, scale[, bias])` over the axes of the scale; attribute `epsilon`."""
    return _norm(call, centred=True)


def rms_norm(call: Call) -> Expr:
    """`RmsNorm(x, scale)` over the axes of the scale; attribute `epsilon`."""
    return _norm(call, centred=False)


def _norm(call: Call, *, centred: bool) -> Expr:
    shape = call.shape(0)
    # A spelled norm has a scale of the last axis, with leading ones maybe.
    n = math.prod(call.shape(1))
    rows, covered = list(shape), 1
    while rows and covered != n:
        covered *= rows.pop()
    count = math.prod(rows)
    given = [call.reshaped(call.inputs[0], (count, n))]
    given += [call.reshaped(v, (n,)) for v in call.inputs[1:] if v is not None]
    function = call.kernels("norm").norm(
        call.machine,
        rows=_fixed(count),
        n=n,
        epsilon=float(call.attributes["epsilon"]),
        centred=centred,
        bias=len(given) > 2,
    )
    return call.reshaped(call.tir(function, given, shape=(count, n), dtype="float32"), shape)


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


CONVERTERS: Mapping[str, Converter] = {"LayerNorm": layer_norm, "RmsNorm": rms_norm, "Softmax": softmax}
"""Op types that are converted here."""
