"""`GatedMLP`: the up and down projections of a gated MLP for those neurons only whose gate is open."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.ops._op import Float, PortableOp
from onnxcomp.ops._selection import ABOVE_THRESHOLD, above_threshold
from onnxcomp.ops._weights import INT4, Format

_Array = npt.NDArray[Any]


def gated_mlp(a: Float, x: Float, u: Float, d: Float, threshold: Float | float, *, one_sided: int = 0) -> Float:
    """MLP whose neurons with a small gate are left out: `(where(|a| > threshold, a, 0) * (x @ u)) @ d`.

    A NaN gate is never small, so it reaches the output. `x`, `u` and `d` have to be finite: a kernel does nothing for a
    neuron that is left out, while here and in the function body 0 times infinity is NaN.

    Args:
        a: Gates after their activation, floating, `[..., F]`.
        x: Input of the MLP, `[..., K]`.
        u: Up projection, `[K, F]`.
        d: Down projection, `[F, N]`.
        threshold: Scalar, or one value for every neuron, `[F]`.
        one_sided: If not 0, `a` itself is compared instead of `|a|`.

    Returns:
        `[..., N]`, of the type of `a`.
    """
    hidden = above_threshold(a, threshold, one_sided) * np.matmul(x, u)
    product: Float = np.matmul(hidden, d)
    return product


def gated_mlp_op(weight: Format) -> PortableOp:
    """`GatedMLP` with both weights of a format.

    Groups of 4-bit weights have to lie within what is read for one neuron, so that U is stored turned, `[F, K]`.
    """
    turned = weight is INT4

    def reference(a: Float, x: Float, *rest: _Array, one_sided: int = 0, exact: int = 0) -> Float:
        *parts, threshold = rest
        half = len(parts) // 2
        u, d = weight.dequantize(*parts[:half], x.dtype), weight.dequantize(*parts[half:], x.dtype)
        return gated_mlp(a, x, u.T if turned else u, d, threshold, one_sided=one_sided)

    name = f"GatedMLP{weight.suffix}"
    up = weight.signature("U", "F", "K") if turned else weight.signature("U", "K", "F")
    as_columns = "Transpose <perm = [1, 0]>" if turned else "Identity"
    return PortableOp(
        name=name,
        summary=f"Up and down projection of a gated MLP for the neurons whose gate exceeds a threshold{weight.note}",
        signature=(
            f"A [..., F], X [..., K], {up}, {weight.signature('D', 'F', 'N')}, threshold [] or [F] -> Y [..., N]; float"
        ),
        body=f"""
        {name} <one_sided: int = 0, exact: int = 0>
            (A, X, {weight.parameters("U")}, {weight.parameters("D")}, threshold) => (Y)
        {{
            {ABOVE_THRESHOLD.replace("#", "A")}
            {weight.decode("U", "X")}
            {weight.decode("D", "X")}
            U_columns = {as_columns} (U_float)
            up = MatMul (X, U_columns)
            hidden = Mul (kept, up)
            Y = MatMul (hidden, D_float)
        }}
        """,
        reference=reference,
    )
