"""Turns the patch embedding of a vision transformer, a Conv whose kernel equals its stride, into a MatMul."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, users
from onnxcomp.rewrite import Edit, applied
from onnxcomp.select import Select

_TOKENS = ("Reshape", "Flatten", "Transpose", "Squeeze", "Shape")


def patches_to_matmul(model: ir.Model, where: Select) -> list[Edit]:
    """Rewrites every such Conv of the main graph whose output is only turned into tokens.

    Patches do not overlap, so the Conv is a linear layer on cut-out patches. As a MatMul its output need not be
    quantized for an integer kernel to exist, which matters where token embeddings have outlier channels.
    """
    editor = Editor(model)
    return [edit for node in list(model.graph) if (edit := _rewrite(editor, node, where)) is not None]


def _rewrite(editor: Editor, conv: ir.Node, where: Select) -> Edit | None:
    if conv.op_type != "Conv" or conv.domain != "" or not where(conv):
        return None
    image, weight = conv.inputs[0], constant(conv.inputs[1])
    if image is None or weight is None or weight.ndim != 4 or image.shape is None or len(image.shape) != 4:
        return None
    size = _static(image.shape[1:])
    kernel = weight.shape[2:]
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if (
        size is None
        or min(kernel) < 2
        or tuple(attribute(conv, "strides", (1, 1))) != kernel
        or any(attribute(conv, "pads", ()) or ())
        or attribute(conv, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        or tuple(attribute(conv, "dilations", (1, 1))) != (1, 1)
        or attribute(conv, "group", 1) != 1
        or (len(conv.inputs) > 2 and bias is None)
        or {n.op_type for n in users(conv.outputs[0])} - set(_TOKENS)
        or not users(conv.outputs[0])
        or conv.outputs[0].is_graph_output()
    ):
        return None
    channels, height, width = size
    rows, columns = height // kernel[0], width // kernel[1]
    name = conv.name or "patches"
    value = image
    if (rows * kernel[0], columns * kernel[1]) != (height, width):
        return None  # the Conv drops a border, which a reshape cannot
    cut = np.array([-1, channels, rows, kernel[0], columns, kernel[1]], np.int64)
    value = editor.before(conv, "Reshape", [value, editor.weight(f"{name}_cut", cut)], name=f"{name}_patches")
    value = editor.before(conv, "Transpose", [value], name=f"{name}_order", attributes={"perm": [0, 2, 4, 1, 3, 5]})
    flat = np.array([-1, rows * columns, weight[0].size], np.int64)
    value = editor.before(conv, "Reshape", [value, editor.weight(f"{name}_flat", flat)], name=f"{name}_rows")
    _typed(value, image, [image.shape[0], rows * columns, weight[0].size])
    matrix = editor.weight(f"{name}_weight", np.ascontiguousarray(weight.reshape(len(weight), -1).T))
    value = editor.before(conv, "MatMul", [value, matrix], name=f"{name}_matmul")
    _typed(value, image, [image.shape[0], rows * columns, len(weight)])
    if bias is not None:
        value = editor.before(conv, "Add", [value, editor.weight(f"{name}_bias", bias)], name=f"{name}_add", like=value)
    _read_tokens(conv.outputs[0], value, [image.shape[0], len(weight), rows * columns])
    value = editor.before(conv, "Transpose", [value], name=f"{name}_nchw", attributes={"perm": [0, 2, 1]})
    grid = editor.weight(f"{name}_grid", np.array([-1, len(weight), rows, columns], np.int64))
    value = editor.before(conv, "Reshape", [value, grid], name=f"{name}_image", like=conv.outputs[0])
    output = conv.outputs[0]
    ir.convenience.replace_all_uses_with(output, value)
    editor.graph.remove(conv, safe=True)
    return applied(conv, "patch embedding written as a MatMul")


def _read_tokens(image: ir.Value, tokens: ir.Value, flat: Sequence[int | ir.SymbolicDim]) -> None:
    """Where an image is flattened to the shape `flat` and transposed, the tokens are read as they are."""
    for reshape in users(image):
        if reshape.op_type != "Reshape" or attribute(reshape, "allowzero", 0):
            continue
        wanted = constant(reshape.inputs[1])
        if wanted is None or len(wanted) != len(flat) or wanted[-1] == 0 or (wanted == -1).sum() > 1:
            continue
        if any(size not in (0, known) for size, known in zip(wanted.tolist(), flat, strict=True) if size != -1):
            continue
        for node in users(reshape.outputs[0]):
            if node.op_type == "Transpose" and tuple(attribute(node, "perm", ())) == (0, 2, 1):
                redirect(node.outputs[0], tokens, users(node.outputs[0]))


def _static(dims: Sequence[int | ir.SymbolicDim]) -> tuple[int, ...] | None:
    return tuple(d for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None


def _typed(value: ir.Value, like: ir.Value, dims: Sequence[int | ir.SymbolicDim]) -> None:
    if like.dtype is not None:
        value.dtype = like.dtype
    value.shape = ir.Shape(dims)
