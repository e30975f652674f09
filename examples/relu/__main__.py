"""What the toolkit makes of a transformer with ReLU, trained on the spot: firing rates, thresholds, dead neurons.

    python -m examples.relu [--l1 0.005] [--characters 32768]
    python -m examples.relu [--l1 0.005] --latency

The first run trains for minutes and keeps the model. Losses are nats a character on text that neither training nor
calibration saw. With `--latency`: time of one character, with none before it, over that of the dense model, both
measured in turn. At this size all weights, 6 MB, stay in the processor's cache, so that only arithmetic is saved; what
thresholds save of a large model is the reading of weights from memory (see `examples.sparse_gemv`).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir

from examples.relu.model import Config, model
from examples.relu.text import Text, bible
from onnxcomp import api
from onnxcomp.model import load, model_size
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.prune_dead import PruneDead
from onnxcomp.passes.threshold import Threshold
from onnxcomp.rewrite import Pass
from onnxcomp.target import Feed
from onnxcomp.targets.ort import reference_runner

SHARES = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99)


def windows(tokens: np.ndarray, size: int) -> Iterator[Feed]:
    """Feeds of `size` characters each."""
    for start in range(0, len(tokens) - size + 1, size):
        yield {"tokens": tokens[start : start + size]}


def thresholds(method: Literal["fatrelu", "topk"], share: float) -> Threshold:
    """The pass for blocks of every size, since losses are asked for whether it pays or not."""
    return Threshold(method=method, sparsity=share, only_if_faster=False)


class Study:
    """A trained model and its text.

    Args:
        config: What was trained.
        text: What it was trained on.
        characters: Held-out characters to measure losses on, and characters to calibrate with.
    """

    def __init__(self, config: Config, text: Text, characters: int) -> None:
        self.config, self.text = config, text
        self.path = model(config, text)
        self.held_out = text.held_out[:characters]
        self.calibration = list(windows(text.calibration[:characters], config.context))
        self.dense = self.loss(self.path)

    def loss(self, subject: Path | ir.Model) -> float:
        """Nats a character as run on the target, each window of held-out text from nothing."""
        found = api.perplexity(subject, tokens=self.held_out, window=self.config.context)
        return math.log(found.perplexity)

    def rewritten(self, step: Pass, data: Sequence[Feed] = ()) -> tuple[ir.Model, Sequence[str]]:
        """The model after `cleanup` and a pass, and what the pass says that it did; `data` to calibrate with."""
        found = api.rewrite(self.path, None, recipe=[Cleanup(), step], data=data or self.calibration, samples=None)
        return found.model, [e.detail for e in found.passes[-1].edits if e.action == "applied"]

    def difference(self, changed: ir.Model, feeds: Iterable[Feed]) -> tuple[float, float]:
        """Largest difference of a logit from the original's over the largest logit; share of characters beyond 1e-5."""
        runs = [reference_runner(m, ["logits"]) for m in (load(self.path), changed)]
        differences, largest = [], 0.0
        for feed in feeds:
            want, found = (run(feed)["logits"] for run in runs)
            differences.append(np.abs(found - want).max(axis=-1))
            largest = max(largest, float(np.abs(want).max()))
        relative = np.concatenate(differences) / largest
        return float(relative.max()), float(np.mean(relative > 1e-5))


def print_firing(study: Study) -> None:
    """Prints a line for each block."""
    found = api.sparsity(study.path, data=study.calibration[:64], samples=64, measure=False)
    print(f"neurons of {found.tokens} characters of calibration text")
    print("block  neurons  dead  fire in <1 %   firing for a character: mean (p5-p95)   left at tail error 0.2")
    for index, layer in enumerate(found.layers):
        seen = layer.natural
        rare = sum(seen.firing[1:3])
        print(
            f"{index:5}  {layer.neurons:7}  {layer.dead:4}  {rare:12}   {seen.mean:6.1%} ({seen.p5:.1%}-{seen.p95:.1%})"
            f"{'':22} {layer.effective.mean:.1%}"
        )


def print_thresholds(study: Study) -> None:
    """Prints the loss of both methods at every share; a threshold of 0 drops what ReLU made zero."""
    methods: tuple[Literal["fatrelu", "topk"], ...] = ("fatrelu", "topk")
    for method in methods:
        for share in SHARES if method == "fatrelu" else SHARES[1:]:
            changed, said = study.rewritten(thresholds(method, share))
            loss = study.loss(changed)
            print(f"{method:7} {share:4.0%}: loss {loss:.4f} ({loss - study.dense:+.4f}); {said[-1]}", flush=True)


def print_dead(study: Study) -> None:
    """Prints what `prune_dead` takes away by all calibration text, and how far outputs stay the same."""
    calibration = list(windows(study.text.calibration, study.config.context))
    changed, said = study.rewritten(PruneDead(), calibration)
    for what in said or ["every neuron fires for some character of the calibration text"]:
        print(f"prune_dead: {what}")
    before, after = (model_size(m).weight_bytes / 1e6 for m in (load(study.path), changed))
    print(f"weights {before:.2f} -> {after:.2f} MB; loss {study.loss(changed):.4f}")
    for text, feeds in (
        ("calibration", study.calibration),
        ("held-out", windows(study.held_out, study.config.context)),
    ):
        most, share = study.difference(changed, feeds)
        print(
            f"{text} text: logits differ by at most {most:.1e} of the largest, for {share:.2%} of characters",
            flush=True,
        )


def print_latency(study: Study, threads: int) -> None:
    """Prints times of one character over that of the dense model."""
    one = [{"tokens": study.held_out[:1]}]
    pruned = study.rewritten(PruneDead())[0]
    rows = {"prune_dead": pruned}
    rows |= {f"fatrelu {s:.0%}": study.rewritten(thresholds("fatrelu", s))[0] for s in SHARES}
    rows |= {f"topk {s:.0%}": study.rewritten(thresholds("topk", s))[0] for s in SHARES[1:]}
    for label, changed in rows.items():
        ratio = api.profile(changed, study.path, data=one, threads=threads, repeat=2000, seconds=10.0).ratio
        assert ratio is not None
        print(f"{label:14} {ratio.median:.3f} of the dense time ({ratio.low:.3f}-{ratio.high:.3f})", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.relu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--l1", type=float, default=Config.l1, help="weight of ProSparse's penalty")
    parser.add_argument("--steps", type=int, default=Config.steps, help="steps of training")
    parser.add_argument("--characters", type=int, default=32768, help="to calibrate and to measure with")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of a timed run")
    options = parser.parse_args()
    study = Study(Config(l1=options.l1, steps=options.steps), bible(), options.characters)
    print(f"{study.path}, {study.path.stat().st_size / 1e6:.1f} MB")
    if options.latency:
        print_latency(study, options.threads)
        return
    print(f"loss {study.dense:.4f}; of single characters by frequency {study.text.unigram_loss():.4f}\n")
    for show in (print_firing, print_thresholds, print_dead):
        show(study)
        print()


if __name__ == "__main__":
    main()
