"""Runs of few rows and of many: sparse kernels serve the first, and a second model with dense products the others.

Tokens that are computed together drop little in common, so that most of a weight is read anyway. Both models compute
the same; which one runs is seen from the shapes of a feed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

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
        few: Up to how many rows the first model serves.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    axes: list[Axis] = Field(min_length=1, max_length=16)
    factor: int = Field(ge=1, le=1 << 31)
    few: int = Field(default=1, ge=1, le=1 << 31)

    def many(self, feed: Feed) -> bool:
        """Whether a feed is for the second model."""
        return self.count(feed) > self.few

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


def few_rows(model: ir.Model, table: Sequence[BreakEven]) -> int:
    """Up to how many rows no sparse op of a model is faster as a dense product, of the numbers that were measured."""
    calls = list(_calls(model))
    few = 1
    for count in sorted({entry.rows for entry in table if entry.rows > 1}):
        if any(why_dense(call, table, count) for call in calls):
            break
        few = count
    return few


def _calls(model: ir.Model) -> Iterator[SparseCall]:
    for node in model.graph.all_nodes():
        if node.domain == native.DOMAIN and (call := sparse_call(node)) is not None:
            yield call


def to_many_rows(model: ir.Model, table: Sequence[BreakEven], few: int = 1) -> int:
    """Turns sparse ops into dense products where more than `few` rows are faster so; returns how many."""
    found = ((call, why_dense(call, table, None, beyond=few)) for call in _calls(model))
    calls = [(call, reason) for call, reason in found if reason]
    for call, reason in calls:
        to_dense(model, call)
        call.node.metadata_props[LOWERED] = reason
    drop_unused(model)
    return len(calls)


class RowsSession(Session):
    """Runs a feed of few rows by one session, and any other by a second one, loaded when it is first needed.

    Neither carries state, so that one session serves any number of streams.

    Args:
        few: The first.
        many: Loads the second.
        rows: Tells the two apart.
    """

    def __init__(self, few: Session, many: Callable[[], Session], rows: Rows) -> None:
        self._few, self._many, self._rows = few, functools.cache(many), rows

    @property
    @override
    def inputs(self) -> Sequence[TensorSpec]:
        return self._few.inputs

    @property
    @override
    def outputs(self) -> Sequence[TensorSpec]:
        return self._few.outputs

    @override
    def run(self, feed: Feed) -> dict[str, Array]:
        return (self._many() if self._rows.many(feed) else self._few).run(feed)

    @override
    def reset(self) -> None:
        self._few.reset()
