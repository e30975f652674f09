"""Brings a model into the form that the other passes of this target expect, or refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from onnxcomp.errors import UnsupportedError
from onnxcomp.macs import count_macs
from onnxcomp.model import infer_shapes, name_nodes
from onnxcomp.ops import DOMAIN as PORTABLE
from onnxcomp.opset import opset, raise_opset
from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.targets.tvm.capabilities import MAX_OPSET
from onnxcomp.targets.tvm.nodes import DOMAIN
from onnxcomp.targets.tvm.supported import LOWERED, require_supported

MIN_OPSET = 13
"""Version of the default domain from which on ops mean the same to the other passes."""

MACS = "onnxcomp.tvm.macs"
"""Metadata of a node: its multiply-accumulates."""


@dataclass(frozen=True, kw_only=True)
class Prepare(Pass):
    """Refuses what cannot be compiled; raises the opset, names nodes, infers shapes, counts multiply-accumulates.

    Calls of portable ops stay for the passes behind, all other functions are inlined.
    """

    name: ClassVar[str] = "tvm_prepare"
    summary: ClassVar[str] = "Checks that a model can be compiled by TVM."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place.

        Raises:
            UnsupportedError: With the nodes that cannot be compiled.
            GraphError: If the opset cannot be raised.
        """
        if DOMAIN in model.opset_imports:
            return ()
        if opset(model) > MAX_OPSET:
            raise UnsupportedError(
                f"the model has opset {opset(model)}, TVM's importer is known to be right up to {MAX_OPSET}; export it "
                "with an older opset"
            )
        require_supported(model, LOWERED)
        if model.functions:
            common_passes.InlinePass(criteria=lambda function: function.domain != PORTABLE)(model)
        common_passes.RemoveInitializersFromInputsPass()(model)
        raise_opset(model, MIN_OPSET)
        name_nodes(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        infer_shapes(model)
        for node in model.graph:
            if macs := count_macs(node, 1):
                node.metadata_props[MACS] = str(macs)
        return ()


@dataclass(frozen=True, kw_only=True)
class Inline(Pass):
    """Puts the bodies of portable ops in place of calls that no kernel took."""

    name: ClassVar[str] = "tvm_inline"
    summary: ClassVar[str] = "Function bodies in place of calls."

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place."""
        if not model.functions:
            return ()
        common_passes.InlinePass()(model)
        name_nodes(model)
        common_passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        infer_shapes(model)
        return ()
