"""Steps of a stream in which so much changes that the dense model is faster: they run it, and leave the state alone.

State that kernels hold is what was last sent. A step that does not touch it leaves it valid: the next step that does
finds more changed, and no more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from onnxcomp.state import StateSpec, check_state
from onnxcomp.target import Array, Feed, Session, TensorSpec

_STRIDE = 4  # one pixel of so many in each direction tells how much changed
_UNSTARTED = -1
# The step that brings the state up to date costs as much as a dense one and somewhat more. One with little change is
# enough to try it; where fewer than some came of that, twice as many are waited for the next time.
_CALM, _LONGEST_WAIT, _SHORT = 1, 32, 3


class DenseSteps(BaseModel):
    """When a step runs the dense model.

    Attributes:
        thresholds: Input name to the change of a pixel, as root mean square over channels, above which it counts.
        share: Share of pixels of an input that change from one step to the next, 0 to 1, from which the dense model is
            faster.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    thresholds: dict[str, float] = Field(min_length=1)
    share: float = Field(ge=0, le=1)


class DenseStepsSession(Session):
    """A stream that runs the dense model while much changes.

    Args:
        step: The streaming model.
        dense: Loads the dense model, which carries no state.
        when: Tells the two apart.
    """

    def __init__(self, step: Session, dense: Callable[[], Session], when: DenseSteps) -> None:
        self._step, self._dense, self._when = step, functools.cache(dense), when
        shapes = {s.name: s.shape for s in step.inputs}
        self._own = tuple(_spec(name, shapes[name]) for name in when.thresholds)
        self._rest_spec = StateSpec(input="calm steps", output="calm steps", shape=[2], dtype="int64")
        self._before: dict[str, Array] = {}
        self._calm, self._wait = _UNSTARTED, _CALM
        self._forget()

    @property
    @override
    def inputs(self) -> Sequence[TensorSpec]:
        return self._step.inputs

    @property
    @override
    def outputs(self) -> Sequence[TensorSpec]:
        return self._step.outputs

    @property
    @override
    def states(self) -> Sequence[StateSpec]:
        """The state of the kernels, and what was seen of the inputs of the last step."""
        return (*self._step.states, *self._own, self._rest_spec)

    @property
    @override
    def model_hash(self) -> str:
        return self._step.model_hash

    @override
    def run(self, feed: Feed) -> dict[str, Array]:
        chosen = self._step
        if all(isinstance(feed.get(s.input), np.ndarray) for s in self._own):  # else the session says what is wrong
            seen = {s.input: _seen(feed[s.input]) for s in self._own}
            if all(list(array.shape) == s.shape for array, s in zip(seen.values(), self._own, strict=True)):
                self._look(seen)
                chosen = self._step if self._calm >= self._wait else self._dense()
                self._before = seen
        return chosen.run(feed)

    def _look(self, seen: Mapping[str, Array]) -> None:
        """Counts calm steps, of which there are as many as are waited for when a stream starts."""
        if self._calm == _UNSTARTED:
            self._calm = self._wait
        elif any(self._share(name, array) >= self._when.share for name, array in seen.items()):
            if self._calm >= self._wait:  # the state was kept up to date
                short = self._calm - self._wait + 1 < _SHORT
                self._wait = min(2 * self._wait, _LONGEST_WAIT) if short else _CALM
            self._calm = 0
        else:
            self._calm = min(self._calm + 1, _LONGEST_WAIT + _SHORT)

    def _share(self, name: str, seen: Array) -> float:
        change = seen - self._before[name]
        # As a sum over channels: comparing is cheaper than dividing.
        limit = np.float32(self._when.thresholds[name]) ** 2 * change.shape[1]
        return 1 - float(np.mean(np.einsum("nchw,nchw->nhw", change, change) <= limit))

    @override
    def reset(self) -> None:
        self._step.reset()
        self._forget()

    def _forget(self) -> None:
        self._before = {s.input: s.zeros() for s in self._own}
        self._calm, self._wait = _UNSTARTED, _CALM

    @override
    def state(self) -> dict[str, Array]:
        own = {name: array.copy() for name, array in self._before.items()}
        return {**self._step.state(), **own, self._rest_spec.input: np.array([self._calm, self._wait], np.int64)}

    @override
    def restore(self, state: Mapping[str, Array]) -> None:
        check_state(state, self.states)
        own = {s.input for s in (*self._own, self._rest_spec)}
        self._step.restore({name: array for name, array in state.items() if name not in own})
        self._before = {s.input: state[s.input].copy() for s in self._own}
        calm, wait = (int(v) for v in state[self._rest_spec.input])
        self._calm = min(max(calm, _UNSTARTED), _LONGEST_WAIT + _SHORT)
        self._wait = min(max(wait, _CALM), _LONGEST_WAIT)

    @override
    def stream(self) -> DenseStepsSession:
        return DenseStepsSession(self._step.stream(), self._dense, self._when)


def _seen(array: Array) -> Array:
    return np.ascontiguousarray(array[..., ::_STRIDE, ::_STRIDE])


def _spec(name: str, shape: Sequence[int | str | None] | None) -> StateSpec:
    """What is kept of an input of fixed shape `[N, C, H, W]`, under the name of the input."""
    sizes = [d for d in shape or () if isinstance(d, int)]
    return StateSpec(
        input=name, output=name, shape=[*sizes[:2], *(-(-d // _STRIDE) for d in sizes[2:])], dtype="float32"
    )
