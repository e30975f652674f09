"""What CoreInfer costs and gains on real text: perplexity of continuations, time a token, time to take the weights.

    python -m examples.llm.core_infer MODEL.onnx [--keep 0.6 0.4 0.2] [--weights float int8] [--prompts 8]
        [--length 256] [--answer 128] [--clusters 0] [--threads 1] [--out FOLDER]

Prompts are windows of the first half of WikiText-2, evenly spread. Each is read by the dense model; what follows it in
the text is then read token by token, by the dense model and by the model with the neurons that the prompt chose. Logits
behind the prompt itself are dense in both and do not count. The writers take turns at every prompt, so that a busy
machine slows all. With `--clusters`, lines follow for neurons of the nearest cluster of prompts, which are from the
other half of the text. `--out` keeps the graphs, for `examples.llm.generate --core FOLDER/float-0.4`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path

import numpy as np

from examples.llm.generate import STAGES, BoundModel, CoreInfer, Dense, Writer
from examples.llm.gguf import GgufFile
from examples.llm.model import smollm2_weights
from examples.llm.session import wikitext
from examples.llm.tokenizer import Tokenizer
from onnxcomp.model import load, save
from onnxcomp.passes.core_neurons import CoreNeurons
from onnxcomp.rewrite import Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner


def write_graphs(source: Path, folder: Path, step: CoreNeurons, data: Sequence[dict[str, np.ndarray]] = ()) -> None:
    """Makes `prefill.onnx`, `gather.onnx` and `decode.onnx` of a dense model.

    Args:
        source: The dense model.
        folder: Where they go; made if it is not there.
        step: The pass, whatever its stage.
        data: Prompts for clusters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        model = load(source)
        made = replace(step, stage=stage)
        pipeline = Pipeline(passes=[made], capabilities=OrtCpu().capabilities(), runner=reference_runner)
        (report,) = pipeline.run(model, list(data) or None)
        if not report.applied:
            reasons = sorted({edit.detail for edit in report.edits})
            raise SystemExit(f"{source}: no block has neurons that can be chosen: {'; '.join(reasons[:3])}")
        save(model, folder / f"{stage}.onnx")


@dataclass
class Score:
    """What one writer did on all prompts.

    Attributes:
        likely: Log-likelihoods of the tokens that it read.
        prefill: Seconds for each prompt, without the choice.
        steps: Seconds for each token.
        choice: Seconds to take and bind the weights, for each prompt.
    """

    likely: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    choice: list[float] = field(default_factory=list)

    @property
    def perplexity(self) -> float:
        return float(np.exp(-np.mean(self.likely)))


def read(writer: Writer, prompt: Sequence[int], answer: Sequence[int], score: Score) -> None:
    """Lets a writer read a prompt, and what follows it token by token."""
    started = time.perf_counter()
    writer.start(prompt)
    taken = writer.seconds if isinstance(writer, CoreInfer) else 0.0
    score.prefill.append(time.perf_counter() - started - taken)
    score.choice.append(taken)
    for token, following in pairwise(answer):
        started = time.perf_counter()
        logits = writer.step(token)
        score.steps.append(time.perf_counter() - started)
        wide = logits.astype(np.float64)
        score.likely.append(float(wide[following] - np.logaddexp.reduce(wide)))


def windows(tokens: Sequence[int], count: int, length: int) -> list[Sequence[int]]:
    """Windows of `length` tokens, evenly spread over a text.

    Raises:
        ValueError: If the text is shorter than one.
    """
    last = len(tokens) - length
    if last < 0:
        raise ValueError(f"a text of {len(tokens)} tokens has no window of {length}")
    starts = np.linspace(0, last, count).astype(int)
    return [tokens[start : start + length] for start in starts]


def prompts(model: BoundModel, texts: Sequence[Sequence[int]]) -> list[dict[str, np.ndarray]]:
    """Feeds that start from an empty cache."""
    empty = {name: value.numpy() for name, value in model.empty_cache().items()}
    return [{"input_ids": np.array([text], np.int64), **empty} for text in texts]


def main() -> None:
    """Prints a line for the dense model and for each share and storage."""
    parser = argparse.ArgumentParser(prog="python -m examples.llm.core_infer", description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.4, 0.2])
    parser.add_argument("--token-share", type=float, default=0.4)
    parser.add_argument("--values", choices=["magnitude", "positive"], default="magnitude")
    parser.add_argument("--skip-layers", type=int, default=3)
    parser.add_argument("--weights", nargs="+", choices=["float", "int8"], default=["float"])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=128, help="tokens read behind it")
    parser.add_argument("--clusters", type=int, default=0, help="clusters of prompts; 0: none")
    parser.add_argument("--cluster-prompts", type=int, default=48, help="prompts of 100 tokens that clusters are of")
    parser.add_argument("--check", type=int, default=0, help="tokens from one check for drift to the next; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for the graphs")
    parser.add_argument("--text", type=Path, default=wikitext())
    options = parser.parse_args()
    numbers = Tokenizer(GgufFile(smollm2_weights())).encode(options.text.read_text(encoding="utf-8"))
    half = len(numbers) // 2
    texts = windows(numbers[:half], options.prompts, options.length + options.answer)
    with tempfile.TemporaryDirectory() if options.out is None else nullcontext(options.out) as folder:
        dense = BoundModel(options.model, threads=options.threads)
        data = prompts(dense, windows(numbers[half:], options.cluster_prompts, 100)) if options.clusters else []
        writers: dict[str, Writer] = {"dense": Dense(dense)}
        for clusters in sorted({0, options.clusters}):
            for weights, keep in product(options.weights, options.keep):
                label = f"{weights}-{keep:g}" + (f"-of-{clusters}" if clusters else "")
                step = CoreNeurons(
                    keep=keep,
                    token_share=options.token_share,
                    values=options.values,
                    skip_layers=options.skip_layers,
                    weights=weights,
                    clusters=clusters,
                )
                write_graphs(options.model, Path(folder, label), step, data)
                writers[label] = CoreInfer.load(Path(folder, label), threads=options.threads, check=options.check)
        scores = {label: Score() for label in writers}
        for text in texts:
            for label, writer in writers.items():
                read(writer, text[: options.length], text[options.length :], scores[label])
    for label, score in scores.items():
        middle, prefill, choice = (1e3 * float(np.median(v)) for v in (score.steps, score.prefill, score.choice))
        print(
            f"{label:16} perplexity {score.perplexity:8.3f}; {middle:7.2f} ms a token; prompt {prefill:7.1f} ms, "
            f"choice {choice:6.1f} ms; {len(score.likely)} tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
