"""From Relax to code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from onnxcomp.targets.tvm.gpu import schedule as gpu
from onnxcomp.targets.tvm.gpu.machine import Gpu
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.schedule import schedule


def fusion(machine: Machine) -> list[Any]:
    """Passes that make functions of operators, and fuse those."""
    sorting = [relax.backend.DispatchSortScan()] if isinstance(machine, Gpu) else []
    return [
        *sorting,
        relax.transform.LegalizeOps(),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FoldConstant(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.DeadCodeElimination(),
    ]


def build(module: Any, machine: Machine, tune: Callable[[Any], Any] | None = None) -> Any:
    """Compiles an imported module to a `relax.Executable`.

    Args:
        module: What was imported.
        machine: What to compile for.
        tune: Gives functions of the module, after fusion, schedules; those without one then get TVM's plain loops.
    """
    target = machine.target()
    plan = gpu.schedule if isinstance(machine, Gpu) else schedule
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

    def pipeline(mod: Any) -> Any:  # no pass of TVM's, which would make RuntimeErrors of interrupts and our errors
        with target:
            mod = tvm.transform.Sequential(fusion(machine))(mod)
            if tune is not None:
                mod = tune(mod)
            return tvm.transform.Sequential(lowered)(plan(mod))

    return tvm.compile(module, target=target, relax_pipeline=pipeline)
