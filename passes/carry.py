"""Tells which outputs of a model are its inputs of the next step, so that sessions carry them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from onnxcomp.errors import PassError
from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.state import StateSpec, model_state, write_state


@dataclass(frozen=True, kw_only=True)
class Carry(Pass):
    """Lists inputs and outputs of a recurrent model as its streaming state; the graph stays as it is.

    Exporters write hidden values and caches of a streaming model as plain inputs and outputs. Once they are listed,
    data has to give the other inputs only, and calibration, comparison and sessions run a sequence as a stream that
    starts with zeros.

    Attributes:
        state: Input name to the output that it takes up in the next step.
        sizes: Input name to its shape, for inputs with open dimensions, which otherwise are taken to be 1.
    """

    name: ClassVar[str] = "carry"
    summary: ClassVar[str] = "lists hidden values of a recurrent model as state that sessions carry"
    selective: ClassVar[bool] = False

    state: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @override
    def requires(self, model: ir.Model, context: Context) -> None:
        inputs = {v.name: v for v in model.graph.inputs}
        outputs = {v.name: v for v in model.graph.outputs}
        for source, target in self.state.items():
            if source not in inputs or target not in outputs:
                raise PassError(
                    f"the model has no input {source!r} or no output {target!r}; it has {sorted(map(str, inputs))} and "
                    f"{sorted(map(str, outputs))}"
                )
            if inputs[source].shape is None and source not in self.sizes:
                raise PassError(f"input {source!r} states no shape; give it in sizes")
            kinds = inputs[source].dtype, outputs[target].dtype
            if kinds[0] is None or (kinds[1] is not None and kinds[0] != kinds[1]):
                raise PassError(f"{source!r} and {target!r} are of different types: {kinds[0]} and {kinds[1]}")
        if unknown := self.sizes.keys() - self.state.keys():
            raise PassError(f"sizes are given for {sorted(unknown)}, which state does not name")

    @override
    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        before = {s.input for s in model_state(model)}
        new = [_spec(v, self.state[v.name], self.sizes.get(v.name)) for v in model.graph.inputs if v.name in self.state]
        write_state(model, [*model_state(model), *(s for s in new if s.input not in before)])
        return [
            Edit(action="refused", node=s.input, op_type="input", detail="it is state already")
            if s.input in before
            else Edit(action="applied", node=s.input, op_type="input", detail=f"takes up {s.output}, {s.nbytes} bytes")
            for s in new
        ]


def _spec(value: ir.Value, output: str, size: Sequence[int] | None) -> StateSpec:
    assert value.dtype is not None
    if size is None:
        assert value.shape is not None
        size = [d if isinstance(d, int) and d >= 0 else 1 for d in value.shape]
    elif value.shape is not None:
        fits = len(size) == len(value.shape) and all(
            d == s for d, s in zip(value.shape, size, strict=True) if isinstance(d, int) and d >= 0
        )
        if not fits:
            raise PassError(f"input {value.name!r} has shape {value.shape}, not {list(size)}")
    return StateSpec(input=str(value.name), output=output, shape=list(size), dtype=str(np.dtype(value.dtype.numpy())))
