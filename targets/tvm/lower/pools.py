"""Pooling becomes nodes of ours, on images with their channels last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant, redirect, replace_output, users
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.targets.tvm import nodes
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.lower._images import enter, image_shape, leave
from onnxcomp.targets.tvm.lower.convs import described, window_of

_MODES = {
    "MaxPool": "max",
    "AveragePool": "mean",
    "GlobalMaxPool": "max",
    "GlobalAveragePool": "mean",
    "ReduceMean": "mean",
    "ReduceMax": "max",
}


@dataclass(frozen=True, kw_only=True)
class Pools(Pass):
    """MaxPool, AveragePool, the global ones, and ReduceMean and ReduceMax over all of an image, in the main graph."""

    name: ClassVar[str] = "tvm_pools"
    summary: ClassVar[str] = "Pooling to kernels, channels last."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        editor = Editor(model)
        edits = []
        for node in list(model.graph):
            if node.domain or node.op_type not in _MODES:
                continue
            x = node.inputs[0]
            shape = image_shape(x)
            reduces = node.op_type.startswith("Reduce")
            if reduces and (shape is None or not _over_image(node, len(shape))):
                continue
            reason = _reason(node, shape)
            if reason:
                edits.append(refused(node, reason))
                continue
            assert x is not None
            assert shape is not None
            edits.append(applied(node, "pools with channels last"))
            sizes = [int(d) for d in shape[1:]]  # type: ignore[arg-type]
            attributes: dict[str, object] = {"mode": _MODES[node.op_type]}
            if node.op_type in ("MaxPool", "AveragePool"):
                window = window_of(node, sizes, attribute(node, "kernel_shape"))
                if attribute(node, "count_include_pad", 0) and any(window.pads):
                    attributes["counted"] = list(window.pads)
                window = _reaching(node, window)
            else:
                high, wide = [1, *sizes[1:]][-2:]
                window = Window(height=high, width=wide, channels=sizes[0], kernel=(high, wide))
            attributes |= described(window)
            if reduces and not attribute(node, "keepdims", 1):
                _flatten_behind(editor, node, shape)
            nodes.replace(node, "Pool", [enter(editor, node, x)], attributes)
            leave(editor, node.outputs[0])
        return edits


def _reason(node: ir.Node, shape: Sequence[int | ir.SymbolicDim] | None) -> str:
    if shape is None or node.outputs[0].shape is None:
        return "not of a sequence or image of fixed size"
    assert node.inputs[0] is not None
    if len(node.outputs) > 1:
        return "its indices are read"
    kinds = [ir.DataType.FLOAT]
    if node.op_type == "MaxPool":
        kinds += [ir.DataType.INT8, ir.DataType.UINT8]
    return "" if node.inputs[0].dtype in kinds else "not of float32"


def _over_image(node: ir.Node, rank: int) -> bool:
    """Whether a reduction is over height and width."""
    axes = attribute(node, "axes")
    if axes is None and len(node.inputs) > 1:
        axes = constant(node.inputs[1])
    return axes is not None and sorted(int(axis) % rank for axis in axes) == list(range(2, rank))


def _reaching(node: ir.Node, window: Window) -> Window:
    """The window with pads at the end for those outputs that `ceil_mode` adds."""
    if not attribute(node, "ceil_mode", 0):
        return window
    pads = list(window.pads)
    for axis, size in enumerate((window.height, window.width)):
        reach, stride = (window.kernel[axis] - 1) * window.dilations[axis] + 1, window.strides[axis]
        outputs = -(-(size + pads[axis] + pads[axis + 2] - reach) // stride) + 1
        if (outputs - 1) * stride >= size + pads[axis]:
            outputs -= 1
        pads[axis + 2] = max(pads[axis + 2], (outputs - 1) * stride + reach - size - pads[axis])
    return replace(window, pads=(pads[0], pads[1], pads[2], pads[3]))


def _flatten_behind(editor: Editor, node: ir.Node, shape: Sequence[int | ir.SymbolicDim]) -> None:
    """Keeps the reduced axes at `node` and drops them behind it."""
    output = node.outputs[0]
    batch, channels = shape[:2]
    readers, is_output = users(output), output.is_graph_output()
    target = editor.weight(f"{node.name}_shape", np.array([batch if isinstance(batch, int) else -1, channels]))
    flat = editor.after(output, "Reshape", [output, target], name=f"{output.name}_flat", like=output)
    redirect(output, flat, readers)
    if is_output:
        replace_output(output, flat)
    else:
        output.name, flat.name = flat.name, output.name
    output.shape = ir.Shape([batch, channels] + [1] * (len(shape) - 2))
