"""Gives the functions of a module the schedules that were found for them, kept or just searched for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir.meta_schedule import database

from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.manifest import TUNING, TunedEntry
from onnxcomp.targets.tvm.nodes import OWN
from onnxcomp.targets.tvm.tuning import Tuning, store
from onnxcomp.targets.tvm.tuning.search import search
from onnxcomp.targets.tvm.tuning.store import Result
from onnxcomp.targets.tvm.tuning.tasks import Task, find_tasks

_NOT_REACHED = "the time was over before it was measured; it runs by TVM's plain loop"
_NOTHING_KEPT = "no result is kept, and no time was given; it runs by TVM's plain loop"
_SLOWER = "no schedule was faster than TVM's plain loop, by which it runs"
_DYNAMIC = "its shapes are not fixed, so there is no search; fix them with --input"


class Tuner:
    """Tunes one module, and tells what became of each function.

    Args:
        machine: What to compile for; it has to be this machine.
        tuning: What is asked for.

    Attributes:
        entries: What became of each function, once the module was tuned.
    """

    def __init__(self, machine: Machine, tuning: Tuning) -> None:
        self.entries: list[TunedEntry] = []
        self._machine = machine
        self._tuning = tuning
        self._place = store.folder(machine)
        self._used: list[Any] = []

    def __call__(self, module: Any) -> Any:
        """The module, after fusion, with every function replaced that has a schedule.

        Raises:
            CompileError: If the search fails, or its results cannot be kept.
        """
        found = find_tasks(module)
        records = database.MemoryDatabase()
        workloads = {task.key: records.commit_workload(task.workload) for task in found.tasks}
        known: dict[str, Result] = {}
        for task in found.tasks:
            result = store.read(self._place, task.key)
            if result is not None and _fits(result, task, workloads[task.key]):
                known[task.key] = result
        reasons = self._search(list(found.tasks), known, {key: w.as_json() for key, w in workloads.items()})
        changed: dict[Any, Any] = {}
        for task in found.tasks:
            changed.update(self._apply(module, task, workloads[task.key], known.get(task.key), reasons))
        self.entries += [
            TunedEntry(function=name, calls=1, trials=0, used=False, note=_DYNAMIC) for name in found.dynamic
        ]
        module = tvm.IRModule(dict(module.functions), attrs=module.attrs)
        module.update(tvm.IRModule(changed))
        return module

    def write(self, folder: Path) -> None:
        """Writes workloads and records of the schedules in use, as MetaSchedule's `JSONDatabase` reads them."""
        if not self._used:
            return
        kept = database.JSONDatabase(*(str(folder / name) for name in TUNING))
        for record in self._used:
            workload = kept.commit_workload(record.workload.mod)
            kept.commit_tuning_record(
                database.TuningRecord(record.trace, workload, record.run_secs, record.target, record.args_info)
            )

    def _search(self, tasks: list[Task], known: dict[str, Result], workloads: Mapping[str, Any]) -> Mapping[str, str]:
        """Searches for what is not known or not finished, and adds to `known`."""
        open_ = [t for t in tasks if t.key not in known] + [
            t for t in tasks if t.key in known and not known[t.key].finished
        ]
        if not open_ or not self._tuning.seconds:
            return {}

        def keep(key: str, result: Result) -> None:
            known[key] = result
            if result.trials:
                store.write(self._place, key, result)

        return search(open_, dict(known), workloads, self._machine, self._tuning, keep)

    def _apply(
        self, module: Any, task: Task, workload: Any, result: Result | None, reasons: Mapping[str, str]
    ) -> dict[Any, Any]:
        """Functions of a task with their schedule, if there is one that is faster."""
        note, tuned = "", None
        if result is not None and result.record is not None:
            record = database.TuningRecord.from_json(result.record, workload)
            tuned = _scheduled(record, task).without_attr("global_symbol").with_attr(OWN, 1)
            self._used.append(record)
        elif task.key in reasons:
            note = f"no search: {reasons[task.key]}"
        elif result is not None and result.trials:
            note = _SLOWER
        else:
            note = _NOT_REACHED if self._tuning.seconds else _NOTHING_KEPT
        self.entries.append(
            TunedEntry(
                function=" ".join(task.functions),
                calls=task.calls,
                trials=result.trials if result else 0,
                before_us=result.before_us if result else None,
                after_us=result.after_us if result else None,
                used=tuned is not None,
                note=note,
            )
        )
        return {} if tuned is None else {module.get_global_var(name): tuned for name in task.functions}


def _fits(result: Result, task: Task, workload: Any) -> bool:
    """Whether a kept result is of this very function (hashes may meet), and whole."""
    try:
        same = tvm_ffi.structural_equal(database.Workload.from_json(result.workload).mod, task.workload)
        if same and result.record is not None:
            _scheduled(database.TuningRecord.from_json(result.record, workload), task)
    except Exception:  # whatever TVM makes of a damaged file
        return False
    return bool(same)


def _scheduled(record: Any, task: Task) -> Any:
    plan = s_tir.Schedule(task.workload)
    record.trace.apply_to_schedule(plan, remove_postproc=False)
    return plan.mod["main"]
