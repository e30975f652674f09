"""Layers of streaming convolutional models, from the native library's ops to nodes of ours.

Ours have the inputs of the native ops up to `last`, then `started` and `step`, one value a channel, or one that is not
used. The threshold is an attribute. Maps are (N, H, W, C), and masks (N, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute
from onnxcomp.targets.ort import delta_layers as codes
from onnxcomp.targets.tvm.kernels import delta_conv, delta_depthwise
from onnxcomp.targets.tvm.lower.sparse import known
from onnxcomp.targets.tvm.nodes import packed, replace

_ACTIVATIONS = {
    codes.RELU: "relu",
    codes.CLIP: "clip",
    codes.LEAKY: "leaky_relu",
    codes.SIGMOID: "sigmoid",
    codes.SILU: "silu",
    codes.HARD_SIGMOID: "hard_sigmoid",
    codes.HARD_SWISH: "hard_swish",
}
_WINDOW = (("stride", 1), ("dilation", 1), ("pad", 0))
_COMMON = 4
"""Inputs behind those of a layer of its own: last, started, threshold, step."""


def replace_map_op(editor: Editor, node: ir.Node) -> None:
    """Makes a node of the native library, one of `MAP_OPS`, one of ours in place."""
    own, (last, started, threshold, step) = list(node.inputs[:-_COMMON]), node.inputs[-_COMMON:]
    assert last is not None
    assert threshold is not None
    assert step is not None
    assert last.shape is not None
    channels = int(last.shape.numpy()[3])
    steps = known(step).astype(np.float32)
    rounds = bool((steps > 0).any())
    if rounds or steps.size > 1:
        steps = np.broadcast_to(steps, channels).copy() if rounds else steps[:1]
        step = editor.weight(f"{node.name}_steps", steps)
    op_type, inputs, attributes = MAP_OPS[node.op_type](editor, node, own)
    attributes |= {"threshold": float(known(threshold).item()), "rounds": int(rounds)}
    if code := attribute(node, "activation", 0):
        attributes["activation"] = _ACTIVATIONS[code]
        attributes |= {name: float(attribute(node, name, 0.0)) for name in ("alpha", "beta")}
    replace(node, op_type, [*inputs, last, started, step], attributes)


_Replaced = tuple[str, list[ir.Value | None], dict[str, Any]]


def _conv(editor: Editor, node: ir.Node, own: list[ir.Value | None]) -> _Replaced:
    x, mask, weight, bias = own
    assert weight is not None
    assert weight.shape is not None
    assert bias is not None
    group = int(attribute(node, "group", 1))
    high, wide, inner, n = (int(d) for d in weight.shape.numpy())
    attributes: dict[str, Any] = {**_window(node), "kernel_h": high, "kernel_w": wide}
    name, given, single = f"{weight.name}_panels", known(bias).astype(np.float32), np.dtype(np.float32)
    if inner == 1 and group == n:
        matrix = packed(editor, name, (high * wide * n,), single, lambda: delta_depthwise.pack(known(weight)))
        return "DeltaDepthwise", [x, mask, matrix, bias], attributes
    size = int(np.prod(delta_conv.packed_shape(high * wide * inner, n, group)))
    matrix = packed(editor, name, (size,), single, lambda: delta_conv.pack(known(weight), group))
    filled = editor.weight(f"{node.name}_bias", delta_conv.pack_bias(given, group))
    return "DeltaConv", [x, mask, matrix, filled], {**attributes, "group": group}


def _pool(_: Editor, node: ir.Node, own: list[ir.Value | None]) -> _Replaced:
    attributes = _window(node)
    attributes |= {name: int(attribute(node, name)) for name in ("kernel_h", "kernel_w")}
    attributes["largest"] = int(attribute(node, "kind", 0) == 0)
    attributes["counts_pads"] = int(attribute(node, "count_include_pad", 0))
    return "DeltaPool", own, attributes


def _global_pool(_: Editor, node: ir.Node, own: list[ir.Value | None]) -> _Replaced:
    return "DeltaGlobalPool", own, {"largest": int(attribute(node, "kind", 0) == 0)}


def _slice(_: Editor, node: ir.Node, own: list[ir.Value | None]) -> _Replaced:
    return "DeltaUnary", own, {"begin": int(attribute(node, "begin", 0))}


def _same(_: Editor, node: ir.Node, own: list[ir.Value | None]) -> _Replaced:
    return node.op_type, own, {}


def _window(node: ir.Node) -> dict[str, Any]:
    found = {
        f"{name}_{axis}": int(attribute(node, f"{name}_{axis}", missing)) for name, missing in _WINDOW for axis in "hw"
    }
    top, left = (int(attribute(node, name, 0)) for name in ("pad_top", "pad_left"))
    return {**found, "pad_h": top, "pad_w": left}


MAP_OPS: dict[str, Callable[[Editor, ir.Node, list[ir.Value | None]], _Replaced]] = {
    "DeltaConv": _conv,
    "DeltaPool": _pool,
    "DeltaGlobalPool": _global_pool,
    "DeltaSlice": _slice,
    **dict.fromkeys(("DeltaEnter", "DeltaUnary", "DeltaAdd", "DeltaMul", "DeltaConcat", "DeltaResize"), _same),
}
"""Op type of the native library to what it becomes: op type, inputs of its own, attributes."""
