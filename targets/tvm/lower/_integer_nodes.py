"""Puts nodes of ours for integers into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor
from onnxcomp.targets.tvm.nodes import WAS, replace

_LAST = (0, 2, 3, 1)
_FIRST = (0, 3, 1, 2)


def insert(
    editor: Editor,
    anchor: ir.Node,
    was: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    *,
    dtype: ir.DataType,
    shape: ir.Shape | None,
) -> ir.Value:
    """A node of ours before `anchor`, in place of `was`, whose name and notes it takes over; returns its output."""
    output = editor.before(anchor, "Identity", inputs, name=f"{was.name}_integer", dtype=dtype)
    node = output.producer()
    assert node is not None
    _note(node, was)
    replace(node, op_type, inputs, attributes)
    output.dtype, output.shape = dtype, shape
    return output


def become(
    node: ir.Node, was: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, Any]
) -> None:
    """Makes `node` one of ours in place; it takes over the notes of `was`, whose work it does."""
    _note(node, was)
    replace(node, op_type, inputs, attributes)


def images(
    editor: Editor,
    node: ir.Node,
    last: ir.Node,
    op_type: str,
    codes: ir.Value,
    constants: Sequence[ir.Value],
    attributes: Mapping[str, Any],
) -> None:
    """Puts a node of ours that has channels last in place of all from `node` to `last`, which becomes a Transpose.

    Args:
        editor: Of the graph.
        node: What the node of ours stands for.
        last: Puts out its result.
        op_type: Of the node of ours.
        codes: Image (B, C, H, W), its first input.
        constants: Its other inputs.
        attributes: Its attributes.
    """
    source = codes
    if "planar" not in attributes:
        source = editor.before(
            last, "Transpose", [codes], name=f"{node.name}_channels_last", attributes={"perm": _LAST}, like=codes
        )
        source.shape = _turned(codes.shape)
    dtype = ir.DataType.from_numpy(np.dtype(attributes["dtype"]))
    found = insert(
        editor,
        last,
        node,
        op_type,
        [source, *constants],
        attributes,
        dtype=dtype,
        shape=_turned(last.outputs[0].shape),
    )
    last.op_type, last.domain = "Transpose", ""
    last.resize_inputs(1)
    last.replace_input_with(0, found)
    last.attributes.clear()
    last.attributes.add(ir.AttrInt64s("perm", _FIRST))


def _turned(shape: ir.Shape | None) -> ir.Shape | None:
    return ir.Shape([shape[axis] for axis in _LAST]) if shape is not None and len(shape) == 4 else None


def _note(node: ir.Node, was: ir.Node) -> None:
    for key, text in was.metadata_props.items():
        node.metadata_props.setdefault(key, text)
    node.metadata_props.setdefault(WAS, was.op_type)
