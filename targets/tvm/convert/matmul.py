"""Products of two activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr


def matmul(call: Call) -> Expr:
    """`MatMul(x (..., M, K), w (..., K, N))`, attributes `turned` (w is (..., N, K)) and `alpha`, a factor."""
    turned = bool(call.attributes["turned"])
    *x_batch, m, k = call.shape(0)
    *w_batch, n, _ = call.shape(1) if turned else [*call.shape(1)[:-2], *reversed(call.shape(1)[-2:])]
    batch = _broadcast(x_batch, w_batch)
    outer, x_has, w_has = _merged(batch, x_batch, w_batch)
    if len(outer) == 1 and not w_has[0] and x_has[0]:  # all rows see one matrix
        outer, x_has, w_has, rows = [1], [True], [True], outer[0] * m
    else:
        rows = m
    function = call.kernels("matmul").matmul(
        call.machine,
        outer=tuple(map(_fixed, outer)),
        x_has=tuple(x_has),
        w_has=tuple(w_has),
        rows=_fixed(rows),
        k=_fixed(k),
        n=_fixed(n),
        turned=turned,
        alpha=float(call.attributes["alpha"]),
    )
    w_shape = (n, k) if turned else (k, n)
    given = [
        call.reshaped(call.inputs[0], (*_present(outer, x_has), rows, k)),
        call.reshaped(call.inputs[1], (*_present(outer, w_has), *w_shape)),
    ]
    return call.reshaped(call.tir(function, given, shape=(*outer, rows, n), dtype="float32"), (*batch, m, n))


def _broadcast(x: list[Any], w: list[Any]) -> list[Any]:
    rank = max(len(x), len(w))
    return [b if _is_one(a) else a for a, b in zip(_padded(x, rank), _padded(w, rank), strict=True)]


def _merged(batch: list[Any], x: list[Any], w: list[Any]) -> tuple[list[Any], list[bool], list[bool]]:
    """Axes of the batch, neighbours joined that the same operands have, and which of them each operand has."""
    outer: list[Any] = []
    has: list[tuple[bool, bool]] = []
    for size, a, b in zip(batch, _padded(x, len(batch)), _padded(w, len(batch)), strict=True):
        if _is_one(size):
            continue
        own = (not _is_one(a), not _is_one(b))
        if has and has[-1] == own:
            outer[-1] = outer[-1] * size
        else:
            outer.append(size)
            has.append(own)
    if not outer:
        return [1], [True], [True]
    return outer, [a for a, _ in has], [b for _, b in has]


def _present(outer: list[Any], has: list[bool]) -> list[Any]:
    return [size if own else 1 for size, own in zip(outer, has, strict=True)]


def _padded(shape: list[Any], rank: int) -> list[Any]:
    return [1] * (rank - len(shape)) + shape


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


CONVERTERS: Mapping[str, Converter] = {"MatMul": matmul}
"""Op types that are converted here."""
