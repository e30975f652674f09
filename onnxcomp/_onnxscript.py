"""The only door to onnxscript's optimizer, whose interface is still young: everything else goes through here."""

from __future__ import annotations

from typing import TypeAlias

import onnx_ir as ir
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import rewrite


class FoldConstants(ir.passes.InPlacePass):
    """Evaluates what depends on constants only.

    Args:
        output_limit: Largest result in elements that is kept.
    """

    def __init__(self, output_limit: int) -> None:
        super().__init__()
        self._limit = output_limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = len(model.graph)
        fold_constants_ir(model, onnx_shape_inference=True, output_size_limit=self._limit)
        return ir.passes.PassResult(model, nodes != len(model.graph))


class Simplify(ir.passes.InPlacePass):
    """onnxscript's rules that keep the function: no-ops, chains of reshapes and casts, BatchNorm into Conv."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        nodes = len(model.graph)
        before = _by_input(model)
        rewrite(model)
        _restore_names(before, _by_input(model))
        return ir.passes.PassResult(model, nodes != len(model.graph))


_Key: TypeAlias = "tuple[str, str | None]"


def _by_input(model: ir.Model) -> dict[_Key, dict[str | None, ir.Node]]:
    """Nodes by op type and name of the first input, then by name, in order."""
    found: dict[_Key, dict[str | None, ir.Node]] = {}
    for node in model.graph.all_nodes():
        first = node.inputs[0] if node.inputs else None
        found.setdefault((node.op_type, first.name if first is not None else None), {})[node.name] = node
    return found


def _restore_names(before: dict[_Key, dict[str | None, ir.Node]], after: dict[_Key, dict[str | None, ir.Node]]) -> None:
    """A rule puts a nameless node in the place of the old one; selectors and reports go by the name that it had."""
    for key, nodes in after.items():
        old = before.get(key, {})
        gone = [name for name in old if name not in nodes]
        new = [node for name, node in nodes.items() if name not in old]
        if len(gone) == len(new):
            for name, node in zip(gone, new, strict=True):
                node.name = name
