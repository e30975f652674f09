"""The only door to onnxscript's optimizer, whose interface is still young: everything else goes through here."""

from __future__ import annotations

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
        rewrite(model)
        return ir.passes.PassResult(model, nodes != len(model.graph))
