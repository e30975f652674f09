"""Streaming state: tensors that a model hands from one run to the next, as graph inputs and outputs.

Which input takes up which output is noted in the model's metadata, so that whoever runs the model can carry them.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from onnxcomp.errors import DataError, GraphError, OnnxcompError
from onnxcomp.target import Array

STATE_KEY = "onnxcomp.state"
"""Key of the model's metadata under which its streaming state is listed as JSON."""

_MAX_ELEMENTS = 1 << 31
_MAX_BYTES = 1 << 32  # of a state file, where the model does not tell how large its state is
_MAX_HEADER = 1 << 20
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


def check_state(state: Mapping[str, Array], states: Sequence[StateSpec]) -> None:
    """Refuses a state that is not that of a model.

    Raises:
        DataError: With what is wrong and what the model carries.
    """
    known = {s.input: s for s in states}
    for name in known.keys() ^ state.keys():
        wrong = "is missing in" if name in known else "is unknown, but given in"
        raise DataError(f"{name!r} {wrong} the state; the model carries {sorted(known)}")
    for name, spec in known.items():
        array = state[name]
        if not isinstance(array, np.ndarray):
            raise DataError(f"state {name!r} is a {type(array).__name__}, not a NumPy array")
        if array.dtype != np.dtype(spec.dtype) or list(array.shape) != spec.shape:
            raise DataError(
                f"state {name!r} is {array.dtype}{list(array.shape)}; the model carries {spec.dtype}{spec.shape}"
            )


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["onnxcomp.state"] = "onnxcomp.state"
    version: Literal[1] = 1
    model: str
    names: list[str]


def save_state(path: str | os.PathLike[str], state: Mapping[str, Array], *, model_hash: str) -> None:
    """Writes a streaming state as `.npz`, which appears whole or not at all; a file that is there is replaced.

    Args:
        path: The file.
        state: Input name to array, as `Session.state` returns it.
        model_hash: Tells the model from others, as `Session.model_hash`; empty if that is not known.

    Raises:
        OnnxcompError: If it cannot be written there.
    """
    path = Path(path)
    header = _Header(model=model_hash, names=list(state)).model_dump_json().encode()
    # Arrays are numbered: names of inputs may be what neither NumPy nor a zip file takes.
    arrays: dict[str, Any] = {f"state_{i}": array for i, array in enumerate(state.values())}
    try:
        with tempfile.TemporaryDirectory(prefix=".state.", dir=path.parent) as folder:
            written = Path(folder, "state")
            with written.open("wb") as file:
                np.savez(file, header=np.frombuffer(header, np.uint8), **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(written, path)
    except OSError as error:
        raise OnnxcompError(f"cannot write the state to {path}: {error.strerror or error}") from error


def load_state(
    path: str | os.PathLike[str], *, model_hash: str = "", states: Sequence[StateSpec] | None = None
) -> dict[str, Array]:
    """Reads a streaming state that `save_state` wrote.

    Args:
        path: The file.
        model_hash: Of the model that is to go on from it; empty takes a state of any model.
        states: What the model carries. The state is checked against it, and a file that holds more is not read.

    Returns:
        Input name to array.

    Raises:
        DataError: If the file is missing, damaged, not a state, or of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no state at {path}")
    limit = _MAX_BYTES if states is None else sum(s.nbytes + 1024 for s in states) + _MAX_HEADER
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > limit:
                raise DataError(f"{path} holds {size} bytes, more than the {limit} that the state may have")
            model, state = _read_all(archive, model_hash)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: it is encrypted, or compressed in a way that Python does not know
        raise DataError(f"{path} is no state of a stream, or is damaged: {_first(error)}") from error
    if model_hash and model != model_hash:
        raise DataError(f"{path} is the state of another model, or of another compilation of this one")
    if states is not None:
        check_state(state, states)
    return state


def _read_all(archive: zipfile.ZipFile, model_hash: str) -> tuple[str, dict[str, Array]]:
    """Hash of the model and state; the state is empty if the model is another one."""
    header = _Header.model_validate_json(_read(archive, "header").tobytes())
    if model_hash and header.model != model_hash:
        return header.model, {}
    state = {name: _read(archive, f"state_{i}") for i, name in enumerate(header.names)}
    if len(state) < len(archive.infolist()) - 1:
        raise ValueError("it holds arrays without a name")
    return header.model, state


def _read(archive: zipfile.ZipFile, name: str) -> Array:
    """One array, of which nothing is read or allocated before its size is known to be that of the file."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
        size = info.file_size - stream.tell()
        if dtype.hasobject or min(shape, default=0) < 0 or int(np.prod(shape, dtype=object)) * dtype.itemsize != size:
            raise ValueError(f"array {name} is not of the size that it states")
        content = bytearray(stream.read())
    return np.ndarray(shape, dtype, content, order="F" if fortran else "C")


def _first(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
