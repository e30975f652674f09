"""Threads for functions of TVM's own: by its rules for GPUs, which take reductions and elementwise code well enough."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.nodes import OWN

_HOST = "tirx.is_host_func"
"""Attribute of a function that computes shapes, on the CPU."""


def schedule(module: Any) -> Any:
    """Schedules every function of TVM's own in a module, within the scope of a target, and returns the module."""
    scheduled = {
        name: _scheduled(function, name.name_hint)
        for name, function in module.functions.items()
        if isinstance(function, tirx.PrimFunc) and not any(key in (function.attrs or {}) for key in (OWN, _HOST))
    }
    module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    module.update(tvm.IRModule(scheduled))
    return module


def _scheduled(function: Any, name: str) -> Any:
    """The function by the first rule that takes it; the last takes all."""
    target = tvm.target.Target.current()
    rules = (dlight.gpu.Matmul(), dlight.gpu.GEMV(), dlight.gpu.Reduction(), dlight.gpu.GeneralReduction())
    for rule in (*rules, dlight.gpu.Fallback()):
        try:
            found = rule.apply(function, target, False)
        except Exception:  # some rules start before they know that they cannot, and fail in whatever way
            continue
        if found is not None:
            plan = found if isinstance(found, s_tir.Schedule) else found[0]
            return plan.mod["main"]
    raise CompileError(f"TVM finds no threads for {name}, a function of its own")
