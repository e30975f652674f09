"""Nodes that stand for a kernel of ours, and the packed weights that they read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor
from onnxcomp.target import Array

DOMAIN = "onnxcomp.tvm"
"""Domain of these nodes. They live between lowering and import, and are in no file."""

OWN = "onnxcomp.kernel"
"""Attribute of a function in TIR that is ours, and is to be left as it is."""

INSTEAD = "onnxcomp.tvm.instead"
"""Metadata of a node that another kernel than the op's own computes, with the reason."""

WAS = "onnxcomp.tvm.was"
"""Metadata of a node of ours: the op type that it had in the model."""


def replace(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Makes `node` one of ours in place: its name and its outputs stay, its attributes go.

    Args:
        node: The node.
        op_type: A key of `onnxcomp.targets.tvm.convert.CONVERTERS`.
        inputs: New inputs.
        attributes: Integers, floats, strings, or lists of numbers that are not empty.
    """
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    node.metadata_props.setdefault(WAS, node.op_type)
    node.op_type, node.domain = op_type, DOMAIN
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    node.attributes.clear()
    for attribute in ir.convenience.convert_attributes(dict(attributes or {})):
        node.attributes.add(attribute)


def packed(
    editor: Editor, name: str, shape: Sequence[int], dtype: np.dtype[Any], pack: Callable[[], Array]
) -> ir.Value:
    """An initializer that is computed when it is written, so that one weight at a time is in memory twice.

    Args:
        editor: Of the graph that reads it.
        name: Wish for its name.
        shape: What `pack` returns.
        dtype: Likewise.
        pack: Makes the array; called when the artifact is written, maybe more than once.
    """
    value = editor.weight(name, np.zeros((0,) * len(shape), dtype))
    value.shape = ir.Shape(shape)
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(pack()), dtype=ir.DataType.from_numpy(np.dtype(dtype)), shape=value.shape, name=value.name
    )
    return value
