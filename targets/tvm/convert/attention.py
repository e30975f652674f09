"""Attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.kernels.attention import Layout


def attention(call: Call) -> Expr:
    """`Attention(q, k, v[, mask])`, each (batch, head, row, channel).

    Attributes are `scale`; `swapped`, four flags for q, k, v and the output, which then are (batch, row, head,
    channel); and `grouped`, whether the mask has an axis for heads that share keys, whose rows follow each other in q.
    """
    turned = [bool(flag) for flag in call.attributes["swapped"]]
    layout = Layout(q=turned[0], k=turned[1], v=turned[2], out=turned[3])
    (batch, heads, rows, k_size), (_, _, keys, _) = (_untransposed(call.shape(i), turned[i]) for i in (0, 1))
    v_size = call.shape(2)[3]
    given = list(call.inputs[:3])
    mask: tuple[bool, bool, bool] | None = None
    if len(call.inputs) > 3:
        *leading, row, key = [1] * (2 - len(call.shape(3))) + call.shape(3)
        if leading and call.attributes.get("grouped"):
            leading = leading[:-1]  # heads that share keys have one mask
        leading = [1] * (2 - len(leading)) + leading
        mask = (not _is_one(leading[0]), not _is_one(leading[1]), not _is_one(row))
        given.append(call.reshaped(call.inputs[3], (*leading, row, key)))
    function = call.kernels("attention").attention(
        call.machine,
        heads=heads,
        rows=_fixed(rows),
        keys=_fixed(keys),
        k_size=k_size,
        v_size=v_size,
        scale=float(call.attributes["scale"]),
        layout=layout,
        mask=mask,
    )
    shape = (batch, rows, heads, v_size) if layout.out else (batch, heads, rows, v_size)
    return call.tir(function, given, shape=shape, dtype="float32")


def _untransposed(shape: list[Any], turned: bool) -> list[Any]:
    return [shape[0], shape[2], shape[1], shape[3]] if turned else shape


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


CONVERTERS: Mapping[str, Converter] = {"Attention": attention}
"""Op types that are converted here."""
