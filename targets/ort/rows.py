"""Runs of one row and of several: sparse kernels serve the first, and a second model of dense products the others.

Tokens that are computed together drop little in common, so that most of a weight is read anyway. Both models compute
the same; which one runs is seen from the shapes of a feed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from onnxcomp import native
from onnxcomp.break_even import BreakEven
from onnxcomp.errors import CalibrationError, DataError, DeviceError
from onnxcomp.target import Array, Feed, Session, TensorSpec
from onnxcomp.targets.ort.dense_forms import SparseCall, drop_unused, sparse_call, to_dense
from onnxcomp.targets.ort.lowering import LOWERED, why_dense
from onnxcomp.targets.ort.session import probe_session

_PRIMES = (2, 3, 5, 7)


class Axis(BaseModel):
    """An axis of an input."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    input: str
    axis: int = Field(ge=0, le=16)


class Rows(BaseModel):
    """How many rows the sparse ops of a model get, from the shapes of its inputs.

    Attributes:
        axes: Inputs and axes whose lengths are multiplied.
        factor: What they are multiplied with.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    axes: list[Axis] = Field(min_length=1, max_length=16)
    factor: int = Field(ge=1, le=1 << 31)

    def count(self, feed: Feed) -> int:
        """Rows that a feed makes; 1 if it does not fit the model."""
        found = self.factor
        for part in self.axes:
            array = feed.get(part.input)
            if array is None or part.axis >= array.ndim:
                return 1
            found *= array.shape[part.axis]
        return found


def find_rows(model: ir.Model) -> Rows | None:
    """Rows of a model whose sparse ops have a number of them that only the inputs tell; None for any other model.

    Found by running the first of the ops, which stands for all, since nothing but time depends on it: the sizes that
    inputs leave open get different primes, and which of them divide the number of rows tells where it comes from.
    """
    node = next((n for n in model.graph if n.domain == native.DOMAIN and sparse_call(n) is not None), None)
    if node is None or node.inputs[0] is None:
        return None
    name = str(node.inputs[0].name)
    axes: dict[str, Axis] = {}
    try:
        session = probe_session(model, [name], optimize=False)
        for spec in session.inputs:
            for axis, size in enumerate(spec.shape or ()):
                if not isinstance(size, int):
                    axes.setdefault(size or f"{spec.name} {axis}", Axis(input=spec.name, axis=axis))
    except CalibrationError:
        return None
    if not 0 < len(axes) <= len(_PRIMES):
        return None
    # Inputs may depend on each other, as the length of an attention mask does: not every choice can be run.
    for primes in itertools.permutations(_PRIMES, len(axes)):
        sizes = dict(zip(axes, primes, strict=True))
        try:
            found = session.run({s.name: _zeros(s, sizes) for s in session.inputs})[name]
        except (DataError, DeviceError):
            continue
        rows = math.prod(found.shape[:-1])
        chosen = [axes[size] for size, prime in sizes.items() if rows % prime == 0]
        factor = rows // math.prod(prime for prime in primes if rows % prime == 0)
        return Rows(axes=chosen, factor=factor) if chosen else None
    return None


def _zeros(spec: TensorSpec, sizes: Mapping[str, int]) -> Array:
    shape = [
        size if isinstance(size, int) else sizes[size or f"{spec.name} {axis}"]
        for axis, size in enumerate(spec.shape or ())
    ]
    return np.zeros(shape, spec.dtype)


def to_many_rows(model: ir.Model, table: Sequence[BreakEven]) -> int:
    """Turns the sparse ops of a model into dense products where several rows are faster so; returns how many."""
    calls: list[tuple[SparseCall, str]] = []
    for node in model.graph.all_nodes():
        call = sparse_call(node) if node.domain == native.DOMAIN else None
        if call is not None and (reason := why_dense(call, table, None)):
            calls.append((call, reason))
    for call, reason in calls:
        to_dense(model, call)
        call.node.metadata_props[LOWERED] = reason
    drop_unused(model)
    return len(calls)


class RowsSession(Session):
    """Runs a feed of one row by one session, and any other by a second one, loaded when it is first needed.

    Args:
        one: The first.
        many: Loads the second.
        rows: Tells the two apart.
    """

    def __init__(self, one: Session, many: Callable[[], Session], rows: Rows) -> None:
        self._one, self._load, self._rows = one, many, rows
        self._many: Session | None = None

    @property
    @override
    def inputs(self) -> Sequence[TensorSpec]:
        return self._one.inputs

    @property
    @override
    def outputs(self) -> Sequence[TensorSpec]:
        return self._one.outputs

    @override
    def run(self, feed: Feed) -> dict[str, Array]:
        if self._rows.count(feed) <= 1:
            return self._one.run(feed)
        if self._many is None:
            self._many = self._load()
        return self._many.run(feed)

    @override
    def reset(self) -> None:
        self._one.reset()
