"""Activation sparsity on SmolLM2-135M: perplexity, weights that are skipped, and time a token, in one table.

    python -m examples.llm.sparse smollm2.onnx [--weights fp32 int8 int4] [--methods cats chess teal]
        [--sparsity 0.25 0.4 0.5 0.6] [--tokens 20480] [--results results.json] [--no-times] [--rows 2 4 8 128]

Thresholds are calibrated on one end of WikiText-2 and judged on the other. With integer weights, products that are not
made sparse get 8- or 4-bit weights in blocks, as the dense models do. Results are kept in a file, so that a table can
grow; times are taken at the end, of all its models interleaved: CPU time of one thread, medians. `--rows` times several
new tokens at once as well, against the dense model with the same weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from examples.llm.data import calibration
from examples.llm.generate import BoundModel
from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.session import wikitext
from examples.llm.tokenizer import Tokenizer
from onnxcomp import api
from onnxcomp.passes.threshold import Threshold
from onnxcomp.passes.weight_only import WeightOnly
from onnxcomp.rewrite import Pass
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.targets.ort.break_even_trials import clock

WINDOW, CONTEXT, CALIBRATION = 512, 256, 8
METHODS = ("cats", "chess", "teal", "wina", "topk", "cett")
OPTIONS = ("norms", "greedy", "attention")


@dataclass(frozen=True)
class Case:
    """A row of the table; a dense model has no method."""

    weights: str
    method: str = ""
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.weights} {self.method} {self.sparsity:.0%}" if self.method else f"{self.weights} dense"

    def passes(self) -> list[Pass]:
        steps: list[Pass] = []
        if self.method:
            method, *options = self.method.split("+")
            steps.append(
                Threshold(
                    method=method,
                    column_norms="norms" in options,
                    attention="attention" in options,
                    allocate="greedy" if "greedy" in options else "uniform",
                    sparsity=self.sparsity,
                    weights="keep" if self.weights == "fp32" else self.weights,
                    only_if_faster=False,
                )
            )
        if self.weights != "fp32":
            bits = int(self.weights[3:])
            steps.append(
                WeightOnly(bits=bits, block_size=64 if bits == 8 else 32, method="rtn" if bits == 8 else "mse")
            )
        return steps


def known(method: str) -> str:
    """A method and its options, as given on the command line."""
    name, *options = method.split("+")
    if name not in METHODS or not set(options) <= set(OPTIONS):
        raise argparse.ArgumentTypeError(f"{method!r}: none of {', '.join(METHODS)} with +{' or +'.join(OPTIONS)}")
    return method


def rewritten(model: Path, case: Case, out: Path) -> float:
    """Writes the model of a case; returns the share of weights in products that one token need not read."""
    data = [feed for _, feed in zip(range(CALIBRATION), calibration(), strict=False)]
    reports = api.rewrite(model, out, recipe=case.passes() or "cleanup", data=data, check="none").passes
    found = [e.detail for r in reports if r.name == "threshold" for e in r.edits if "of the weights" in e.detail]
    return float(found[0].split("% of the weights")[0].split()[-1]) / 100 if found else 0.0


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for weights in options.weights:
        yield Case(weights)
        for method in options.methods:
            yield from (Case(weights, method, share) for share in options.sparsity)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.sparse", description=__doc__)
    parser.add_argument("model", type=Path, help="written by examples.llm.model")
    parser.add_argument("--weights", nargs="+", default=["fp32", "int8", "int4"], choices=("fp32", "int8", "int4"))
    parser.add_argument(
        "--methods",
        nargs="*",
        default=["cats", "chess", "teal"],
        type=known,
        metavar="METHOD",
        help=f"{', '.join(METHODS)}; with +norms for column norms, +greedy for TEAL's allocation, "
        "+attention for attention as well",
    )
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--tokens", type=int, default=20480)
    parser.add_argument("--results", type=Path, default=Path("results.json"))
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--repeat", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="*", type=int, default=[], help="numbers of new tokens to time as well")
    options = parser.parse_args()
    tokens = np.array(Tokenizer(GgufFile(smollm2_weights())).encode(wikitext().read_text(encoding="utf-8")))
    results = json.loads(options.results.read_text()) if options.results.is_file() else {}
    wanted = list(cases(options))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = {}
        for case in wanted:
            row = results.setdefault(case.name, asdict(case))
            if options.no_times and "perplexity" in row:
                continue
            row["skipped"] = rewritten(options.model, case, folder / "model.onnx")
            row["bytes"] = (folder / "model.onnx").stat().st_size
            if "perplexity" not in row and not options.no_perplexity:
                measured = api.perplexity(folder / "model.onnx", tokens=tokens[: options.tokens], window=WINDOW)
                row["perplexity"] = measured.perplexity
                print(f"{case.name}: {measured.perplexity:.3f}", flush=True)
            options.results.write_text(json.dumps(results, indent=1))
            if not options.no_times:
                artifacts[case.name] = api.compile(folder / "model.onnx", folder / case.name.replace(" ", "_")).path
        if artifacts:
            for name, milliseconds in times(artifacts, tokens[: CONTEXT + options.repeat], options.threads).items():
                results[name]["milliseconds"] = milliseconds
            options.results.write_text(json.dumps(results, indent=1))
        for rows in options.rows:
            print(f"\n{rows} new tokens: ms, and times the dense model's")
            several(artifacts, tokens, rows, options)
    table(results)


def times(artifacts: dict[str, Path], tokens: np.ndarray, threads: int) -> dict[str, float]:
    """Median milliseconds of one token behind a context of text."""
    models = {name: BoundModel(path / "model.onnx", threads=threads) for name, path in artifacts.items()}
    caches = {}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        _, caches[name] = model.read(tokens[:CONTEXT].tolist(), model.empty_cache())
    for token in tokens[CONTEXT:].tolist():
        for name, model in models.items():
            start = clock(threads)
            _, caches[name] = model.read([token], caches[name])
            taken[name].append(clock(threads) - start)
    return {name: float(np.median(found[2:])) * 1e3 for name, found in taken.items()}


def several(artifacts: dict[str, Path], tokens: np.ndarray, rows: int, options: argparse.Namespace) -> None:
    """Prints times of several new tokens behind a context of text, the artifacts' sessions choosing their graph."""
    target = OrtCpu()
    sessions = {name: target.load(target.open(path), threads=options.threads) for name, path in artifacts.items()}
    first = BoundModel(next(iter(artifacts.values())) / "model.onnx", threads=options.threads)
    _, cache = first.read(tokens[:CONTEXT].tolist(), first.empty_cache())
    feed = {name: value.numpy() for name, value in cache.items()} | {"input_ids": tokens[None, :rows].astype(np.int64)}
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(options.repeat):
        for name, session in sessions.items():
            start = clock(options.threads)
            session.run(feed)
            taken[name].append(clock(options.threads) - start)
    for name, found in taken.items():
        ratio = np.median(np.array(found[2:]) / np.array(taken[f"{name.split()[0]} dense"][2:]))
        print(f"{name:22} {np.median(found[2:]) * 1e3:9.2f} {ratio:8.3f}", flush=True)


def table(results: dict[str, dict[str, float]]) -> None:
    """Prints all rows that there are."""
    print(f"{'model':22} {'perplexity':>10} {'rise':>7} {'skipped':>8} {'MB':>5} {'ms/token':>9} {'x dense':>8}")
    for name, row in results.items():
        base = results.get("fp32 dense", {}).get("perplexity")
        dense = results.get(f"{row['weights']} dense", {}).get("milliseconds")
        ppl, ms = row.get("perplexity"), row.get("milliseconds")
        cells = [
            "" if ppl is None else f"{ppl:.2f}",
            "" if ppl is None or base is None else f"{ppl / base - 1:+.1%}",
            f"{row.get('skipped', 0):.1%}",
            f"{row.get('bytes', 0) / 1e6:.0f}",
            "" if ms is None else f"{ms:.2f}",
            "" if ms is None or dense is None else f"{dense / ms:.2f}",
        ]
        print("{:22} {:>10} {:>7} {:>8} {:>5} {:>9} {:>8}".format(name, *cells))


if __name__ == "__main__":
    main()
