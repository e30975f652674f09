"""What a model takes and returns, as sessions and data need to know it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import GraphError
from onnxcomp.state import model_state
from onnxcomp.target import TensorSpec


def input_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Inputs that a feed has to give: graph inputs without a default and without streaming state.

    Raises:
        GraphError: If an input has a type that no array has, or the state is malformed.
    """
    state = {s.input for s in model_state(model)}
    return tuple(_spec(v, "input") for v in model.graph.inputs if not v.is_initializer() and v.name not in state)


def output_specs(model: ir.Model) -> tuple[TensorSpec, ...]:
    """Outputs that a run returns: graph outputs without streaming state.

    Raises:
        GraphError: If an output has a type that no array has, or the state is malformed.
    """
    state = {s.output for s in model_state(model)}
    return tuple(_spec(v, "output") for v in model.graph.outputs if v.name not in state)


def _spec(value: ir.Value, what: str) -> TensorSpec:
    try:
        dtype = np.dtype(np.float32 if value.dtype is None else value.dtype.numpy())
    except TypeError:
        raise GraphError(f"{what} {value.name!r} has the element type {value.dtype}, which no array has") from None
    shape = None if value.shape is None else tuple(_size(d) for d in value.shape)
    return TensorSpec(name=value.name or "", dtype=dtype, shape=shape)


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    """Size of a dimension; its name or None if it is open, as is -1 to some exporters."""
    if isinstance(dim, int):
        return dim if dim >= 0 else None
    return dim.value
