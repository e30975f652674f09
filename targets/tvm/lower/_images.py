"""Images with their channels last, as kernels want them: around each node that gets one, Transposes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.edit import Editor, redirect, replace_output, users

TO_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1)}
"""Rank to the order of axes that puts the channels last."""

TO_FIRST = {3: (0, 2, 1), 4: (0, 3, 1, 2)}
"""Rank to the order of axes that puts the channels first."""


def image_shape(value: ir.Value | None) -> list[int | ir.SymbolicDim] | None:
    """Shape (batch, C, ...) of a sequence or image whose dimensions but for the batch are fixed."""
    if value is None or value.shape is None or len(value.shape) not in TO_LAST:
        return None
    if not all(isinstance(d, int) and d > 0 for d in value.shape[1:]):
        return None
    return list(value.shape)


def ordered(value: ir.Value, order: Sequence[int]) -> ir.Shape | None:
    """The shape of `value` after a Transpose."""
    return None if value.shape is None else ir.Shape([value.shape[axis] for axis in order])


def enter(editor: Editor, node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` with its channels last, made before `node`."""
    assert value.shape is not None
    order = TO_LAST[len(value.shape)]
    turned = editor.before(
        node, "Transpose", [value], name=f"{value.name}_last", attributes={"perm": order}, like=value
    )
    turned.shape = ordered(value, order)
    return turned


def leave(editor: Editor, value: ir.Value) -> ir.Value:
    """Notes that `value` has its channels last from now on; what read it reads a Transpose behind it, returned."""
    assert value.shape is not None
    readers, is_output, name = users(value), value.is_graph_output(), value.name
    order = TO_FIRST[len(value.shape)]
    turned = editor.after(value, "Transpose", [value], name=f"{name}_first", attributes={"perm": order}, like=value)
    redirect(value, turned, readers)
    if is_output:
        replace_output(value, turned)
    else:
        editor.rename(value, "last")
        value.name, turned.name = turned.name, name
    value.shape = ordered(value, TO_LAST[len(value.shape)])
    return turned
