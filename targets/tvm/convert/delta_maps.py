"""Layers of streaming convolutional models, which compute changed pixels only and update their state in place."""

from __future__ import annotations

from typing import Any

from tvm import relax, s_tir

from onnxcomp.targets.tvm.convert._call import OPAQUE, Call, Converter, Expr
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.delta_pixels import Stage
from onnxcomp.targets.tvm.nodes import OWN

_COMMON = 3
"""Inputs that all have behind their own: state `held` (N, H, W, C), whether the stream has started, and the step."""


def enter(call: Call) -> Expr:
    """`DeltaEnter(x (N, C, H, W), ...)`."""
    return _update(call, call.kernels("delta_enter").enter(call.machine, stage=_stage(call)))


def conv(call: Call) -> Expr:
    """`DeltaConv(x, mask, weight, bias, ...)`, the weight as `kernels.delta_conv` packs it, with attribute `group`."""
    stage = _stage(call)
    function = call.kernels("delta_conv").conv(
        call.machine,
        window=_window(call),
        n=stage.channels,
        group=int(call.attributes["group"]),
        stage=stage,
        epilogue=_epilogue(call),
    )
    return _update(call, function)


def depthwise(call: Call) -> Expr:
    """`DeltaDepthwise(x, mask, weight (KH * KW * C,), bias (C,), ...)`."""
    function = call.kernels("delta_depthwise").depthwise(
        call.machine, window=_window(call), stage=_stage(call), epilogue=_epilogue(call)
    )
    return _update(call, function)


def pool(call: Call) -> Expr:
    """`DeltaPool(x, mask, ...)`: attributes `largest`, and `counts_pads` where a mean takes pads for zeros."""
    function = call.kernels("delta_pools").window_pool(
        call.machine,
        window=_window(call),
        largest=bool(call.attributes["largest"]),
        counts_pads=bool(call.attributes["counts_pads"]),
        stage=_stage(call),
    )
    return _update(call, function)


def global_pool(call: Call) -> Expr:
    """`DeltaGlobalPool(x, mask, ...)` with attribute `largest`."""
    _, height, width, _ = call.shape(0)
    largest = bool(call.attributes["largest"])
    function = call.kernels("delta_pools").global_pool(
        call.machine, size=(height, width), largest=largest, stage=_stage(call)
    )
    return _update(call, function)


def unary(call: Call) -> Expr:
    """`DeltaUnary(x, mask, ...)`: channels from attribute `begin` on, as many as the state has."""
    function = call.kernels("delta_points").unary(
        call.machine,
        channels=call.shape(0)[3],
        begin=int(call.attributes.get("begin", 0)),
        stage=_stage(call),
        epilogue=_epilogue(call),
    )
    return _update(call, function)


def binary(call: Call) -> Expr:
    """`DeltaAdd` or `DeltaMul(a, mask, b, mask, ...)`, b of the shape of a or (N, 1, 1, C)."""
    function = call.kernels("delta_points").binary(
        call.machine,
        product=call.kind == "DeltaMul",
        single=call.shape(0) != call.shape(2),
        stage=_stage(call),
        epilogue=_epilogue(call),
    )
    return _update(call, function)


def concat(call: Call) -> Expr:
    """`DeltaConcat(a, mask, b, mask, ...)`, by channels."""
    sizes = call.shape(0)[3], call.shape(2)[3]
    return _update(call, call.kernels("delta_points").concat(call.machine, sizes=sizes, stage=_stage(call)))


def resize(call: Call) -> Expr:
    """`DeltaResize(x, mask, ...)`: every pixel several times."""
    _, height, width, _ = call.shape(0)
    return _update(call, call.kernels("delta_points").resize(call.machine, size=(height, width), stage=_stage(call)))


def _state(call: Call) -> int:
    """Index of the state among the inputs."""
    return len(call.inputs) - _COMMON


def _stage(call: Call) -> Stage:
    images, height, width, channels = call.shape(_state(call))
    return Stage(
        shape=(images, height, width, channels),
        threshold=float(call.attributes["threshold"]),
        rounds=bool(call.attributes["rounds"]),
    )


def _window(call: Call) -> Window:
    """The window over the map that is input 0; pads at the end are what the output's size needs."""
    _, height, width, channels = call.shape(0)
    out = call.shape(_state(call))[1:3]
    kernel, strides, dilations, pads = (
        (int(call.attributes[f"{name}_h"]), int(call.attributes[f"{name}_w"]))
        for name in ("kernel", "stride", "dilation", "pad")
    )
    more = [
        (out[axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1 - size - pads[axis]
        for axis, size in enumerate((height, width))
    ]
    return Window(
        height=height,
        width=width,
        channels=channels,
        kernel=kernel,
        strides=strides,
        pads=(*pads, more[0], more[1]),
        dilations=dilations,
    )


def _epilogue(call: Call) -> Epilogue:
    return Epilogue(
        activation=call.text("activation"),
        alpha=float(call.attributes.get("alpha", 0.0)),
        beta=float(call.attributes.get("beta", 0.0)),
    )


def _update(call: Call, function: Any) -> Expr:
    """Emits a kernel that writes into its state: gives the state, and the mask of what it sent (N, H, W).

    State is an input of the graph that nothing else reads, so it can be written in place.
    """
    at = _state(call)
    shape = call.shape(at)
    root = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", function.body))  # some passes need it
    function = function.with_body(root).with_attr("op_pattern", OPAQUE).with_attr(OWN, 1).without_attr("global_symbol")
    name = call.builder.add_func(function, call.kind)
    outputs = [relax.TensorType(shape, "float32"), relax.TensorType(shape[:3], "uint8")]
    made = call.builder.emit(relax.op.call_tir_inplace(name, relax.Tuple(list(call.inputs)), [at, -1], outputs))
    return relax.Tuple([call.builder.emit(relax.TupleGetItem(made, i)) for i in range(2)])


CONVERTERS: dict[str, Converter] = {
    "DeltaEnter": enter,
    "DeltaConv": conv,
    "DeltaDepthwise": depthwise,
    "DeltaPool": pool,
    "DeltaGlobalPool": global_pool,
    "DeltaUnary": unary,
    "DeltaAdd": binary,
    "DeltaMul": binary,
    "DeltaConcat": concat,
    "DeltaResize": resize,
}
"""Op type to its converter."""
