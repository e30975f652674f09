"""Convolutions and pooling of NHWC images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tvm import relax

from onnxcomp.targets.tvm.convert._call import Call, Expr
from onnxcomp.targets.tvm.convert._epilogue import epilogue
from onnxcomp.targets.tvm.kernels._window import Window


def conv(call: Call) -> Expr:
    """`Conv(x (batch, ..., C), weight, bias[, residual])`.

    Attributes are `kernel_shape`, `strides`, `pads`, `dilations` as of an image, `group`, `n`, those of an epilogue,
    and `panels` that the weight was packed for; without these it is a depthwise convolution.
    """
    end = epilogue(call, residual=len(call.inputs) > 3)
    n, group = int(call.attributes["n"]), int(call.attributes["group"])
    sizes = tuple(int(v) for v in call.attributes.get("panels", ()))

    def kernel(batch: int | None, window: Window) -> Any:
        if not sizes:
            return call.kernels("depthwise").depthwise(call.machine, batch=batch, window=window, epilogue=end)
        return call.kernels("conv").conv(
            call.machine, batch=batch, window=window, n=n, group=group, sizes=sizes, epilogue=end
        )

    return _run(call, n, kernel)


def pool(call: Call) -> Expr:
    """`Pool(x (batch, ..., C))`; attribute `mode` is `max` or `mean`, `counted` are pads that a mean counts."""
    counted = call.attributes.get("counted")

    def kernel(batch: int | None, window: Window) -> Any:
        return call.kernels("pool").pool(
            call.machine,
            batch=batch,
            window=window,
            largest=call.text("mode") == "max",
            counted=None if counted is None else tuple(int(v) for v in counted),
            dtype=call.dtype(0),
        )

    return _run(call, call.shape(0)[-1], kernel)


def _run(call: Call, n: int, make: Callable[[int | None, Window], Any]) -> Expr:
    batch, *spatial, channels = call.shape(0)
    window = Window(
        height=1 if len(spatial) == 1 else spatial[0],
        width=spatial[-1],
        channels=channels,
        kernel=_numbers(call, "kernel_shape"),
        strides=_numbers(call, "strides"),
        pads=_numbers(call, "pads"),
        dilations=_numbers(call, "dilations"),
    )
    out = [window.out_height, window.out_width][-len(spatial) :]
    images = batch
    if window.is_point and isinstance(batch, int):
        images, window = 1, replace(window, height=window.height * batch)
    if min(out) < 1:  # an image smaller than the window
        return call.builder.emit(relax.op.zeros((batch, *out, n), call.dtype(0)))
    sizes = window.height * window.width * channels, window.out_height * window.out_width * n
    inputs = [call.reshaped(call.inputs[0], (images, sizes[0])), *call.inputs[1:3]]
    inputs += [call.reshaped(residual, (images, sizes[1])) for residual in call.inputs[3:]]
    function = make(images if isinstance(images, int) else None, window)
    result = call.tir(function, inputs, shape=(images, sizes[1]), dtype=call.dtype(0))
    return call.reshaped(result, (batch, *out, n))


def _numbers(call: Call, name: str) -> Any:
    return tuple(int(v) for v in call.attributes[name])


CONVERTERS: Mapping[str, Callable[[Call], Expr]] = {"Conv": conv, "Pool": pool}
"""Op type to its converter."""
