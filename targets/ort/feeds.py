"""Inputs, outputs and streaming state of a session: what they are, and whether a feed fits them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from onnxcomp.errors import DataError, GraphError, UnsupportedError
from onnxcomp.target import Array, Feed, TensorSpec

STATE_KEY = "onnxcomp.state"
"""Key of the model's metadata under which its streaming state is listed as JSON."""

_MAX_ELEMENTS = 1 << 31

_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(string)": np.dtype(object),
    **{
        f"tensor({name})": np.dtype(name)
        for name in ("bool", "float16", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    },
}


class StateSpec(BaseModel):
    """One tensor that a streaming model hands from one run to the next.

    Attributes:
        input: Graph input that takes it.
        output: Graph output that gives its next value.
        shape: Its shape.
        dtype: Its element type, as NumPy names it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input: str = Field(min_length=1)
    output: str = Field(min_length=1)
    shape: list[int] = Field(max_length=16)
    dtype: str = Field(max_length=16)

    def zeros(self) -> Array:
        """The state before the first run."""
        return np.zeros(self.shape, self.dtype)


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
    for state in states:
        if state.input not in inputs or state.output not in outputs:
            raise GraphError(
                f"metadata {STATE_KEY!r} carries output {state.output!r} to input {state.input!r}, but one of them "
                f"does not exist; inputs are {list(inputs)}, outputs {list(outputs)}"
            )
        small = all(d >= 0 for d in state.shape) and np.prod(state.shape, dtype=np.float64) <= _MAX_ELEMENTS
        if not small or np.dtype(object) == state.dtype or f"tensor({_onnx_name(state.dtype)})" not in _DTYPES:
            raise GraphError(f"state {state.input!r} cannot have shape {state.shape} and dtype {state.dtype!r}")
    for names in ([s.input for s in states], [s.output for s in states]):
        if len(set(names)) < len(names):
            raise GraphError(f"metadata {STATE_KEY!r} lists one of {names} twice")
    return states


def _onnx_name(dtype: str) -> str:
    return {"float32": "float", "float64": "double"}.get(dtype, dtype)


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)


def tensor_spec(node: Any) -> TensorSpec:
    """Spec of an onnxruntime NodeArg.

    Raises:
        UnsupportedError: If it is no tensor, or NumPy has no such element type.
    """
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise UnsupportedError(
            f"{node.name!r} is a {node.type}; models can be run whose inputs and outputs are tensors of float16, "
            "float32, float64, integers, bool or strings: insert a Cast"
        )
    shape = tuple(node.shape) if isinstance(node.shape, list | tuple) else None
    return TensorSpec(name=node.name, dtype=dtype, shape=shape)


def check_feed(feed: Feed, specs: Mapping[str, TensorSpec]) -> None:
    """Refuses a feed that does not fit; NaN is allowed.

    Raises:
        DataError: With what is wrong and what the model expects.
    """
    if feed.keys() != specs.keys():
        missing = [n for n in specs if n not in feed]
        unknown = [n for n in feed if n not in specs]
        parts = [f"lacks input {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"has the unknown name {', '.join(map(repr, unknown))}"] if unknown else []
        raise DataError(f"the feed {' and '.join(parts)}; the model expects {describe(specs.values())}")
    for name, spec in specs.items():
        array = feed[name]
        if not isinstance(array, np.ndarray):
            raise DataError(
                f"input {name!r} is a {type(array).__name__}, not a NumPy array; it takes {_describe(spec)}"
            )
        if array.dtype != spec.dtype and not (spec.dtype.kind == "O" and array.dtype.kind in "UO"):
            raise DataError(f"input {name!r} has dtype {array.dtype}; the model expects {_describe(spec)}: use .astype")
        if spec.shape is None:
            continue
        fits = array.ndim == len(spec.shape) and all(
            d == e for d, e in zip(array.shape, spec.shape, strict=True) if isinstance(e, int)
        )
        if not fits:
            raise DataError(f"input {name!r} has shape {list(array.shape)}; the model expects {_describe(spec)}")


def describe(specs: Any) -> str:
    """Names, types and shapes, for messages."""
    return ", ".join(f"{s.name!r}: {_describe(s)}" for s in specs) or "no input"


def _describe(spec: TensorSpec) -> str:
    dtype = "string" if spec.dtype.kind == "O" else str(spec.dtype)
    if spec.shape is None:
        return dtype
    return f"{dtype}[{', '.join('?' if d is None else str(d) for d in spec.shape)}]"
