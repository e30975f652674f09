"""How the state of a stream gets from one run into the next.

What is handed on is the result of one run and the feed of the next, without a copy. What is bound has buffers that
onnxruntime is told of once for each stream: state that a kernel changes in place has one, which is input and output of
the same run, so that what did not change is not written; any other state has two, which take turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.state import StateSpec
from onnxcomp.target import Array, Feed
from onnxcomp.targets.ort.runtime import onnxruntime

_ALIGNMENT = 64  # of a cache line, and of what vector instructions load at once


class Handed:
    """Carries state by feeding results; a run that fails leaves it as it was.

    Args:
        session: The `onnxruntime.InferenceSession`.
        states: Its state; none is changed in place.
        fetch: Names of all its outputs.
        returns: Names of those that a run returns.
    """

    def __init__(self, session: Any, states: Sequence[StateSpec], fetch: Sequence[str], returns: Sequence[str]) -> None:
        self._session, self._states, self._fetch, self._returns = session, states, list(fetch), returns
        self._carried: dict[str, Array] = {s.input: s.zeros() for s in states}

    def run(self, feed: Feed) -> dict[str, Array]:
        """Outputs by name; raises what onnxruntime raises."""
        values = self._session.run(self._fetch, {**feed, **self._carried})
        results: dict[str, Array] = dict(zip(self._fetch, values, strict=True))
        self._carried = {s.input: results[s.output] for s in self._states}
        return {name: results[name] for name in self._returns}

    def read(self) -> Mapping[str, Array]:
        """The state by input name, not copied."""
        return self._carried

    def write(self, state: Mapping[str, Array]) -> None:
        """Copies a state that is of the right names, shapes and dtypes."""
        self._carried = {name: array.copy() for name, array in state.items()}


class Bound:
    """Carries state in buffers of its own, bound to the inputs and outputs of the session once.

    A run that fails may leave what is changed in place half written. Strings cannot be bound. Arguments are those of
    `Handed`.
    """

    def __init__(self, session: Any, states: Sequence[StateSpec], fetch: Sequence[str], returns: Sequence[str]) -> None:
        self._session = session
        self._returns = [(name, fetch.index(name)) for name in returns]
        self._own = {s.output for s in states}
        self._fresh = [name for name in fetch if name not in self._own]
        # Of the two sides, one is read while the other is written; in place both are the same buffer.
        one = {s.input: _buffer(s) for s in states}
        other = {s.input: one[s.input] if s.in_place else _buffer(s) for s in states}
        self._sides = (one, other)
        self._side = 0
        wrap = onnxruntime().OrtValue.ortvalue_from_numpy  # shares the memory
        values = [{name: wrap(array) for name, array in side.items()} for side in self._sides]
        self._bindings = [session.io_binding() for _ in values]
        for binding, source, target in zip(self._bindings, values, reversed(values), strict=True):
            for name in fetch:  # results come in the order in which outputs were bound
                binding.bind_output(name, "cpu")
            for state in states:
                binding.bind_ortvalue_input(state.input, source[state.input])
                binding.bind_ortvalue_output(state.output, target[state.input])

    def run(self, feed: Feed) -> dict[str, Array]:
        """Outputs by name; raises what onnxruntime raises."""
        binding = self._bindings[self._side]
        for name, array in feed.items():
            binding.bind_cpu_input(name, array if array.flags.c_contiguous else array.copy(order="C"))
        for name in self._fresh:  # else the run would write over what the last one returned
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        values = binding.get_outputs_as_ortvaluevector()
        found: dict[str, Array] = {name: values[index].numpy() for name, index in self._returns}
        self._side = 1 - self._side
        return {name: array.copy() if name in self._own else array for name, array in found.items()}

    def read(self) -> Mapping[str, Array]:
        """The state by input name, not copied; the next run changes it."""
        return self._sides[self._side]

    def write(self, state: Mapping[str, Array]) -> None:
        """Copies a state that is of the right names, shapes and dtypes."""
        for name, array in self._sides[self._side].items():
            array[...] = state[name]


def _buffer(state: StateSpec) -> Array:
    """Zeros at an aligned address."""
    memory = np.zeros(state.nbytes + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + state.nbytes].view(state.dtype).reshape(state.shape)
