"""MatMul that leaves out inputs: `ThresholdMatMul` and `TopKMatMul`, each in three formats of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._op import Float, PortableOp
from onnxcomp.ops._selection import ABOVE_THRESHOLD, LARGEST, above_threshold, largest
from onnxcomp.ops._weights import Format

_Array = npt.NDArray[Any]


def threshold_matmul(x: Float, w: Float, threshold: Float | float, *, one_sided: int = 0) -> Float:
    """Product that ignores small inputs: `where(|x| > threshold, x, 0) @ w`.

    A NaN in `x` is never small, so it reaches the output. `w` has to be finite: a kernel does not read the rows of
    dropped inputs, while here and in the function body 0 times infinity is NaN.

    Args:
        x: Inputs, floating, `[..., K]`.
        w: Weight of the same type, `[K, N]`.
        threshold: Scalar, or one value for every input, `[K]`.
        one_sided: If not 0, `x` itself is compared instead of `|x|`.

    Returns:
        `[..., N]`, of the type of `x`.
    """
    product: Float = np.matmul(above_threshold(x, threshold, one_sided), w)
    return product


def topk_matmul(x: Float, w: Float, *, k: int) -> Float:
    """Product of the `k` inputs of largest magnitude of each row; of equal ones those of lowest index count.

    A NaN counts as larger than any number. (What the function body does with it is up to the runtime's TopK.)

    Args:
        x: Inputs, floating, `[..., K]`.
        w: Weight of the same type, `[K, N]`, finite.
        k: How many inputs count; all if there are fewer.

    Returns:
        `[..., N]`, of the type of `x`.
    """
    product: Float = np.matmul(largest(x, k), w)
    return product


def threshold_op(weight: Format) -> PortableOp:
    """`ThresholdMatMul` with weights of a format."""

    def reference(x: Float, *rest: _Array, one_sided: int = 0, exact: int = 0) -> Float:
        *parts, threshold = rest
        return threshold_matmul(x, weight.dequantize(*parts, x.dtype), threshold, one_sided=one_sided)

    name = f"ThresholdMatMul{weight.suffix}"
    return PortableOp(
        name=name,
        summary=f"MatMul that drops inputs whose magnitude is at most a threshold{weight.note}",
        signature=f"X [..., K], {weight.signature('W', 'K', 'N')}, threshold [] or [K] -> Y [..., N]; float",
        body=f"""
        {name} <one_sided: int = 0, exact: int = 0> (X, {weight.parameters("W")}, threshold) => (Y) {{
            {ABOVE_THRESHOLD.replace("#", "X")}
            {weight.decode("W", "X")}
            Y = MatMul (kept, W_float)
        }}
        """,
        reference=reference,
    )


def topk_op(weight: Format) -> PortableOp:
    """`TopKMatMul` with weights of a format."""

    def reference(x: Float, *parts: _Array, k: int, exact: int = 0) -> Float:
        return topk_matmul(x, weight.dequantize(*parts, x.dtype), k=k)

    name = f"TopKMatMul{weight.suffix}"
    return PortableOp(
        name=name,
        summary=f"MatMul of the k inputs of largest magnitude of each row{weight.note}",
        signature=f"X [..., K], {weight.signature('W', 'K', 'N')} -> Y [..., N]; float; attribute k",
        body=f"""
        {name} <k, exact: int = 0> (X, {weight.parameters("W")}) => (Y) {{
            {LARGEST.replace("#", "X")}
            {weight.decode("W", "X")}
            Y = MatMul (kept, W_float)
        }}
        """,
        reference=reference,
    )
