"""The process that searches: makes schedules, measures them in turns with the plain loop, and tells what is better.

It reads a job from standard input and writes a line of JSON whenever it knows more of a task, so it can be ended at any
time. A schedule that crashes, or takes for ever, takes this process along and no other.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule

from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.schedule import inlined

_INTRINSICS = "tvm.s_tir.tensor_intrin"
"""Its import parses the intrinsics of every accelerator, which takes longer than most searches; the rules for plain
vectors use none of them."""

_ROUND = 8
"""Schedules a round: the time may be short, and every task is to have its first."""

_STALE = 8
"""Rounds without gain after which a search is at its end."""

_GAIN = 0.98
_SPAN, _MOST_RUNS = 0.05, 30
"""Seconds and runs to measure one schedule with."""

_TOLERANCE = {"float16": 5e-3, "float32": 2e-5}
"""Of the largest value of an output by type, for sums in another order."""

_PATIENCE = 10
"""Seconds beyond the time that was given after which the process ends itself, should nobody else do it."""


class Task:
    """The search of one workload."""

    def __init__(self, job: Mapping[str, Any], machine: Machine, model: Any, *, most: int, seed: int) -> None:
        self.calls = job["calls"]
        self.trials = job["trials"]
        self.finished = False
        self.best: float | None = None
        self.record: Any = None
        self.stale = 0
        self._most = most
        self._rounds = 0
        self._target = machine.target()
        self._model = model
        self._database = meta_schedule.database.MemoryDatabase()
        self._workload = meta_schedule.database.Workload.from_json(job["workload"])
        self._workload = self._database.commit_workload(self._workload.mod)
        function = self._workload.mod["main"]
        self._arguments = [_argument(np.random.default_rng(i), p) for i, p in enumerate(function.params)]
        self._given = [np.array(a.numpy()) for a in self._arguments]
        self._plain = self._built(tvm.IRModule({"main": inlined(function)}))
        self._fastest = self._plain
        self._wanted = self._outputs(self._plain)
        self.before = _seconds(self._plain, self._arguments)
        self._known = job["record"]
        if self._known is not None:
            self._resume(meta_schedule.database.TuningRecord.from_json(self._known, self._workload))
        # Evolution takes seconds a round: the first schedules are to be measured before that.
        self._sampling = self._searching(meta_schedule.search_strategy.ReplayTrace(), seed)
        self._evolving = self._searching(
            meta_schedule.search_strategy.EvolutionarySearch(
                population_size=32, init_min_unmeasured=8, genetic_num_iters=1
            ),
            seed,
        )

    def _searching(self, strategy: Any, seed: int) -> Any:
        entries = {**self._target.export(), "num-cores": os.cpu_count() or 1}
        target = tvm.target.Target(entries)
        context = meta_schedule.TuneContext(
            mod=self._workload.mod,
            target=target,
            space_generator=meta_schedule.space_generator.PostOrderApply(
                sch_rules="llvm", postprocs="llvm", mutator_probs="llvm"
            ),
            search_strategy=strategy,
            num_threads=1,
            rand_state=seed,
        )
        context.pre_tuning(self._most, _ROUND, context.generate_design_space(), self._database, self._model)
        return context

    def round(self, end: float) -> Iterator[None]:
        """Measures some schedules until `end`; yields whenever there is something to tell."""
        context = self._evolving if self._rounds or self._known is not None else self._sampling
        self._rounds += 1
        try:
            candidates = context.generate_measure_candidates()
        except Exception:  # whatever a rule of MetaSchedule stumbles over
            candidates = None
        if not candidates:
            self.finished = True
            yield
            return
        better = False
        results = []
        for candidate in candidates:
            if time.monotonic() >= end:
                return
            seconds, best = self._try(candidate)
            self.trials += 1
            if best:
                better = True
                yield
            results.append(
                meta_schedule.runner.RunnerResult(None, "failed")
                if seconds is None
                else meta_schedule.runner.RunnerResult([seconds], None)
            )
        context.notify_runner_results(candidates, results)
        good = [(c, r) for c, r in zip(candidates, results, strict=True) if r.error_msg is None]
        if good:
            self._model.update(context, [c for c, _ in good], [r for _, r in good])
        self.stale = 0 if better else self.stale + 1
        self.finished = self.stale >= _STALE or self.trials >= self._most
        yield

    def _try(self, candidate: Any) -> tuple[float | None, bool]:
        """Seconds of a schedule, None if it does not compile or computes something else; and whether it is the best."""
        try:
            built = self._built(candidate.sch.mod)
        except Exception:  # whatever LLVM or a pass does not take
            return None, False
        limit = self.before if self.best is None else self.best
        seconds = _seconds(built, self._arguments, limit)
        better = seconds < limit * _GAIN
        if better and not self._right(built):
            return None, False
        self._database.commit_tuning_record(self._recorded(candidate, seconds))
        if better:
            # In turns with what it is to replace, since the machine may be slower now than when that was measured.
            before, after = _interleaved(self._fastest, built, self._arguments)
            better = after < before * _GAIN
            if better:
                self._fastest = built
                self.before, self.best = _interleaved(self._plain, built, self._arguments)
                self.record = self._recorded(candidate, after).as_json()
        return seconds, better

    def _resume(self, record: Any) -> None:
        """Takes up a schedule that an earlier search found; it stays unless it is slower or wrong now."""
        candidate = record.as_measure_candidate()
        built = self._built(candidate.sch.mod)
        if not self._right(built):
            return
        before, after = _interleaved(self._plain, built, self._arguments)
        self._database.commit_tuning_record(self._recorded(candidate, after))
        if after < before:
            self._fastest, self.before, self.best, self.record = built, before, after, self._known

    def _recorded(self, candidate: Any, seconds: float) -> Any:
        return meta_schedule.database.TuningRecord(
            candidate.sch.trace, self._workload, [seconds], self._target, candidate.args_info
        )

    def _built(self, module: Any) -> Any:
        return tvm.compile(module, target=self._target)["main"]

    def _outputs(self, function: Any) -> list[Any]:
        """What a run leaves in every argument, those that it only reads included."""
        for argument, given in zip(self._arguments, self._given, strict=True):
            argument.copyfrom(given)
        function(*self._arguments)
        return [np.array(argument.numpy()) for argument in self._arguments]

    def _right(self, built: Any) -> bool:
        """Whether the outputs are those of the plain loop."""
        for found, wanted in zip(self._outputs(built), self._wanted, strict=True):
            if wanted.dtype.kind != "f":
                if not np.array_equal(found, wanted):
                    return False
                continue
            finite = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
            tolerance = _TOLERANCE.get(wanted.dtype.name, 1e-9) * float(finite)
            if not np.allclose(found, wanted, rtol=0.0, atol=tolerance, equal_nan=True):
                return False
        return True


def _argument(rng: np.random.Generator, parameter: Any) -> Any:
    """Positive numbers, of which logarithms and roots exist; zeros for what may be an index."""
    shape, dtype = [int(d) for d in parameter.shape], np.dtype(str(parameter.dtype))
    if dtype.kind == "f":
        return tvm.runtime.tensor(rng.uniform(0.1, 1.0, shape).astype(dtype))
    if dtype.itemsize == 1:
        return tvm.runtime.tensor(rng.integers(0, 2 if dtype.kind == "b" else 100, shape).astype(dtype))
    return tvm.runtime.tensor(np.zeros(shape, dtype))


def _run(function: Any, arguments: list[Any]) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def _seconds(function: Any, arguments: list[Any], limit: float = float("inf")) -> float:
    """Median seconds of a run; of one alone if that takes twice the limit."""
    _run(function, arguments)
    times = [_run(function, arguments)]
    while times[0] < 2 * limit and sum(times) < _SPAN and len(times) < _MOST_RUNS:
        times.append(_run(function, arguments))
    return median(times)


def _interleaved(before: Any, after: Any, arguments: list[Any]) -> tuple[float, float]:
    """Median seconds of two functions that are run in turns."""
    times: tuple[list[float], list[float]] = [], []
    start = time.perf_counter()
    while len(times[0]) < 3 or (time.perf_counter() - start < 4 * _SPAN and len(times[0]) < _MOST_RUNS):
        for function, kept in zip((before, after), times, strict=True):
            kept.append(_run(function, arguments))
    return median(times[0]), median(times[1])


def _model() -> Any:
    """What predicts which schedules are fast; without XGBoost it is chance."""
    try:
        import xgboost  # noqa: F401
    except ImportError:
        return meta_schedule.cost_model.RandomModel()
    return meta_schedule.cost_model.XGBModel(num_warmup_samples=2 * _ROUND, num_tuning_cores=1)


def main() -> None:
    """Runs the job until its time is over or nothing is left to search for."""
    # Libraries that print must not do so between the lines of the parent.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    sys.modules.setdefault(_INTRINSICS, types.ModuleType(_INTRINSICS))
    job = json.load(sys.stdin)
    end = time.monotonic() + job["seconds"]
    signal.setitimer(signal.ITIMER_REAL, job["seconds"] + _PATIENCE)
    machine = Machine(**{**job["machine"], "features": tuple(job["machine"]["features"])})
    model = _model()
    tasks: dict[int, Task] = {}

    def tell(index: int) -> None:
        task = tasks[index]
        line = {
            "task": index, "trials": task.trials, "finished": task.finished, "before": task.before, "best": task.best,
            "record": task.record,
        }  # fmt: skip
        told.write(json.dumps(line) + "\n")

    for index, entry in enumerate(job["tasks"]):
        if time.monotonic() >= end:
            return
        told.write(json.dumps({"task": index}) + "\n")
        try:
            tasks[index] = Task(entry, machine, model, most=job["trials"], seed=1 + index + entry["trials"])
        except Exception as error:  # whatever a rule of MetaSchedule stumbles over
            told.write(json.dumps({"task": index, "error": f"{type(error).__name__}: {error}"[-300:]}) + "\n")
            continue
        tell(index)
        for _ in tasks[index].round(end):
            tell(index)
    while time.monotonic() < end:
        open_ = [i for i, task in tasks.items() if not task.finished]
        if not open_:
            return
        index = max(open_, key=lambda i: tasks[i].calls * (tasks[i].best or tasks[i].before) / (1 + tasks[i].stale))
        for _ in tasks[index].round(end):
            tell(index)


if __name__ == "__main__":
    main()
