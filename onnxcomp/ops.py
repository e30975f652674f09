"""The portable op set, domain `onnxcomp`: ops that a pass may write and any runtime can run.

A portable op is called through a model-local function whose body is plain ONNX. The rewritten model therefore runs at
once everywhere, and its body is the numeric reference. A target that has a kernel swaps the call for the op of the same
name in the domain `onnxcomp.native` (see `onnxcomp.native`); all others inline the body. The two domains are kept apart
so that a runtime never has to choose between a kernel and a body.

To use one in a pass: `OPS["ThresholdMatMul"].install(model)`, then add a node of that op type and `DOMAIN`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.parser
import onnx_ir as ir

from onnxcomp.errors import GraphError

DOMAIN = "onnxcomp"
"""Domain of the portable ops."""

VERSION = 1
"""Version of the domain. An op whose meaning changes gets a new name, so this only grows when ops are added."""

MIN_OPSET = 16
"""Lowest opset of the default domain that the bodies are valid in."""

_Float = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class PortableOp:
    """An op that runs anywhere.

    Attributes:
        name: Op type.
        summary: One line for `onnxcomp list ops`.
        signature: Inputs and outputs with shapes.
        body: The function in ONNX's text form, without the header that names domain and opset.
        reference: The same in numpy, inputs in order.
    """

    name: str
    summary: str
    signature: str
    body: str
    reference: Callable[..., _Float]

    def function(self, opset: int = 18) -> ir.Function:
        """Builds the function, anew every time: a function belongs to one model.

        Args:
            opset: Version of the default domain that the body is declared for; that of the model it goes into, since
                inlining needs the two to agree.

        Raises:
            GraphError: If `opset` is older than `MIN_OPSET`.
        """
        if opset < MIN_OPSET:
            raise GraphError(
                f"{DOMAIN}::{self.name} needs opset {MIN_OPSET} or newer, not {opset}; convert the model first"
            )
        text = f'<domain: "{DOMAIN}", opset_import: ["": {opset}]>\n{self.body}'
        function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
        function.doc_string = f"{self.summary}. {self.signature}"
        return function

    def install(self, model: ir.Model) -> None:
        """Adds the function and the domain to `model`; where they are there already, nothing changes.

        Raises:
            GraphError: If the model's opset is older than `MIN_OPSET`, or it has a newer version of the domain.
        """
        version = model.opset_imports.setdefault(DOMAIN, VERSION)
        if version > VERSION:
            raise GraphError(f"the model has version {version} of the ops in {DOMAIN!r}; this onnxcomp knows {VERSION}")
        if (DOMAIN, self.name, "") not in model.functions:
            function = self.function(model.opset_imports.get("", MIN_OPSET))
            model.functions[function.identifier()] = function


def threshold_matmul(x: _Float, w: _Float, threshold: _Float | float) -> _Float:
    """Product that ignores small inputs: `where(|x| > threshold, x, 0) @ w`.

    A NaN in `x` is never small, so it reaches the output. `w` has to be finite: a kernel does not read the rows of
    dropped inputs, while here and in the function body 0 times infinity is NaN.

    Args:
        x: Inputs, floating, `[..., K]`.
        w: Weight of the same type, `[K, N]`.
        threshold: Scalar, or one value for every input, `[K]`.

    Returns:
        `[..., N]`, of the type of `x`.
    """
    # Not `abs(x) > threshold`: that is false for NaN and would drop it.
    small = np.abs(x) <= np.asarray(threshold, x.dtype)
    product: _Float = np.matmul(np.where(small, np.zeros((), x.dtype), x), w)
    return product


OPS: Mapping[str, PortableOp] = MappingProxyType(
    {
        op.name: op
        for op in (
            PortableOp(
                name="ThresholdMatMul",
                summary="MatMul that drops inputs whose magnitude is at most a threshold",
                signature="X [..., K], W [K, N], threshold [] or [K] -> Y [..., N]; float",
                body="""
                ThresholdMatMul (X, W, threshold) => (Y) {
                    magnitude = Abs (X)
                    small = LessOrEqual (magnitude, threshold)
                    zero_float = Constant <value_float: float = 0.0> ()
                    zero = CastLike (zero_float, X)
                    kept = Where (small, zero, X)
                    Y = MatMul (kept, W)
                }
                """,
                reference=threshold_matmul,
            ),
        )
    }
)
"""Name to portable op."""
