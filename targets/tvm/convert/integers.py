"""Layers of 8-bit integers.

Codes are uint8 or int8. An output is described by the attributes `dtype` (`uint8`, `int8`, or `float32`), `zero`,
`low` and `high` of its codes, or those of an epilogue.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax

from onnxcomp.targets.tvm.convert._call import Call, Converter, Expr
from onnxcomp.targets.tvm.convert._epilogue import epilogue
from onnxcomp.targets.tvm.kernels._int8_window import Window
from onnxcomp.targets.tvm.kernels.int8_output import Codes, Floats


def gemm(call: Call) -> Expr:
    """`QGemm(x (..., K), weight, offset, affine[, residual (..., N)])`, attribute `n` and those of an output."""
    *leading, k = call.shape(0)
    n = int(call.attributes["n"])
    rows = math.prod(leading)
    output = _output(call)
    function = call.kernels("int8_gemm").gemm(
        call.machine, rows=_fixed(rows), k=k, n=n, dtype=call.dtype(0), output=output
    )
    inputs = [call.reshaped(call.inputs[0], (rows, k)), *call.inputs[1:4]]
    if output.residual:
        inputs.append(call.reshaped(call.inputs[4], (rows, n)))
    return call.reshaped(call.tir(function, inputs, shape=(rows, n), dtype=output.dtype), (*leading, n))


def conv(call: Call) -> Expr:
    """`QConv(x (B, H, W, C), weight, offset, affine[, residual (B, OH, OW, N)])`.

    With the attribute `planar`, `x` has the shape (B, C, H, W). Other attributes: `n`, `x_zero`, `kernel`, `strides`,
    `pads`, `dilations`, and those of an output.
    """
    batch, high, wide, channels = _image(call)
    window, n, output = _window(call), int(call.attributes["n"]), _output(call)
    if window.pointwise and not call.attributes.get("planar", 0):
        return gemm(call)
    function = call.kernels("int8_conv").conv(
        call.machine,
        batch=_fixed(batch),
        window=window,
        channels=channels,
        n=n,
        dtype=call.dtype(0),
        zero=int(call.attributes["x_zero"]),
        output=output,
        planar=bool(call.attributes.get("planar", 0)),
    )
    inputs = [call.reshaped(call.inputs[0], (batch, high * wide * channels)), *call.inputs[1:4]]
    out_high, out_wide = window.output
    if output.residual:
        inputs.append(call.reshaped(call.inputs[4], (batch * out_high * out_wide, n)))
    found = call.tir(function, inputs, shape=(batch * out_high * out_wide, n), dtype=output.dtype)
    return call.reshaped(found, (batch, out_high, out_wide, n))


def depthwise(call: Call) -> Expr:
    """`QDepthwise(x (B, H, W, C), weight, offset, affine)`, attributes as of `conv` without `n`."""
    batch, _, _, channels = call.shape(0)
    window, output = _window(call), _output(call)
    function = call.kernels("int8_depthwise").depthwise(
        call.machine,
        batch=_fixed(batch),
        window=window,
        channels=channels,
        dtype=call.dtype(0),
        zero=int(call.attributes["x_zero"]),
        output=output,
    )
    return call.tir(function, call.inputs[:4], shape=(batch, *window.output, channels), dtype=output.dtype)


def mean(call: Call) -> Expr:
    """`QMean(x (B, H, W, C))` gives (B, 1, 1, C); attributes `x_zero`, `scale` of a sum, and those of an output."""
    batch, high, wide, channels = call.shape(0)
    output, pixels = _output(call), high * wide
    function = call.kernels("int8_elementwise").mean(
        call.machine,
        batch=_fixed(batch),
        pixels=pixels,
        channels=channels,
        dtype=call.dtype(0),
        zero=int(call.attributes["x_zero"]),
        output=output,
    )
    inputs = [call.reshaped(call.inputs[0], (batch, pixels, channels)), _scale(call)]
    found = call.tir(function, inputs, shape=(batch, channels), dtype=output.dtype)
    return call.reshaped(found, (batch, 1, 1, channels))


def add(call: Call) -> Expr:
    """`QAdd(a, b)` of one shape; attributes `ratios`, `offset` and those of codes. See the kernel."""
    ratios = tuple(map(float, call.attributes["ratios"]))
    size, codes = _size(call), _codes(call)
    function = call.kernels("int8_elementwise").add(
        call.machine,
        size=_fixed(size),
        dtype=call.dtype(0),
        ratios=ratios,
        offset=float(call.attributes["offset"]),
        codes=codes,
    )
    return _flat(call, function, codes.dtype, 2)


def multiply(call: Call) -> Expr:
    """`QMul(a, b)` of one shape; attributes `zeros`, `scale` and those of codes. See the kernel."""
    codes = _codes(call)
    function = call.kernels("int8_elementwise").multiply(
        call.machine,
        size=_fixed(_size(call)),
        dtype=call.dtype(0),
        zeros=tuple(map(int, call.attributes["zeros"])),
        scale=float(call.attributes["scale"]),
        codes=codes,
    )
    return _flat(call, function, codes.dtype, 2)


def table(call: Call) -> Expr:
    """`QTable(x, table (256))`, the table of the output's type, by the byte."""
    out = call.dtype(1)
    function = call.kernels("int8_elementwise").table(
        call.machine, size=_fixed(_size(call)), dtype=call.dtype(0), out=out
    )
    shape = call.shape(0)
    flat = [call.reshaped(call.inputs[0], (_size(call),)), call.inputs[1]]
    return call.reshaped(call.tir(function, flat, shape=(_size(call),), dtype=out), shape)


def quantize(call: Call) -> Expr:
    """`Quantize(x)` float32, attributes `scale` and those of codes."""
    codes = _codes(call)
    function = call.kernels("int8_elementwise").quantize(call.machine, size=_fixed(_size(call)), codes=codes)
    return _flat(call, function, codes.dtype, 1, _scale(call))


def dequantize(call: Call) -> Expr:
    """`Dequantize(x)` to float32, attributes `scale` and `zero`."""
    function = call.kernels("int8_elementwise").dequantize(
        call.machine, size=_fixed(_size(call)), dtype=call.dtype(0), zero=int(call.attributes["zero"])
    )
    return _flat(call, function, "float32", 1, _scale(call))


def dynamic_range(call: Call) -> Expr:
    """`DynamicRange(x)` float32 gives scale and zero point of all of it, (2) float32."""
    size = _size(call)
    function = call.kernels("int8_dynamic").value_range(call.machine, size=_fixed(size))
    flat = [call.reshaped(call.inputs[0], (size,)), relax.const(np.zeros(1, np.float32))]
    return call.tir(function, flat, shape=(2,), dtype="float32")


def dynamic_quantize(call: Call) -> Expr:
    """`DynamicQuantize(x, parameters)`, those of `DynamicRange`, to uint8."""
    function = call.kernels("int8_dynamic").quantize(call.machine, size=_fixed(_size(call)))
    return _flat(call, function, "uint8", 1, call.inputs[1])


def dynamic_offset(call: Call) -> Expr:
    """`DynamicOffset(parameters, totals (columns) int32)`: the offset of a `QGemm`."""
    (columns,) = call.shape(1)
    function = call.kernels("int8_dynamic").offset(call.machine, columns=columns)
    return call.tir(function, call.inputs, shape=(columns,), dtype="int32")


def dynamic_affine(call: Call) -> Expr:
    """`DynamicAffine(parameters, affine (2, columns))`: scale and bias of a `QGemm`."""
    _, columns = call.shape(1)
    function = call.kernels("int8_dynamic").affine(call.machine, columns=columns)
    return call.tir(function, call.inputs, shape=(2, columns), dtype="float32")


def _scale(call: Call) -> Expr:
    """The scale as a tensor of one value."""
    return relax.const(np.array([call.attributes["scale"]], np.float32))


def _fixed(size: Any) -> int | None:
    return size if isinstance(size, int) else None


def _size(call: Call) -> Any:
    return math.prod(call.shape(0))


def _flat(call: Call, function: Any, dtype: str, count: int, *more: Expr) -> Expr:
    size = _size(call)
    flat = [call.reshaped(x, (size,)) for x in call.inputs[:count]]
    return call.reshaped(call.tir(function, [*flat, *more], shape=(size,), dtype=dtype), call.shape(0))


def _codes(call: Call) -> Codes:
    zero, low, high = (int(call.attributes[name]) for name in ("zero", "low", "high"))
    return Codes(dtype=call.text("dtype"), zero=zero, low=low, high=high)


def _output(call: Call) -> Codes | Floats:
    if call.text("dtype") == "float32":
        return Floats(epilogue=epilogue(call, residual=len(call.inputs) > 4))
    return _codes(call)


def _image(call: Call) -> tuple[Any, int, int, int]:
    """Images, height, width, and channels of what a convolution reads."""
    if call.attributes.get("planar", 0):
        batch, channels, high, wide = call.shape(0)
    else:
        batch, high, wide, channels = call.shape(0)
    return batch, high, wide, channels


def _window(call: Call) -> Window:
    def pair(name: str) -> tuple[int, int]:
        down, across = map(int, call.attributes[name])
        return down, across

    top, left, bottom, right = map(int, call.attributes["pads"])
    _, high, wide, _ = _image(call)
    return Window(
        size=(high, wide),
        kernel=pair("kernel"),
        strides=pair("strides"),
        pads=(top, left, bottom, right),
        dilations=pair("dilations"),
    )


CONVERTERS: Mapping[str, Converter] = {
    "QGemm": gemm,
    "QConv": conv,
    "QDepthwise": depthwise,
    "QMean": mean,
    "QAdd": add,
    "QMul": multiply,
    "QTable": table,
    "Quantize": quantize,
    "Dequantize": dequantize,
    "DynamicRange": dynamic_range,
    "DynamicQuantize": dynamic_quantize,
    "DynamicOffset": dynamic_offset,
    "DynamicAffine": dynamic_affine,
}
"""Op type in the domain `onnxcomp.tvm` to its converter."""
