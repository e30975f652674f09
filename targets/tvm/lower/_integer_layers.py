"""Convolutions and products of quantized tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import Editor, attribute, sole_reader
from onnxcomp.target import Array
from onnxcomp.targets.tvm.kernels import int8_conv, int8_depthwise, int8_dot
from onnxcomp.targets.tvm.kernels._int8_block import Panels
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.lower import _integer_reading as reading
from onnxcomp.targets.tvm.lower._integer_nodes import become, images
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import packed

_FEW = 4
"""Channels up to which a convolution reads an image from outside as it is, channels first."""


def conv(editor: Editor, node: ir.Node, machine: Machine) -> str | None:
    """Makes a Conv of a quantized image and a quantized weight a node of ours.

    Returns:
        Why not; None if it was done; empty if it is not quantized.
    """
    x, weight = reading.source(node.inputs[0]), reading.weight(node.inputs[1])
    if x is None or weight is None:
        return ""
    integers = weight.load()
    if weight.axis not in (None, 0):
        return "its weight is not quantized by output channel"
    sizes = _sizes(node.inputs[0])
    if integers.ndim != 4 or sizes is None:
        return "it does not work on images of a fixed size"
    outputs, inputs = integers.shape[:2]
    group, channels = attribute(node, "group", 1), sizes[0]
    deep = group > 1 and group == channels == outputs and inputs == 1
    if group > 1 and not deep:
        return "groups of more than one channel have no kernel"
    if deep and integers.shape[2] > int8_depthwise.HIGHEST:
        return "its window is too high"
    window = _window(node, sizes, integers.shape[2:])
    scale = np.asarray(x.scale * weight.scale, np.float32)
    sink = reading.sink(node.outputs[0])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero = int8_dot.zero_point(machine, x.dtype, x.zero)
    start = -zero * integers.sum(axis=(1, 2, 3), dtype=np.int64)
    ended = _ended(given, scale, start, sink, outputs)
    if ended is None:
        return "its bias is not constant"
    offset, factor, added, attributes = ended
    if deep:
        kind = "QDepthwise"
        shape: tuple[int, ...] = int8_depthwise.packed_shape(machine, window, channels)
        tables = (
            int8_depthwise.pack_offset(machine, offset),
            int8_depthwise.pack_affine(machine, channels, factor, added),
        )

        def pack() -> Array:
            return int8_depthwise.pack(machine, window, weight.load())
    else:
        kind = "QConv"
        attributes["n"] = outputs
        panels = Panels(machine=machine, n=outputs)
        shape = panels.shape(int8_conv.rows(window, channels))
        tables = (panels.offset(offset), panels.affine(factor, added))

        def pack() -> Array:
            return panels.pack(int8_conv.matrix(window, weight.load()))

    attributes |= {
        "x_zero": x.zero,
        "kernel": window.kernel,
        "strides": window.strides,
        "pads": window.pads,
        "dilations": window.dilations,
    }
    if not deep and 1 < channels <= _FEW and _from_outside(x.codes):
        attributes["planar"] = 1
    last = sink.last if sink is not None else node
    name = str(node.name)
    constants = [
        packed(editor, f"{name}_weight", shape, np.dtype(np.int8), pack),
        editor.weight(f"{name}_offset", tables[0]),
        editor.weight(f"{name}_affine", tables[1]),
    ]
    images(editor, node, last, kind, x.codes, constants, attributes)
    return None


def product(editor: Editor, node: ir.Node, machine: Machine) -> str | None:
    """Makes a MatMul or Gemm of quantized rows and a quantized matrix a node of ours; returns what `conv` returns."""
    x, weight = reading.source(node.inputs[0]), reading.weight(node.inputs[1])
    if x is None or weight is None:
        return ""
    gemm = node.op_type == "Gemm"
    if gemm and (attribute(node, "transA", 0) or attribute(node, "alpha", 1.0) != 1.0):
        return "it transposes or scales what it multiplies"
    turned = gemm and bool(attribute(node, "transB", 0))
    matrix = weight.load()
    if matrix.ndim != 2 or weight.axis not in (None, 0 if turned else 1):
        return "its weight is no matrix that is quantized by column"
    matrix = matrix.T if turned else matrix
    k, n = matrix.shape
    scale = np.asarray(x.scale * weight.scale, np.float32)
    given, last = node.inputs[2] if gemm and len(node.inputs) > 2 else None, node
    if given is not None and attribute(node, "beta", 1.0) != 1.0:
        return "it scales its bias"
    if not gemm and (reader := sole_reader(node.outputs[0])) is not None and (not reader.domain):
        other = next((v for v in reader.inputs if v is not node.outputs[0]), None)
        if reader.op_type == "Add" and reading.float_bias(other, n) is not None and _keeps_rank(node, other):
            given, last = other, reader
    sink = reading.sink(last.outputs[0])
    zero = int8_dot.zero_point(machine, x.dtype, x.zero)
    start = -zero * matrix.sum(axis=0, dtype=np.int64)
    ended = _ended(given, scale, start, sink, n)
    if ended is None:
        return "its bias is not constant"
    offset, factor, added, attributes = ended
    if sink is None:
        last, factor, added = _folded(last, factor, added, n)
    panels = Panels(machine=machine, n=n)

    def pack() -> Array:
        array = weight.load()
        wide = np.zeros((-(-k // 4) * 4, n), np.int8)
        wide[:k] = array.T if turned else array
        return panels.pack(wide)

    name = str(node.name)
    inputs = [
        x.codes,
        packed(editor, f"{name}_weight", panels.shape(k), np.dtype(np.int8), pack),
        editor.weight(f"{name}_offset", panels.offset(offset)),
        editor.weight(f"{name}_affine", panels.affine(factor, added)),
    ]
    become(sink.last if sink is not None else last, node, "QGemm", inputs, {"n": n} | attributes)
    return None


def _from_outside(codes: ir.Value) -> bool:
    """Whether an image comes from the caller: then its channels are first, whatever other nodes want."""
    node = codes.producer()
    if node is not None and node.op_type == "QuantizeLinear":
        return node.inputs[0] is not None and node.inputs[0].is_graph_input()
    return codes.is_graph_input()


def _ended(
    given: ir.Value | None, scale: Array, start: Array, sink: reading.Sink | None, size: int
) -> tuple[Array, Array, Array | None, dict[str, Any]] | None:
    """Offset, scale and bias of sums, and the attributes of the output."""
    if sink is None:
        added = None if given is None else reading.float_bias(given, size)
        if given is not None and added is None:
            return None
        return start, scale, added, {"dtype": "float32"}
    whole = reading.bias(given, scale, size)
    if whole is None:
        return None
    return start + whole, scale / sink.scale, None, dict(sink.attributes)


def _folded(last: ir.Node, scale: Array, bias: Array | None, n: int) -> tuple[ir.Node, Array, Array | None]:
    """Takes constant factors and addends of columns behind floats into scale and bias."""
    while (reader := sole_reader(last.outputs[0])) is not None and not reader.domain:
        if reader.op_type not in ("Add", "Mul") or reading.sink(last.outputs[0]) is not None:
            break
        other = next((v for v in reader.inputs if v is not last.outputs[0]), None)
        found = reading.float_bias(other, n)
        if found is None or not _keeps_rank(last, other):
            break
        if reader.op_type == "Add":
            bias = found if bias is None else bias + found
        else:
            scale = np.broadcast_to(scale, (n,)) * found
            bias = None if bias is None else bias * found
        last = reader
    return last, scale, bias


def _sizes(value: ir.Value | None) -> tuple[int, int, int] | None:
    """Channels, height and width of an image."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 4 or not all(isinstance(d, int) for d in shape[1:]):
        return None
    channels, high, wide = (int(d) for d in shape[1:])  # type: ignore[arg-type]
    return channels, high, wide


def _window(node: ir.Node, sizes: tuple[int, int, int], kernel: Sequence[int]) -> Window:
    high, wide = (int(k) for k in kernel)
    strides = tuple(attribute(node, "strides", (1, 1)))
    dilations = tuple(attribute(node, "dilations", (1, 1)))
    pads = tuple(attribute(node, "pads", (0, 0, 0, 0)))
    automatic = attribute(node, "auto_pad", "NOTSET")
    if automatic == "VALID":
        pads = (0, 0, 0, 0)
    elif automatic.startswith("SAME"):
        before, after = [], []
        for size, k, stride, dilation in zip(sizes[1:], (high, wide), strides, dilations, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size)
            less, more = total // 2, total - total // 2
            before.append(less if automatic == "SAME_UPPER" else more)
            after.append(more if automatic == "SAME_UPPER" else less)
        pads = (*before, *after)
    return Window(size=sizes[1:], kernel=(high, wide), strides=strides, pads=pads, dilations=dilations)


def _keeps_rank(node: ir.Node, other: ir.Value | None) -> bool:
    """Whether a bias has no more dimensions than what it is added to."""
    mine, theirs = node.outputs[0].shape, other.shape if other is not None else None
    return mine is not None and theirs is not None and len(theirs) <= len(mine)
