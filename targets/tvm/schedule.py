"""Loops of code that TVM makes itself: what is computed in between goes into the loop that needs it."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import ScheduleError

from onnxcomp.targets.tvm.nodes import OWN


def schedule(module: Any) -> Any:
    """Schedules every function of TVM's own in a module, and returns the module."""
    changed = {}
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and OWN not in (function.attrs or {}):
            changed[name] = inlined(function)
    module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
    module.update(tvm.IRModule(changed))
    return module


def inlined(function: Any) -> Any:
    """The function, named `main`, with every block inlined that is only read by others of it."""
    plan = s_tir.Schedule(function)
    for block in plan.get_child_blocks(plan.get_sblock("root")):
        with suppress(ScheduleError):  # a reduction, or what the function puts out
            plan.compute_inline(block)
    return plan.mod["main"]
