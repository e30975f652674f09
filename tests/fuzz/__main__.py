"""Fuzzes onnxcomp: `python -m tests.fuzz --minutes 20`.

Cases run in worker processes with a memory limit; a worker that dies or hangs is replaced, and what it was at is kept.
Every case is told by its kind and its number, and can be run again: `python -m tests.fuzz --case graph:1234`.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.corpus.harness import ZOO
from tests.fuzz.graphs import random_model
from tests.fuzz.mutate import mutate
from tests.fuzz.properties import check_file, check_model

KINDS = ("graph", "bytes")
BATCH = 100
MEMORY = 6 << 30
HANG = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--kind", choices=KINDS, help="graph, bytes, or both by default")
    parser.add_argument("--case", help="run one case in this process, e.g. graph:1234")
    parser.add_argument("--worker", nargs=3, metavar=("KIND", "START", "LOG"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return _work(options.worker[0], int(options.worker[1]), Path(options.worker[2]))
    if options.case:
        kind, _, number = options.case.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(kind, int(number), Path(folder)))
        return 0
    return _supervise([options.kind] if options.kind else list(KINDS), options.start, options.minutes)


def run_case(kind: str, number: int, folder: Path, stage: Callable[[str], object] = str) -> str:
    """Runs one case; `stage` as in `check_model`.

    Returns:
        `same`, `refused` or `invalid`.
    """
    random = np.random.default_rng([KINDS.index(kind), number])
    if kind == "graph":
        model, feeds = random_model(lambda bound: int(random.integers(bound)), 4 + number % 20)
        return check_model(model, feeds, folder, external=number % 5 == 4, stage=stage)
    return check_file(mutate(_source(number, random), random), folder)


def _source(number: int, random: np.random.Generator) -> bytes:
    files = sorted(p for p in ZOO.glob("*.onnx") if p.stat().st_size < 100_000) if ZOO.is_dir() else []
    if files and number % 2:
        return files[int(random.integers(len(files)))].read_bytes()
    model, _ = random_model(lambda bound: int(random.integers(bound)), 12)
    return bytes(model.SerializeToString())


def _work(kind: str, start: int, log: Path) -> int:
    logging.disable(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with log.open("a", buffering=1) as file, tempfile.TemporaryDirectory() as folder:
        for number in range(start, start + BATCH):
            file.write(f"at {number}\n")
            try:
                outcome = run_case(kind, number, Path(folder), lambda name: file.write(f"stage {name}\n"))
                file.write(f"{outcome} {number}\n")
            except BaseException as error:  # all that comes out is a finding
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "/tests/" not in f.filename]
                where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-1:-4:-1])
                text = " ".join(str(error).split())[:300]
                file.write(f"FOUND {number} {type(error).__name__}: {text} [{where}]\n")
    return 0


def _supervise(kinds: list[str], start: int, minutes: float) -> int:
    end = time.monotonic() + 60 * minutes
    counts: Counter[str] = Counter()
    findings: list[str] = []
    following = dict.fromkeys(kinds, start)
    turn = 0
    while time.monotonic() < end:
        kind = kinds[turn % len(kinds)]
        turn += 1
        following[kind] = _batch(kind, following[kind], end, counts, findings)
    for name, count in sorted(counts.items()):
        print(f"{name:20} {count}")
    return 1 if findings else 0


def _batch(kind: str, first: int, end: float, counts: Counter[str], findings: list[str]) -> int:
    """Runs one worker; returns the number of the next case."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--worker", kind, str(first), str(log)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
            size, since = 0, time.monotonic()
            ended = ""
            while worker.poll() is None:
                time.sleep(0.2)
                if log.stat().st_size != size:
                    size, since = log.stat().st_size, time.monotonic()
                if time.monotonic() - since > HANG:
                    ended = f"hangs for {HANG:.0f} s"
                elif time.monotonic() > end:
                    ended = "time is up"
                if ended:
                    worker.kill()
                    worker.wait()
            if not ended and worker.returncode:
                ended = f"worker died with code {worker.returncode}"
        at, stage = first, ""
        for line in log.read_text().splitlines():
            word, _, rest = line.partition(" ")
            if word == "at":
                at = int(rest)
            elif word == "stage":
                stage = rest
            elif word == "FOUND":
                counts[f"{kind} FOUND"] += 1
                findings.append(rest)
                print(f"{kind}:{rest}", flush=True)
            else:
                counts[f"{kind} {word}"] += 1
    if ended.startswith("worker died") and stage == "original":
        counts[f"{kind} invalid"] += 1  # onnxruntime aborts on the model as it was
    elif ended and ended != "time is up":
        counts[f"{kind} FOUND"] += 1
        findings.append(ended)
        print(f"{kind}:{at} {ended}", flush=True)
    return at + 1


if __name__ == "__main__":
    sys.exit(main())
