"""All passes of the target, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxcomp.rewrite import Context, Edit, Pass
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.nodes import DOMAIN
from onnxcomp.targets.tvm.supported import require_supported


@dataclass(frozen=True, kw_only=True)
class Kernels(Pass):
    """Everything that a kernel of ours takes becomes a node of ours.

    Attributes:
        machine: What kernels and packed weights are for.
    """

    name: ClassVar[str] = "tvm_kernels"
    summary: ClassVar[str] = "Layers to kernels in TIR."
    machine: Machine

    def apply(self, model: ir.Model, context: Context) -> Sequence[Edit]:
        """Edits `model` in place.

        Raises:
            UnsupportedError: If something is left that neither kernels nor TVM take.
        """
        if DOMAIN in model.opset_imports:
            return ()
        model.opset_imports[DOMAIN] = 1
        edits = [edit for step in passes(self.machine) for edit in step.apply(model, context)]
        require_supported(model)
        return edits


def passes(machine: Machine) -> tuple[Pass, ...]:
    """Passes after `Prepare`. They are imported here, since with their kernels they import TVM, which takes seconds."""
    from onnxcomp.targets.tvm.lower.attention import Attention
    from onnxcomp.targets.tvm.lower.canonical import Canonical
    from onnxcomp.targets.tvm.lower.concats import Concats
    from onnxcomp.targets.tvm.lower.convs import Convolutions
    from onnxcomp.targets.tvm.lower.delta import Delta
    from onnxcomp.targets.tvm.lower.dense_products import DenseProducts
    from onnxcomp.targets.tvm.lower.epilogues import Epilogues
    from onnxcomp.targets.tvm.lower.integers import Integers
    from onnxcomp.targets.tvm.lower.layouts import Layouts
    from onnxcomp.targets.tvm.lower.matmuls import MatMuls
    from onnxcomp.targets.tvm.lower.nm import Nm
    from onnxcomp.targets.tvm.lower.pools import Pools
    from onnxcomp.targets.tvm.lower.prepare import Inline
    from onnxcomp.targets.tvm.lower.products import Products
    from onnxcomp.targets.tvm.lower.recurrent import Recurrent
    from onnxcomp.targets.tvm.lower.sparse import Sparse

    return (
        Delta(maps=not isinstance(machine, Gpu)),  # what it takes apart, cells without a kernel, is for `Recurrent`
        DenseProducts(),
        Sparse(machine=machine),
        Nm(machine=machine),
        Recurrent(machine=machine),
        Inline(),
        Integers(machine=machine),  # before what is recognised in float
        Canonical(),
        Attention(),
        MatMuls(),
        Concats(),
        Convolutions(machine=machine),
        Pools(),
        Layouts(),
        Products(machine=machine),
        Epilogues(),
    )
