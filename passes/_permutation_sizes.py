"""Sizes of values, those included that shape inference leaves open although they follow from others."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.passes._permutation_indices import single_size
from onnxcomp.passes._turns import Shapes, Sizes, constant_shape


class KnownSizes:
    """Shapes of the values of a model.

    Exporters compute the shape that a Reshape makes from the batch size, and inference then knows none of it. A size
    follows where nothing else is open in the Reshape, and where a weight of known size is multiplied with.

    Args:
        model: The model; it is not changed.

    Attributes:
        inferred: What shape inference says.
    """

    def __init__(self, model: ir.Model) -> None:
        self.inferred = Shapes(model)
        self._named: dict[str, int] = {}
        for node in model.graph:
            self._named.update(self._follow(node))

    def of(self, value: ir.Value | None) -> Sizes | None:
        """Sizes of a value; None if not even their number is known."""
        sizes = self.inferred.sizes(value)
        if sizes or value is None or constant_shape(value) == () or (value.shape is not None and not len(value.shape)):
            return tuple(self._named.get(s, s) if isinstance(s, str) else s for s in sizes)
        return None

    def _follow(self, node: ir.Node) -> Iterator[tuple[str, int]]:
        if node.op_type not in ("Reshape", "MatMul") or node.domain:
            return
        first, second = self.of(node.inputs[0]), self.of(node.outputs[0])
        if first is None or second is None:
            return
        if node.op_type == "Reshape":
            found = single_size(first, second)
            if found is not None:
                yield found
            return
        weight = constant_shape(node.inputs[1])
        if weight is not None and len(weight) > 1 and first and isinstance(first[-1], str):
            yield first[-1], weight[-2]
