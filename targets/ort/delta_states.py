"""State of a streaming model while it is lowered: kernels keep it in their own layout, and update it in place."""

from __future__ import annotations

import onnx_ir as ir

from onnxcomp.edit import Editor
from onnxcomp.state import StateSpec, model_state, write_state


class StreamStates:
    """The states of a model, edited.

    Args:
        model: The model.
        editor: Of its main graph.
    """

    def __init__(self, model: ir.Model, editor: Editor) -> None:
        self._model, self._editor = model, editor
        self._specs = {s.input: s for s in model_state(model)}

    def new(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """A graph input for float state that a kernel updates; `put` has to follow."""
        value = ir.Value(
            name=self._editor.free(f"{name}_in"), type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape)
        )
        self._model.graph.inputs.append(value)
        output = self._editor.free(f"{name}_out")
        self._specs[str(value.name)] = StateSpec(
            input=str(value.name), output=output, shape=list(shape), dtype="float32", in_place=True
        )
        return value

    def put(self, read: ir.Value, value: ir.Value) -> None:
        """Makes an output of a kernel the next value of new state."""
        value.name = self._specs[str(read.name)].output
        self._model.graph.outputs.append(value)

    def take_over(self, read: ir.Value, held: ir.Value, value: ir.Value, shape: tuple[int, ...]) -> None:
        """Lets a kernel's output `value` be the next value of state that `held` was until now.

        Args:
            read: Graph input of the state.
            held: The graph output that it was carried from; loses its name.
            value: Output of a kernel that updates it in place.
            shape: Shape of the state from now on.
        """
        graph = self._model.graph
        spec = self._specs[str(read.name)]
        self._specs[spec.input] = spec.model_copy(update={"shape": list(shape), "in_place": True})
        read.shape = ir.Shape(shape)
        index = next(i for i, output in enumerate(graph.outputs) if output is held)
        held.name = self._editor.free(f"{spec.output}_dense")
        value.name = spec.output
        graph.outputs[index] = value

    def write(self) -> None:
        """Lists the states in the model's metadata."""
        write_state(self._model, self._specs.values())
