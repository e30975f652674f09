"""Activations of single values, by the functions of CUDA.

`max` and `min` of CUDA leave a NaN out, so comparisons stand in their place: a NaN stays one, as in ONNX.
"""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from onnxcomp.targets.tvm.kernels._epilogue import Epilogue


def at_least(x: Any, low: float) -> Any:
    """The greater of a float32 expression and a number; a NaN stays."""
    return T.Select(x < T.float32(low), T.float32(low), x)


def at_most(x: Any, high: float) -> Any:
    """The lesser of a float32 expression and a number; a NaN stays."""
    return T.Select(x > T.float32(high), T.float32(high), x)


def sigmoid(x: Any) -> Any:
    """`1 / (1 + exp(-x))`."""
    return T.float32(1) / (T.float32(1) + T.exp(T.float32(0) - x))


def activated(x: Any, epilogue: Epilogue) -> Any:
    """The activation of an epilogue, of a float32 expression; see `Epilogue`."""
    one = T.float32(1)
    match epilogue.activation:
        case "":
            return x
        case "relu":
            return at_least(x, 0.0)
        case "clip":
            return at_most(at_least(x, epilogue.alpha), epilogue.beta)
        case "leaky_relu":
            return T.Select(x < T.float32(0), x * T.float32(epilogue.alpha), x)
        case "sigmoid":
            return sigmoid(x)
        case "tanh":
            return T.tanh(x)
        case "silu":
            return x * sigmoid(x)
        case "gelu":
            return x * (T.erf(x * T.float32(0.5**0.5)) + one) * T.float32(0.5)
        case "gelu_tanh":
            inner = (x + x * x * x * T.float32(0.044715)) * T.float32(0.7978845608028654)
            return x * (T.tanh(inner) + one) * T.float32(0.5)
        case "hard_sigmoid":
            return at_most(at_least(x * T.float32(epilogue.alpha) + T.float32(epilogue.beta), 0.0), 1.0)
        case "hard_swish":
            return x * at_most(at_least(x * T.float32(1 / 6) + T.float32(0.5), 0.0), 1.0)
    raise ValueError(epilogue.activation)
