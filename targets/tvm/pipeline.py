"""From Relax to code."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.schedule import schedule


def build(module: Any, machine: Machine) -> Any:
    """Compiles an imported module to a `relax.Executable`."""
    target = machine.target()
    fused = [
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]
    lowered = [
        relax.transform.RewriteDataflowReshape(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        relax.transform.AttachGlobalSymbol(),
    ]

    @tvm.transform.module_pass(opt_level=0, name="onnxcomp")  # type: ignore[untyped-decorator]
    def pipeline(mod: Any, _: Any) -> Any:
        with target:
            mod = tvm.transform.Sequential(fused)(mod)
            return tvm.transform.Sequential(lowered)(schedule(mod))

    return tvm.compile(module, target=target, relax_pipeline=pipeline)
