"""What is done to a sum before it is stored: residual and activation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels import vector_math as vm

ACTIVATIONS = (
    "",
    "relu",
    "clip",
    "leaky_relu",
    "sigmoid",
    "tanh",
    "silu",
    "gelu",
    "gelu_tanh",
    "hard_sigmoid",
    "hard_swish",
)
"""Names of activations; the empty one is none."""


@dataclass(frozen=True, kw_only=True)
class Epilogue:
    """`activation(sum + bias + residual)`.

    Attributes:
        residual: A tensor of the output's shape is added before the activation.
        activation: One of `ACTIVATIONS`.
        alpha: Slope of `leaky_relu` and `hard_sigmoid`, lower end of `clip`.
        beta: Offset of `hard_sigmoid`, upper end of `clip`.
    """

    residual: bool = False
    activation: str = ""
    alpha: float = 0.0
    beta: float = 0.0

    def __call__(self, value: Any) -> Any:
        """The activation of a float32 expression of any number of lanes."""
        return activate(value, self.activation, self.alpha, self.beta)


def activate(x: Any, kind: str, alpha: float = 0.0, beta: float = 0.0) -> Any:
    """Activation `kind` of a float32 expression, a vector or one value; see `Epilogue`."""
    one, zero = vm.like(x, 1.0), vm.like(x, 0.0)
    match kind:
        case "":
            return x
        case "relu":
            return T.max(zero, x)  # in this order NaN stays NaN
        case "clip":
            return T.min(vm.like(x, beta), T.max(vm.like(x, alpha), x))
        case "leaky_relu":
            return T.max(zero, x) + T.min(zero, x) * vm.like(x, alpha)
        case "sigmoid":
            return vm.sigmoid(x)
        case "tanh":
            return vm.tanh(x)
        case "silu":
            return x * vm.sigmoid(x)
        case "gelu":
            return x * (vm.erf(x * vm.like(x, 0.5**0.5)) + one) * vm.like(x, 0.5)
        case "gelu_tanh":
            inner = (x + x * x * x * vm.like(x, 0.044715)) * vm.like(x, 0.7978845608028654)
            return x * (vm.tanh(inner) + one) * vm.like(x, 0.5)
        case "hard_sigmoid":
            return T.min(T.max(x * vm.like(x, alpha) + vm.like(x, beta), zero), one)
        case "hard_swish":
            return x * T.min(T.max(x * vm.like(x, 1 / 6) + vm.like(x, 0.5), zero), one)
    raise ValueError(kind)
