"""N:M sparsity of two vision models: agreement with the dense model, and top-1 where there are labels.

    python -m examples.nm.vision [--models vit efficientnet] [--patterns 2:4 1:4] [--images 200] [--int8]

The ViT-S/14 is judged on CIFAR-10 test pictures, EfficientNet-Lite0 on crops of pictures that calibration did not see.
`+p`: channels permuted before; `+r`: weights that stay refitted by least squares; `+int8`: static int8 behind it, as
the recipes `int8_smooth` and `int8` make it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir

from examples.efficientnet import images
from examples.nm import SCORES
from examples.vit import data as cifar
from examples.vit.model import weights as vit_weights
from onnxcomp import api
from onnxcomp.metrics import sqnr
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.permute import Permute
from onnxcomp.recipe import load_recipe
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

CALIBRATION = 32
INPUTS_PER_RUN = 16


@dataclass(frozen=True)
class Subject:
    """A model with its pictures; labels if there are any."""

    read: Callable[[], ir.Model]
    calibration: Callable[[], Iterable[Feed]]
    evaluation: Callable[[], Iterable[Feed]]
    labels: np.ndarray | None
    recipe: str


def vit(count: int, folder: Path) -> Subject:
    return Subject(
        read=partial(load, vit_weights()),
        calibration=cifar.calibration,
        evaluation=partial(cifar.test_pictures, count),
        labels=cifar.labels()[:count],
        recipe="int8_smooth",
    )


def efficientnet(count: int, folder: Path) -> Subject:
    path = folder / "efficientnet.onnx"
    api.export("examples.efficientnet.model:model", path)
    crops = list(images.calibration())
    return Subject(
        read=partial(load, path),
        calibration=lambda: crops[:: len(crops) // CALIBRATION],
        evaluation=lambda: islice(images.evaluation(), count),
        labels=None,
        recipe="int8",
    )


def rows(pattern: str, *, int8: bool, recipe: str) -> Iterator[tuple[str, list[Pass]]]:
    """Names and passes of what is compared."""
    for method, score in SCORES.items():
        mask = NmMask(pattern=pattern, method=method, inputs_per_run=INPUTS_PER_RUN)
        permute = Permute(pattern=pattern, score=score)
        yield f"{pattern} {method}", [Cleanup(), mask]
        yield f"{pattern} {method}+p", [Cleanup(), permute, mask]
        if method in ("wanda", "sparsegpt"):
            again = NmMask(pattern=pattern, method=method, inputs_per_run=INPUTS_PER_RUN, reconstruct=True)
            yield f"{pattern} {method}+r", [Cleanup(), again]
            yield f"{pattern} {method}+p+r", [Cleanup(), permute, again]
            if int8:
                yield f"{pattern} {method}+p+r+int8", [Cleanup(), permute, again, *load_recipe(recipe).passes]


def logits(model: ir.Model, subject: Subject) -> np.ndarray:
    run = reference_runner(model, [model.graph.outputs[0].name or ""])
    return np.concatenate([next(iter(run(feed).values())) for feed in subject.evaluation()])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.nm.vision", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit", "efficientnet"], choices=("vit", "efficientnet"))
    parser.add_argument("--patterns", nargs="+", default=["2:4", "1:4"])
    parser.add_argument("--images", type=int, default=200, help="pictures to judge with at most")
    parser.add_argument("--int8", action="store_true", help="static int8 behind the masks as well")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for model in options.models:
            subject = {"vit": vit, "efficientnet": efficientnet}[model](options.images, Path(name))
            report(model, subject, options)


def report(name: str, subject: Subject, options: argparse.Namespace) -> None:
    feeds = list(islice(subject.calibration(), CALIBRATION))
    dense = logits(subject.read(), subject)
    truth = subject.labels
    top1 = "" if truth is None else f", top-1 {(dense.argmax(axis=-1) == truth).mean():.3f}"
    print(f"{name}, {len(dense)} pictures{top1}\n{'':26} {'SQNR dB':>8} {'agree':>7} {'top-1':>7}", flush=True)
    every: list[tuple[str, list[Pass]]] = [("int8", list(load_recipe(subject.recipe).passes))] if options.int8 else []
    for pattern in options.patterns:
        every += rows(pattern, int8=options.int8, recipe=subject.recipe)
    for label, passes in every:
        model = subject.read()
        pipeline = Pipeline(passes=passes, capabilities=OrtCpu().capabilities(), runner=reference_runner)
        pipeline.run(model, feeds)
        found = logits(model, subject)
        agree = (found.argmax(axis=-1) == dense.argmax(axis=-1)).mean()
        right = "" if truth is None else f"{(found.argmax(axis=-1) == truth).mean():7.3f}"
        print(f"{label:26} {sqnr(dense, found):8.2f} {agree:7.3f} {right}", flush=True)


if __name__ == "__main__":
    main()
