"""Which ops the kernels for changed pixels compute, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from onnxcomp.edit import attribute, constant
from onnxcomp.target import Array
from onnxcomp.targets.ort.delta_maps import Layer, Maps, channels, is_map

RELU, CLIP, LEAKY, SIGMOID, SILU, HARD_SIGMOID, HARD_SWISH = 1, 2, 3, 4, 5, 6, 7
_MOST_TAPS = 1024


def layers(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    """The layers that compute the outputs of a node, in order; none if no kernel does."""
    reader = _READERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if reader is None or not all(is_map(v) for v in node.outputs):
        return ()
    return reader(node, maps)


def _conv(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x, w = node.inputs[0], node.inputs[1]
    b = node.inputs[2] if len(node.inputs) > 2 else None
    if x is None or w is None or x not in maps or w.shape is None or len(w.shape) != 4 or constant(w) is None:
        return ()
    size = [int(d) for d in w.shape if isinstance(d, int)]
    window = _window(node, x, size[2:])
    if window is None or (b is not None and constant(b) is None) or size[2] * size[3] > _MOST_TAPS:
        return ()

    def weight() -> Array:
        return np.ascontiguousarray(_known(w).transpose(2, 3, 1, 0))

    def bias() -> Array:
        return np.zeros(size[0], np.float32) if b is None else _known(b)

    shape = size[2], size[3], size[1], size[0]
    return (
        Layer(
            node.outputs[0], "DeltaConv", (x,),
            ((f"{w.name}_pixels", weight, shape), (f"{w.name}_bias", bias, (size[0],))),
            {**window, "group": int(attribute(node, "group", 1))},
        ),
    )  # fmt: skip


def _pool(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    kernel = [int(k) for k in attribute(node, "kernel_shape", ())]
    if x is None or x not in maps or len(node.outputs) != 1 or len(kernel) != 2 or attribute(node, "ceil_mode", 0):
        return ()
    window = _window(node, x, kernel)
    if window is None or max(kernel) > _MOST_TAPS:
        return ()
    attributes = {
        **window,
        "kind": int(node.op_type == "AveragePool"),
        "kernel_h": kernel[0],
        "kernel_w": kernel[1],
        "count_include_pad": int(attribute(node, "count_include_pad", 0)),
    }
    return (Layer(node.outputs[0], "DeltaPool", (x,), (), attributes),)


def _window(node: ir.Node, x: ir.Value, kernel: Sequence[int]) -> dict[str, int] | None:
    """Strides, padding and dilations; None if they are not what a kernel takes."""
    strides, dilations = (list(attribute(node, name, (1, 1))) for name in ("strides", "dilations"))
    pads = [int(p) for p in attribute(node, "pads", (0, 0, 0, 0))]
    auto = attribute(node, "auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, k, s, d in zip(channels(x)[2:], kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            pads.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
    elif auto not in ("NOTSET", "VALID"):
        return None
    if auto == "VALID":
        pads = [0, 0]
    if min(pads, default=0) < 0:
        return None
    sizes = zip(channels(x)[2:], channels(node.outputs[0])[2:], strides, pads, strict=False)
    if any((out - 1) * int(stride) - pad >= size for size, out, stride, pad in sizes):
        return None  # padding alone fills a window, which the kernels take for a mistake
    return {
        "stride_h": int(strides[0]), "stride_w": int(strides[1]), "pad_top": pads[0], "pad_left": pads[1],
        "dilation_h": int(dilations[0]), "dilation_w": int(dilations[1]),
    }  # fmt: skip


def _global_pool(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    if x is None or x not in maps:
        return ()
    if node.op_type == "ReduceMean":
        given = constant(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        axes = sorted(int(a) % 4 for a in (() if given is None else np.ravel(given)))
        if axes != [2, 3] or not attribute(node, "keepdims", 1):
            return ()
    return (Layer(node.outputs[0], "DeltaGlobalPool", (x,), (), {"kind": int(node.op_type != "GlobalMaxPool")}),)


def _binary(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    a, b = node.inputs[0], node.inputs[1]
    if a is None or b is None:
        return ()
    if node.op_type == "Mul" and (silu := _silu(node, maps)) is not None:
        return (silu,)
    if a not in maps or b not in maps:
        return ()
    first, second = channels(a), channels(b)
    if first != second:
        if first[2:] == (1, 1):
            a, b, first, second = b, a, second, first
        if second != (*first[:2], 1, 1):
            return ()
    return (Layer(node.outputs[0], f"Delta{node.op_type}", (a, b)),)


def _silu(node: ir.Node, maps: Maps) -> Layer | None:
    """A value times its sigmoid."""
    for x, gate in (node.inputs, node.inputs[::-1]):
        producer = None if gate is None else gate.producer()
        if x is None or producer is None or producer.op_type != "Sigmoid" or producer.inputs[0] is not x:
            continue
        if x in maps:
            return _activated(node, x, maps, SILU)
    return None


def _activation(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    if x is None or x not in maps:
        return ()
    alpha, beta = 0.0, 0.0
    code = {"Relu": RELU, "Sigmoid": SIGMOID, "HardSwish": HARD_SWISH, "LeakyRelu": LEAKY, "Clip": CLIP}.get(
        node.op_type, HARD_SIGMOID
    )
    if code == CLIP:
        limits = [node.inputs[i] if len(node.inputs) > i else None for i in (1, 2)]
        given = [constant(v) for v in limits]
        if any(v is not None and g is None for v, g in zip(limits, given, strict=True)):
            return ()
        alpha = float(attribute(node, "min", -np.inf)) if given[0] is None else float(given[0])
        beta = float(attribute(node, "max", np.inf)) if given[1] is None else float(given[1])
    elif code == LEAKY:
        alpha = float(attribute(node, "alpha", 0.01))
    elif code == HARD_SIGMOID:
        alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    return (_activated(node, x, maps, code, alpha, beta),)


def _activated(node: ir.Node, x: ir.Value, maps: Maps, code: int, alpha: float = 0.0, beta: float = 0.0) -> Layer:
    before = maps.layers.get(x)
    takes = before is not None and before.op in ("DeltaConv", "DeltaAdd", "DeltaMul")
    if before is not None and takes and not before.activated:
        return before.with_activation(node.outputs[0], code, alpha, beta)
    return Layer(node.outputs[0], "DeltaUnary", (x,)).with_activation(node.outputs[0], code, alpha, beta)


def _concat(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    if int(attribute(node, "axis", 1)) % 4 != 1 or len(node.inputs) < 2 or any(v not in maps for v in node.inputs):
        return ()
    return (Layer(node.outputs[0], "DeltaConcat", tuple(v for v in node.inputs if v is not None)),)


def _split(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    if x is None or x not in maps or int(attribute(node, "axis", 0)) % 4 != 1:
        return ()
    found, begin = [], 0
    for output in node.outputs:
        found.append(Layer(output, "DeltaSlice", (x,), (), {"begin": begin}))
        begin += channels(output)[1]
    return found if begin == channels(x)[1] else ()


def _slice(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    given = [constant(v) for v in node.inputs[1:]]
    if x is None or x not in maps or len(given) not in (3, 4) or any(g is None for g in given):
        return ()
    starts, ends, axes = (np.ravel(_some(g)) for g in given[:3])
    steps = np.ravel(_some(given[3])) if len(given) == 4 else np.ones(1)
    if len(starts) != 1 or int(axes[0]) % 4 != 1 or int(steps[0]) != 1:
        return ()
    begin = int(starts[0]) + (channels(x)[1] if starts[0] < 0 else 0)
    del ends  # the shape of the output tells
    return (Layer(node.outputs[0], "DeltaSlice", (x,), (), {"begin": begin}),)


def _resize(node: ir.Node, maps: Maps) -> Sequence[Layer]:
    x = node.inputs[0]
    way = (
        attribute(node, "coordinate_transformation_mode", "half_pixel"),
        attribute(node, "nearest_mode", "round_prefer_floor"),
    )
    if x is None or x not in maps or attribute(node, "mode", "nearest") != "nearest":
        return ()
    before, after = channels(x), channels(node.outputs[0])
    if before[:2] != after[:2] or after[2] % before[2] or after[3] % before[3]:
        return ()
    # Ways that take pixel i // factor, as the kernel does; rounding halves down does so for factors up to 2.
    largest = max(after[2] // before[2], after[3] // before[3])
    same = way in (("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"))
    if not same and (way != ("asymmetric", "round_prefer_floor") or largest > 2):
        return ()
    return (Layer(node.outputs[0], "DeltaResize", (x,)),)


def _known(value: ir.Value) -> Array:
    return _some(constant(value))


def _some(array: Array | None) -> Array:
    assert array is not None
    return array


_READERS: dict[str, Callable[[ir.Node, Maps], Sequence[Layer]]] = {
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "GlobalAveragePool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "ReduceMean": _global_pool,
    "Add": _binary,
    "Mul": _binary,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Resize": _resize,
    **dict.fromkeys(("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "HardSwish"), _activation),
}
