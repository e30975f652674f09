"""Makes a model's own statements on shapes trustworthy before anything is concluded from them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxcomp.model import infer_shapes
from onnxcomp.rewrite import Edit

_NAME = "unknown_dimension"


def settle_shapes(model: ir.Model) -> list[Edit]:
    """Infers shapes, and drops those that the file states if one of them contradicts what follows from the inputs.

    A batch size that was made dynamic by hand leaves the old one written all over the graph. Runtimes do not mind, but
    a fold that believes it fixes the batch size.
    """
    fresh = _inferred_anew(model)
    stated = list(_computed(model.graph))
    if not any(_contradicts(value.shape, fresh.get(value.name)) for value in stated):
        infer_shapes(model)
        return []
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in graph:
            for value in node.outputs:
                value.shape = None
    infer_shapes(model)
    detail = "the shapes in the file contradict its inputs; inferred anew"
    return [Edit(action="applied", node="", op_type="model", detail=detail)]


def _inferred_anew(model: ir.Model) -> dict[str | None, ir.Shape | None]:
    """Shapes of the main graph as they follow from the inputs; every open dimension of an input has a name."""
    copy = model.clone()
    for value in _computed(copy.graph):
        value.shape = None
    for i, value in enumerate(copy.graph.inputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [d if isinstance(d, int) and d >= 0 else f"{_NAME} {i} {k}" for k, d in enumerate(value.shape)]
            )
    infer_shapes(copy)
    return {value.name: value.shape for value in _computed(copy.graph)}


def _contradicts(stated: ir.Shape | None, found: ir.Shape | None) -> bool:
    """Whether a stated size is another one, or one that depends on the input."""
    if stated is None or found is None:
        return False
    if len(stated) != len(found):
        return True
    return any(
        isinstance(s, int) and (s != f if isinstance(f, int) else str(f.value).startswith(_NAME))
        for s, f in zip(stated, found, strict=True)
    )


def _computed(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs
