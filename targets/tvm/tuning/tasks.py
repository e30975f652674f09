"""Functions of TVM's own that are worth a search, out of a fused module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx

from onnxcomp.targets.tvm.nodes import OWN

_MIN_FLOPS = 200_000
"""Of all calls of a function: below it takes microseconds, and a search gains nothing that shows."""

_MIN_INTENSITY = 4
"""Operations an element of the output: below, memory decides, and the plain loop does it as well as any."""

_MIN_SHARE = 0.01
"""Of the operations of all functions that are candidates."""

_REDUCTION = 2


@dataclass(frozen=True, kw_only=True)
class Task:
    """A workload to find a schedule for.

    Attributes:
        functions: Names of the functions that are this workload, in their module.
        workload: The function as a module, named `main`.
        key: Hash of the workload, the same in every process.
        calls: How often the model calls it.
        flops: Operations of one call.
    """

    functions: tuple[str, ...]
    workload: Any
    key: str
    calls: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a module holds.

    Attributes:
        tasks: Those worth a search, the most operations first.
        dynamic: Names of functions with sums over something whose shapes are not fixed; there is no search for them.
    """

    tasks: Sequence[Task]
    dynamic: Sequence[str]


def find_tasks(module: Any) -> Found:
    """Looks through a module after fusion, before anything in it is scheduled."""
    calls = _calls(module)
    found: dict[str, Task] = {}
    dynamic = []
    for variable, function in module.functions_items():
        name = variable.name_hint
        if not isinstance(function, tirx.PrimFunc) or OWN in (function.attrs or {}) or not calls[name]:
            continue
        if not _fixed(function):
            if _reduces(function):
                dynamic.append(name)
            continue
        workload = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        flops = _flops(workload)
        outputs = prod(int(d) for d in function.params[-1].shape)
        if flops * calls[name] < _MIN_FLOPS or flops < _MIN_INTENSITY * outputs:
            continue
        key = f"{tvm_ffi.structural_hash(workload) & (1 << 64) - 1:016x}"
        same = found.get(key)
        found[key] = Task(
            functions=(*(same.functions if same else ()), name),
            workload=workload,
            key=key,
            calls=calls[name] + (same.calls if same else 0),
            flops=flops,
        )
    total = sum(task.flops * task.calls for task in found.values())
    worth = [task for task in found.values() if task.flops * task.calls >= _MIN_SHARE * total]
    return Found(tasks=sorted(worth, key=lambda t: -t.flops * t.calls), dynamic=sorted(dynamic))


def _calls(module: Any) -> Counter[str]:
    """How often each function is called from Relax; a loop counts as one call."""
    found: Counter[str] = Counter()

    def visit(expression: Any) -> None:
        if isinstance(expression, relax.Call):
            for argument in expression.args:
                if isinstance(argument, tvm.ir.GlobalVar):
                    found[argument.name_hint] += 1

    for function in module.functions.values():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, visit)
    return found


def _fixed(function: Any) -> bool:
    return all(
        isinstance(parameter, tirx.Buffer) and all(isinstance(d, tirx.IntImm) for d in parameter.shape)
        for parameter in function.params
    )


def _reduces(function: Any) -> bool:
    plan = s_tir.Schedule(function)
    blocks = plan.get_child_blocks(plan.get_sblock("root"))
    return any(int(v.iter_type) == _REDUCTION for block in blocks for v in plan.get(block).iter_vars)


def _flops(workload: Any) -> float:
    try:
        return float(s_tir.analysis.estimate_tir_flops(workload))
    except RuntimeError:  # an intrinsic that TVM's estimate does not know
        return 0.0
