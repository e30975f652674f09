"""N:M sparsity of SmolLM2-135M: perplexity, and what each method takes, in one table.

    python -m examples.llm.nm smollm2.onnx [--patterns 2:4 4:8 1:4] [--methods magnitude wanda ria sparsegpt]
        [--permute] [--reconstruct] [--tokens 20480] [--samples 10] [--results results.json]

Masks are chosen on one end of WikiText-2 and judged on the other. `+p` behind a method: channels were permuted before;
`+r`: weights that stay were refitted by least squares. Seconds are CPU time of everything but the perplexity, MB the
most memory of the process that does it. Results are kept in a file, so that a table can grow.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from examples.llm.data import calibration
from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.session import wikitext
from examples.llm.tokenizer import Tokenizer
from examples.nm import SCORES
from onnxcomp import api
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.permute import Permute
from onnxcomp.rewrite import Pass

WINDOW = 512
INPUTS_PER_RUN = 24  # inputs of six blocks: a quarter of the runs over the data, at no loss of perplexity to speak of


@dataclass(frozen=True)
class Case:
    """A row of the table; the dense model has no pattern."""

    pattern: str = ""
    method: str = ""
    permute: bool = False
    reconstruct: bool = False

    @property
    def name(self) -> str:
        return (
            f"{self.pattern} {self.method}{'+p' * self.permute}{'+r' * self.reconstruct}" if self.pattern else "dense"
        )

    def passes(self) -> list[Pass]:
        if not self.pattern:
            return []
        method = next(known for known in SCORES if known == self.method)
        before = [Permute(pattern=self.pattern, score=SCORES[method], cache=True)] if self.permute else []
        mask = NmMask(pattern=self.pattern, method=method, reconstruct=self.reconstruct, inputs_per_run=INPUTS_PER_RUN)
        return [*before, mask]


def rewritten(model: Path, case: Case, samples: int, out: Path, reply: Connection) -> None:
    """Writes the model of a case; replies with CPU seconds and MB."""
    api.rewrite(model, out, recipe=case.passes() or "cleanup", data=list(islice(calibration(), samples)), check="none")
    reply.send((time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def in_process(model: Path, case: Case, samples: int, out: Path) -> tuple[float, float]:
    """`rewritten` in a process of its own, so that its memory can be told."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    worker = spawn.Process(target=rewritten, args=(model, case, samples, out, theirs))
    worker.start()
    theirs.close()
    try:
        seconds, megabytes = ours.recv()
    except EOFError as error:
        raise SystemExit(f"{case.name} failed; see above") from error
    worker.join()
    return seconds, megabytes


def cases(options: argparse.Namespace) -> Iterator[Case]:
    yield Case()
    for pattern in options.patterns:
        for method in options.methods:
            for permute in (False, True) if options.permute else (False,):
                yield Case(pattern, method, permute)
                if options.reconstruct:
                    yield Case(pattern, method, permute, reconstruct=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.nm", description=__doc__)
    parser.add_argument("model", type=Path, help="written by examples.llm.model")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "4:8", "1:4"])
    parser.add_argument("--methods", nargs="+", default=list(SCORES), choices=SCORES)
    parser.add_argument("--permute", action="store_true", help="each with and without permuted channels")
    parser.add_argument("--reconstruct", action="store_true", help="each with and without least squares")
    parser.add_argument("--samples", type=int, default=10, help="calibration windows of 512 tokens")
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    options = parser.parse_args()
    tokens = np.array(Tokenizer(GgufFile(smollm2_weights())).encode(wikitext().read_text(encoding="utf-8")))
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    print(f"{'model':22} {'perplexity':>10} {'CPU s':>7} {'MB':>6}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        for case in cases(options):
            row = results.get(case.name)
            if row is None:
                seconds, megabytes = in_process(options.model, case, options.samples, path)
                measured = api.perplexity(path, tokens=tokens[: options.tokens], window=WINDOW)
                row = {"perplexity": measured.perplexity, "seconds": seconds, "megabytes": megabytes}
                results[case.name] = row
                options.results.write_text(json.dumps(results, indent=1))
            print(f"{case.name:22} {row['perplexity']:10.2f} {row['seconds']:7.0f} {row['megabytes']:6.0f}", flush=True)


if __name__ == "__main__":
    main()
