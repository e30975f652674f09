"""Concatenation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr


def concat(call: Call) -> Expr:
    """`Concat(a, b)`, attribute `axis`, from the front."""
    axis = int(call.attributes["axis"])
    first, second = call.shape(0), call.shape(1)
    rows = math.prod(first[:axis])
    columns = [math.prod(shape[axis:]) for shape in (first, second)]
    kernels = call.kernels("concat")
    function = kernels.concat(call.machine, rows=_fixed(rows), first=_fixed(columns[0]), second=_fixed(columns[1]))
    given = [call.reshaped(call.inputs[i], (rows, columns[i])) for i in (0, 1)]
    joined = call.tir(function, given, shape=(rows, columns[0] + columns[1]), dtype="float32")
    return call.reshaped(joined, (*first[:axis], first[axis] + second[axis], *first[axis + 1 :]))


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


CONVERTERS: Mapping[str, Converter] = {"Concat": concat}
"""Op types that are converted here."""
