"""Float32 convolutions of NHWC images with constant weights, with bias, residual and activation.

An implicit product of matrices, see `_product`: a row is a pixel of the output, the inner dimension walks the window,
channels innermost, so that threads beside each other read channels beside each other. Late layers of a network have few
pixels and long windows: there the window is split among blocks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.gpu.kernels._dense import Product
from onnxcomp.targets.tvm.gpu.kernels._product import product
from onnxcomp.targets.tvm.gpu.kernels._tile import every
from onnxcomp.targets.tvm.gpu.kernels._vectors import beside
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue
from onnxcomp.targets.tvm.kernels._window import Window
from onnxcomp.targets.tvm.kernels.conv import columns


@cache
def conv(
    machine: Gpu,
    *,
    batch: int | None,
    window: Window,
    n: int,
    group: int,
    sizes: tuple[int, ...],
    epilogue: Epilogue,
) -> Any:
    """Kernel `(x (batch, H * W * C), weight, bias[, residual as y], y (batch, OH * OW * N))`, all float32.

    Args:
        machine: What it is for.
        batch: Images; None for any number.
        window: Sizes.
        n: Output channels.
        group: Groups of channels.
        sizes: Vectors of each panel, for which the weight was packed: one panel.
        epilogue: What is done to the sums.
    """
    if window.is_point:
        window = replace(window, height=1, width=window.height * window.width)
    each, width = n // group, columns(machine, sizes, n // group)
    channels, wide = window.channels // group, window.kernel[1]
    k = window.kernel[0] * wide * channels
    pixels = window.out_height * window.out_width
    images = tirx.Var("batch", "int64") if batch is None else batch
    in_size, out_size = window.height * window.width * window.channels, pixels * n

    def corner(row: Any, k: Any) -> tuple[Any, Any]:
        """Row and column of the image that a pixel of the output reads at a step of the window."""
        line, column = row % pixels // window.out_width, row % window.out_width
        down = line * window.strides[0] - window.pads[0] + k // (wide * channels) * window.dilations[0]
        return down, column * window.strides[1] - window.pads[1] + k // channels % wide * window.dilations[1]

    def x_at(g: Any, row: Any, k: Any) -> tuple[Any, Any]:
        line, column = corner(row, k)
        return row // pixels, (line * window.width + column) * window.channels + g * channels + k % channels

    def x_inside(g: Any, row: Any, k: Any) -> Any:
        line, column = corner(row, k)
        top, left, bottom, right = window.pads
        return every(
            not (top or bottom) or T.And(line >= 0, line < window.height),
            not (left or right) or T.And(column >= 0, column < window.width),
        )

    launches = product(
        Product(
            machine=machine,
            rows=images * pixels,
            k=k,
            n=each,
            groups=group,
            x_lanes=4 if channels % 4 == 0 else 1,
            w_columns=width,
            x_at=x_at,
            x_inside=x_inside if any(window.pads) else None,
            w_at=lambda w, g, k_, column, lanes: w[beside((g * k + k_) * width + column, lanes)],
            y_at=lambda g, row, column: (row // pixels, row % pixels * n + g * each + column),
            epilogue=epilogue,
        ),
        pixels,
    )

    if epilogue.residual:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, r_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (group * width * k,), "float32")
            b = T.match_buffer(b_, (n + width - each,), "float32")
            r = T.match_buffer(r_, (images, out_size), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            if images > 0:
                launches(x, w, b, r, y)

    else:

        @T.prim_func
        def kernel(x_: T.handle, w_: T.handle, b_: T.handle, y_: T.handle):
            T.func_attr({"tirx.noalias": True})
            x = T.match_buffer(x_, (images, in_size), "float32")
            w = T.match_buffer(w_, (group * width * k,), "float32")
            b = T.match_buffer(b_, (n + width - each,), "float32")
            y = T.match_buffer(y_, (images, out_size), "float32")
            if images > 0:
                launches(x, w, b, x, y)

    return kernel
