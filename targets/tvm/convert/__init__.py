"""Converters: a node of ours becomes a call of a kernel."""

from __future__ import annotations

from collections.abc import Mapping

from onnxcomp.targets.tvm.convert import (
    activations,
    attention,
    concat,
    convs,
    delta,
    delta_maps,
    integers,
    matmul,
    products,
    recurrent,
    rows,
    sparse,
)
from onnxcomp.targets.tvm.convert._call import Converter

CONVERTERS: Mapping[str, Converter] = {
    **products.CONVERTERS,
    **convs.CONVERTERS,
    **rows.CONVERTERS,
    **activations.CONVERTERS,
    **attention.CONVERTERS,
    **matmul.CONVERTERS,
    **concat.CONVERTERS,
    **sparse.CONVERTERS,
    **integers.CONVERTERS,
    **delta.CONVERTERS,
    **delta_maps.CONVERTERS,
    **recurrent.CONVERTERS,
}
"""Op type in the domain `onnxcomp.tvm` to its converter."""
