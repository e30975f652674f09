"""What becomes of an int32 sum: an 8-bit code, or a float32 value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import vector_math as vm
from onnxcomp.targets.tvm.kernels._epilogue import Epilogue


@dataclass(frozen=True, kw_only=True)
class Codes:
    """`clamp(round(float(sum) * scale) + zero)`, halves to even, as ONNX Runtime does it.

    Attributes:
        dtype: `uint8` or `int8`.
        zero: Zero point.
        low: Least code.
        high: Greatest code.
    """

    dtype: str
    zero: int
    low: int
    high: int

    @property
    def residual(self) -> bool:
        """Whether another tensor is added."""
        return False

    def __call__(self, sums: Any, affine: Callable[[int], Any], residual: Any = None) -> Any:
        """The codes of a vector of sums, to which the offset was added; `affine(0)` is the scale."""
        scale = affine(0)
        return quantized(T.Cast(scale.ty.dtype, sums) * scale, self)


@dataclass(frozen=True, kw_only=True)
class Floats:
    """`activation(float(sum) * scale + bias + residual)`.

    Attributes:
        epilogue: Activation, and whether there is a residual.
        dtype: Of the values.
    """

    epilogue: Epilogue = field(default_factory=Epilogue)
    dtype: str = "float32"

    @property
    def residual(self) -> bool:
        """Whether another tensor is added."""
        return self.epilogue.residual

    def __call__(self, sums: Any, affine: Callable[[int], Any], residual: Any = None) -> Any:
        """The values of a vector of sums; `affine(0)` is the scale, `affine(1)` the bias."""
        scale = affine(0)
        found = T.Cast(scale.ty.dtype, sums) * scale + affine(1)
        return self.epilogue(found if residual is None else found + residual)


def quantized(x: Any, codes: Codes) -> Any:
    """Codes of float32 values that are in units of the output's scale, a vector or one value."""
    # Before it is rounded, a float is kept from above: beyond int32 it would become the least integer. From below
    # that is just what it should become.
    x = T.min(x, vm.like(x, float(codes.high - codes.zero)))
    integers = rounded(x)
    kind = integers.ty.dtype
    kept = T.max(integers, tirx.const(codes.low - codes.zero, kind)) + tirx.const(codes.zero, kind)
    return T.Cast(str(kind).replace("int32", codes.dtype), kept)


def rounded(x: Any) -> Any:
    """Float32 values as int32, halves to even, a vector or one value."""
    kind = str(x.ty.dtype).replace("float32", "int32")
    lanes = kind.removeprefix("int32").removeprefix("x")
    suffix = f"v{lanes}i32.v{lanes}f32" if lanes else "i32.f32"
    return T.call_llvm_pure_intrin(kind, f"llvm.lrint.{suffix}", x)
