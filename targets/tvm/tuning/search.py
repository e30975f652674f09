"""Starts the process that searches, hears what it finds, and ends it when the time is over."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from onnxcomp.errors import CompileError
from onnxcomp.targets.tvm.machine import Machine
from onnxcomp.targets.tvm.tuning import Tuning
from onnxcomp.targets.tvm.tuning.store import Result
from onnxcomp.targets.tvm.tuning.tasks import Task

# By `-m` Python would look for modules in the current folder first.
_START = (
    "import sys; sys.path = [p for p in sys.path if p]; from onnxcomp.targets.tvm.tuning.worker import main; main()"
)
_TICK = 0.5
"""Seconds from one report of progress to the next, when the process says nothing."""


def search(
    tasks: Sequence[Task],
    known: Mapping[str, Result],
    workloads: Mapping[str, Any],
    machine: Machine,
    tuning: Tuning,
    keep: Callable[[str, Result], None],
) -> dict[str, str]:
    """Measures schedules for some tasks on one thread.

    Args:
        tasks: What to search for, the most important first.
        known: What is known of some of them, by key: the search goes on from there.
        workloads: The functions as MetaSchedule writes them, by key.
        machine: What to compile for, which is this machine.
        tuning: Most seconds, and whom to tell.
        keep: Told whatever is known of a key, whenever that is more than before.

    Returns:
        Why a task has no search, by key.

    Raises:
        CompileError: If the process fails.
    """
    end = time.monotonic() + tuning.seconds
    found, refused, left = dict(known), dict[str, str](), list(tasks)
    # A schedule that crashes takes the process with it, and its task is given up; what was found of it stays.
    while left:
        crashed = _until(end, left, found, workloads, machine, tuning, keep, refused)
        if crashed is None:
            break
        refused[crashed.key] = "a schedule crashed"
        left = [task for task in left if task.key not in refused]
    return refused


def _until(
    end: float,
    tasks: Sequence[Task],
    known: dict[str, Result],
    workloads: Mapping[str, Any],
    machine: Machine,
    tuning: Tuning,
    keep: Callable[[str, Result], None],
    refused: dict[str, str],
) -> Task | None:
    """Runs one process until `end`; returns the task at which it crashed, if it did."""
    job = {
        "machine": asdict(machine),
        "seconds": max(0.0, end - time.monotonic()),
        "trials": tuning.trials,
        "tasks": [
            {
                "workload": workloads[task.key],
                "calls": task.calls,
                "record": known[task.key].record if task.key in known else None,
                "trials": known[task.key].trials if task.key in known else 0,
            }
            for task in tasks
        ],
    }
    task: Task | None = None
    text = "tune"
    with _process(job) as (process, errors):
        for line in _lines(process, end):
            if line is not None:
                task = tasks[line["task"]]
                text = _text(task, line)
                if "error" in line:
                    refused[task.key] = line["error"]
                elif "before" in line:
                    known[task.key] = _result(line, workloads[task.key])
                    keep(task.key, known[task.key])
            if tuning.progress:
                over = tuning.seconds - (end - time.monotonic())
                tuning.progress(text, min(int(over), int(tuning.seconds)), max(1, int(tuning.seconds)))
        code = process.poll()
        if code is not None and code < 0 and task is not None:
            return task
        if code:
            raise CompileError(
                f"the process that tunes ended with {code}: {_last(errors) or 'it said nothing'}. What it found is "
                "kept: compile again to go on from there, or with --tune 0 to do with that"
            )
    return None


def _result(line: Mapping[str, Any], workload: Sequence[Any]) -> Result:
    best = line["best"]
    return Result(
        workload=list(workload),
        record=line["record"],
        trials=line["trials"],
        before_us=1e6 * line["before"],
        after_us=None if best is None else 1e6 * best,
        finished=line["finished"],
    )


def _text(task: Task, line: Mapping[str, Any]) -> str:
    if "before" not in line:
        return f"tune {task.functions[0]}"
    best = line["best"]
    after = "" if best is None else f" -> {1e3 * best:.3f}"
    return f"tune {task.functions[0]}: {line['trials']} trials, {1e3 * line['before']:.3f}{after} ms"


@contextmanager
def _process(job: Mapping[str, Any]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes]]]:
    """The process with its job given; it is ended when the block is left, whatever for."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as errors:
        source.write(json.dumps(job).encode())
        source.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p),
                "TVM_NUM_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            },
            start_new_session=True,  # Ctrl-C is for the parent, which then ends it
        )
        try:
            yield process, errors
        finally:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


def _lines(process: subprocess.Popen[bytes], end: float) -> Iterator[dict[str, Any] | None]:
    """What the process says, line by line until it ends or `end`; None each time it says nothing for a while."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(min(left, _TICK)):
                yield None
                continue
            read = os.read(process.stdout.fileno(), 1 << 16)
            if not read:
                process.wait()
                return
            *lines, rest = (rest + read).split(b"\n")
            yield from (json.loads(line) for line in lines if line.startswith(b"{"))  # libraries may print as well


def _last(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
