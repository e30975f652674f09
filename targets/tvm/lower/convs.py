"""Float32 convolutions with constant weights become nodes of ours, on images with their channels last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, constant
from onnxcomp.qdq import dequantized_weight
from onnxcomp.rewrite import Context, Edit, Pass, applied, refused
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import conv, depthwise
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.lower._images import enter, image_shape, leave
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed, replace


@dataclass(frozen=True, kw_only=True)
class Convolutions(Pass):
    """Conv of sequences and images whose size is fixed, but for the batch, in the main graph.

    Attributes:
        machine: What weights are packed for.
    """

    name: ClassVar[str] = "tvm_convolutions"
    summary: ClassVar[str] = "Convolutions to kernels, channels last."
    machine: Machine

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        editor = Editor(model)
        edits = []
        for node in list(model.graph):
            if node.domain or node.op_type != "Conv":
                continue
            reason = _reason(node)
            if reason:
                edits.append(refused(node, reason))
                continue
            edits.append(applied(node, "runs as a packed convolution, channels last"))
            self._replace(editor, node)
        return edits

    def _replace(self, editor: Editor, node: ir.Node) -> None:
        x, weight = node.inputs[:2]
        assert x is not None
        assert weight is not None
        assert weight.shape is not None
        shape = image_shape(x)
        assert shape is not None
        n, channels, *_ = (int(d) for d in weight.shape)  # type: ignore[arg-type]
        group = attribute(node, "group", 1)
        window = window_of(node, shape[1:], [int(d) for d in weight.shape[2:]])  # type: ignore[arg-type]
        given = dequantized_weight(node.inputs[2]) if len(node.inputs) > 2 else None
        attributes = described(window)

        integers = [v.producer() for v in node.inputs[1:] if v is not None and v.producer() is not None]
        held = dequantized_weight(weight) if weight.producer() is not None else None

        def values() -> Array:
            array = constant(weight) if held is None else held
            assert array is not None
            return array.reshape(n, channels, *window.kernel)

        single = np.dtype(np.float32)
        name = f"{weight.name}_packed"
        if group > 1 and channels == 1 and n == group:
            size = n * window.kernel[0] * window.kernel[1]
            matrix = packed(editor, name, (size,), single, lambda: depthwise.pack(values()))
            bias = np.zeros(n, np.float32) if given is None else given
        else:
            sizes = conv.choose(self.machine, conv.row_of(window), n // group)
            columns = group * conv.columns(self.machine, sizes, n // group)
            size = columns * channels * window.kernel[0] * window.kernel[1]
            matrix = packed(editor, name, (size,), single, lambda: conv.pack(self.machine, sizes, values(), group))
            bias = conv.pack_bias(self.machine, sizes, given, n, group)
            attributes["panels"] = sizes
        inputs = [enter(editor, node, x), matrix, editor.weight(f"{node.name}_bias", bias)]
        replace(node, "Conv", inputs, {**attributes, "group": group, "n": n})
        leave(editor, node.outputs[0])
        for producer in integers:
            if producer is not None and not any(output.uses() for output in producer.outputs):
                editor.graph.remove(producer, safe=True)


def _reason(node: ir.Node) -> str:
    x, weight, *rest = node.inputs
    if x is None or weight is None or weight.dtype != ir.DataType.FLOAT or x.dtype != ir.DataType.FLOAT:
        return "not a convolution of float32"
    if dequantized_weight(weight) is None or weight.shape is None:
        return "its weight is not constant"
    if rest and rest[0] is not None and dequantized_weight(rest[0]) is None:
        return "its bias is not constant"
    if image_shape(x) is None:
        return "not of a sequence or image of fixed size"
    if node.outputs[0].shape is None:
        return "its output has no known shape"
    return ""


def described(window: Window) -> dict[str, int | list[int]]:
    """The attributes of a node that say what slides."""
    return {
        "kernel_shape": list(window.kernel),
        "strides": list(window.strides),
        "pads": list(window.pads),
        "dilations": list(window.dilations),
    }


def window_of(node: ir.Node, shape: Sequence[int], kernel: Sequence[int]) -> Window:
    """What slides at a Conv or a pooling node.

    Args:
        node: The node.
        shape: Of the input, (C, W) or (C, H, W).
        kernel: Size of the window, as of the input.
    """
    rank = len(shape) - 1
    channels, sizes = shape[0], [1] * (2 - rank) + list(shape[1:])
    kernel = [1] * (2 - rank) + list(kernel)
    strides = [1] * (2 - rank) + list(attribute(node, "strides", [1] * rank))
    dilations = [1] * (2 - rank) + list(attribute(node, "dilations", [1] * rank))
    given = list(attribute(node, "pads", [0] * (2 * rank)))
    before, after = [0] * (2 - rank) + given[:rank], [0] * (2 - rank) + given[rank:]
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto == "VALID":
        before, after = [0, 0], [0, 0]
    elif auto != "NOTSET":
        for axis, size in enumerate(sizes):
            reach = (kernel[axis] - 1) * dilations[axis] + 1
            total = max(0, (-(-size // strides[axis]) - 1) * strides[axis] + reach - size)
            small = total // 2
            before[axis], after[axis] = (small, total - small) if auto == "SAME_UPPER" else (total - small, small)
    return Window(
        height=sizes[0],
        width=sizes[1],
        channels=channels,
        kernel=(kernel[0], kernel[1]),
        strides=(strides[0], strides[1]),
        pads=(before[0], before[1], after[0], after[1]),
        dilations=(dilations[0], dilations[1]),
    )
