"""Compiles models for NVIDIA GPUs by TVM, dense and compressed, on a machine with or without one.

    python -m examples.tvm.cuda [--boards jetson-orin h100] [--models vit gru] [--smollm2 MODEL.onnx]

Prints how long each takes, how large code and weights are, and how many nodes are left to TVM's own code. Where there
is a GPU that runs a board's code, outputs are compared with ONNX Runtime's on the CPU, and times with those of
`ort-cuda` if onnxruntime has it: both in turns, medians, inputs copied in and outputs out.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from examples.tvm import subjects
from examples.tvm.__main__ import chosen, difference
from onnxcomp.errors import DeviceError, OnnxcompError
from onnxcomp.target import Feed, Session, Target
from onnxcomp.verbs.resolve import compiled, make_target

MODELS = ("efficientnet", "video", "vit", "smollm2", "gru")
HEADER = ("", "compile s", "code KB", "weights MB", "TVM's own", "difference", "ms", "ort-cuda ms")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.tvm.cuda", description=__doc__)
    parser.add_argument("--boards", nargs="+", default=["jetson-orin", "h100"])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--smollm2", type=Path, help="left out if it is not given")
    parser.add_argument("--repeat", type=int, default=20, help="turns over all inputs")
    options = parser.parse_args()
    print("".join(f"{title:>{40 if not i else 12}}" for i, title in enumerate(HEADER)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, subject in chosen(options, folder):
            for form in subject.forms:
                rewritten = subject.form(form)
                feeds = list(islice(subject.evaluation(), subjects.STEPS))
                for board in options.boards:
                    cells = row(rewritten, board, feeds, folder, options.repeat)
                    title = f"{model}, {form}, {board}"
                    print(f"{title:<40}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def row(model: ir.Model, board: str, feeds: Sequence[Feed], folder: Path, repeat: int) -> list[str]:
    """The cells behind the name."""
    target = make_target(f"tvm-cuda:{board}")
    start = time.perf_counter()
    artifact = compiled(model, target, folder / "cuda")
    compiling = time.perf_counter() - start
    code, weights = (artifact.manifest["files"][name]["bytes"] for name in ("model.so", "weights.bin"))
    theirs = sum(count for name, count in artifact.audit.executed_ops.items() if name.endswith("(TVM's own)"))
    cells = [f"{compiling:.1f}", f"{code / 1e3:.0f}", f"{weights / 1e6:.1f}", str(theirs)]
    try:
        target.require_device()
    except DeviceError:
        return cells
    session, reference = target.load(artifact), on(make_target("ort-cpu"), model, folder)
    assert reference is not None
    cells.append(f"{difference(session, reference, feeds):.1e}")
    other = on(make_target("ort-cuda"), model, folder)
    mine, theirs_ms = times([session, other], feeds, repeat)
    return [*cells, f"{mine * 1e3:.3f}", f"{theirs_ms * 1e3:.3f}" if other else "-"]


def on(target: Target, model: ir.Model, folder: Path) -> Session | None:
    """The model on another target; None where that cannot run here."""
    try:
        target.require_device()
        return target.load(compiled(model, target, folder / target.name))
    except OnnxcompError:
        return None


def times(sessions: Sequence[Session | None], feeds: Sequence[Feed], repeat: int) -> tuple[float, ...]:
    """Median seconds of each; NaN for None."""
    measured: list[list[float]] = [[] for _ in sessions]
    for session in sessions:
        if session is not None:
            session.reset()
    for turn in range(repeat + 1):
        for feed in feeds:
            for session, taken in zip(sessions, measured, strict=True):
                if session is None:
                    continue
                start = time.perf_counter()
                session.run(feed)
                if turn:
                    taken.append(time.perf_counter() - start)
    return tuple(float(np.median(taken)) if taken else float("nan") for taken in measured)


if __name__ == "__main__":
    main()
