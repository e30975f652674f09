"""Compiles models for x86-64 by TVM, dense and compressed, and compares them with ONNX Runtime.

    python -m examples.tvm [--models efficientnet video vit smollm2 gru] [--smollm2 MODEL.onnx] [--repeat 5]

Both run the same model in this process, in turns, one thread each; medians over all inputs and turns. What is compared
are outputs for a sequence of inputs that calibration did not see: the largest difference over the largest value.
SmolLM2 is written by `python -m examples.llm.model MODEL.onnx`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tvm

from examples.tvm import subjects
from onnxcomp.target import Feed, Session
from onnxcomp.targets.tvm.session import Loaded, TvmSession
from onnxcomp.verbs.resolve import compiled, make_target

MODELS = ("efficientnet", "video", "vit", "smollm2", "gru")
HEADER = ("", "compile s", "code KB", "weights MB", "load ms", "difference", "ms", "ORT ms", "ratio")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.tvm", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--smollm2", type=Path, help="left out if it is not given")
    parser.add_argument("--repeat", type=int, default=5, help="turns over all inputs")
    options = parser.parse_args()
    print("".join(f"{title:>{28 if not i else 12}}" for i, title in enumerate(HEADER)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, subject in chosen(options, folder):
            for form in subject.forms:
                feeds = list(islice(subject.evaluation(), subjects.STEPS))
                cells = row(subject.form(form), feeds, folder, options.repeat)
                print(f"{model + ', ' + form:<28}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def chosen(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, subjects.Subject]]:
    """The subjects that are asked for."""
    for name in options.models:
        if name != "smollm2":
            yield name, getattr(subjects, name)(folder)
        elif options.smollm2:
            yield name, subjects.smollm2(options.smollm2)


def row(model: ir.Model, feeds: Sequence[Feed], folder: Path, repeat: int) -> list[str]:
    """The cells behind the name."""
    ours, theirs = make_target("tvm-cpu"), make_target("ort-cpu")
    start = time.perf_counter()
    artifact = compiled(model, ours, folder / "tvm")
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    loaded = Loaded(artifact, 1)
    loading = time.perf_counter() - start
    other = theirs.load(compiled(model, theirs, folder / "ort"))
    far = difference(TvmSession(loaded), other, feeds)
    mine, reference = times(loaded, other, feeds, repeat)
    code, weights = (artifact.manifest["files"][name]["bytes"] for name in ("model.so", "weights.bin"))
    return [
        f"{compiling:.1f}",
        f"{code / 1e3:.0f}",
        f"{weights / 1e6:.1f}",
        f"{loading * 1e3:.1f}",
        f"{far:.1e}",
        f"{mine * 1e3:.3f}",
        f"{reference * 1e3:.3f}",
        f"{mine / reference:.2f}",
    ]


def difference(session: Session, other: Session, feeds: Sequence[Feed]) -> float:
    """Largest difference of any output over the largest value of that output."""
    worst = 0.0
    for feed in feeds:
        mine, reference = session.run(feed), other.run(feed)
        for name, wanted in reference.items():
            scale = float(np.abs(wanted.astype(np.float64)).max()) or 1.0
            worst = max(worst, float(np.abs(mine[name].astype(np.float64) - wanted).max()) / scale)
    return worst


def times(loaded: Loaded, other: Session, feeds: Sequence[Feed], repeat: int) -> tuple[float, float]:
    """Median seconds of both; inputs of ours are TVM's tensors already, as the runner on a device has them."""
    other.reset()
    given = [{name: tvm.runtime.tensor(np.ascontiguousarray(a)) for name, a in feed.items()} for feed in feeds]
    state: dict[str, Any] = {s.input: tvm.runtime.tensor(s.zeros()) for s in loaded.states}
    measured: list[tuple[float, float]] = []
    for turn in range(repeat + 1):
        for feed, tensors in zip(feeds, given, strict=True):
            start = time.perf_counter()
            results = loaded.run({**tensors, **state})
            middle = time.perf_counter()
            other.run(feed)
            stop = time.perf_counter()
            state = {s.input: results[s.output] for s in loaded.states}
            if turn:
                measured.append((middle - start, stop - middle))
    mine, reference = np.median(measured, axis=0)
    return float(mine), float(reference)


if __name__ == "__main__":
    main()
