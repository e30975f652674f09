"""Streaming state: tensors that a model hands from one run to the next, as graph inputs and outputs.

Which input takes up which output is noted in the model's metadata, so that whoever runs the model can carry them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from onnxcomp.errors import GraphError
from onnxcomp.target import Array

STATE_KEY = "onnxcomp.state"
"""Key of the model's metadata under which its streaming state is listed as JSON."""

_MAX_ELEMENTS = 1 << 31
# Types of `onnxcomp.target.TensorSpec` that have a zero.
_DTYPES = frozenset(
    {"bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
)


class StateSpec(BaseModel):
    """One tensor that a streaming model hands from one run to the next.

    Attributes:
        input: Graph input that takes it.
        output: Graph output that gives its next value.
        shape: Its shape.
        dtype: Its element type, as NumPy names it.
        in_place: The kernel that computes the output takes one buffer for both, and then writes what changed only.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input: str = Field(min_length=1)
    output: str = Field(min_length=1)
    shape: list[int] = Field(max_length=16)
    dtype: str = Field(max_length=16)
    in_place: bool = False

    def zeros(self) -> Array:
        """The state before the first run."""
        return np.zeros(self.shape, self.dtype)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


_STATES = TypeAdapter(list[StateSpec])


def read_state(metadata: Mapping[str, str], inputs: Sequence[str], outputs: Sequence[str]) -> tuple[StateSpec, ...]:
    """The streaming state that a model's metadata lists; empty if it lists none.

    Args:
        metadata: Metadata of the model.
        inputs: Names of the graph inputs.
        outputs: Names of the graph outputs.

    Raises:
        GraphError: If the list is malformed or names no inputs and outputs of the graph.
    """
    text = metadata.get(STATE_KEY)
    if not text:
        return ()
    try:
        states = tuple(_STATES.validate_python(json.loads(text)))
    except (ValidationError, ValueError, RecursionError) as error:
        raise GraphError(
            f"metadata {STATE_KEY!r} is malformed ({_first(error)}); it has to be a JSON list of objects with the keys "
            "input, output, shape and dtype"
        ) from error
    known = set(inputs), set(outputs)
    for state in states:
        if state.input not in known[0] or state.output not in known[1]:
            raise GraphError(
                f"metadata {STATE_KEY!r} carries output {state.output!r} to input {state.input!r}, but one of them "
                f"does not exist; inputs are {list(inputs)}, outputs {list(outputs)}"
            )
        small = all(d >= 0 for d in state.shape) and np.prod(state.shape, dtype=np.float64) <= _MAX_ELEMENTS
        if not small or state.dtype not in _DTYPES:
            raise GraphError(f"state {state.input!r} cannot have shape {state.shape} and dtype {state.dtype!r}")
    for names in ([s.input for s in states], [s.output for s in states]):
        if len(set(names)) < len(names):
            raise GraphError(f"metadata {STATE_KEY!r} lists one of {names} twice")
    return states


def model_state(model: ir.Model) -> tuple[StateSpec, ...]:
    """The streaming state of a model.

    Raises:
        GraphError: See `read_state`.
    """
    graph = model.graph
    return read_state(model.metadata_props, [v.name or "" for v in graph.inputs], [v.name or "" for v in graph.outputs])


def write_state(model: ir.Model, states: Iterable[StateSpec]) -> None:
    """Lists the streaming state of a model in its metadata."""
    entries = [s.model_dump(exclude_defaults=True) for s in states]
    if entries:
        model.metadata_props[STATE_KEY] = json.dumps(entries)
    else:
        model.metadata_props.pop(STATE_KEY, None)


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
