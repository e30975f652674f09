"""What each method adds on a real vision transformer at few bits, from plain rounding up.

    python -m examples.vit.ladder [--images 300] [--bits w6a6 w4a8] [--seeds 5]

Rungs add up: rounding to nearest; RepQ's scales; NoisyQuant's bias where it is free; bias correction; weights refitted
to quantized inputs. The first and the last layer have 8 bits throughout, as is usual. A seed
draws the 32 training pictures to calibrate with and everything random. The table gives mean
and standard deviation over seeds of the SQNR of the logits against fp32 and of top-1 on test pictures, and which rungs
fall short of the one before. The last row is the built-in recipe of that name, if
there is one.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from examples.vit.data import draw, labels, test_pictures
from examples.vit.model import weights
from onnxcomp.metrics import sqnr
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.noisy_bias import NoisyBias
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.reconstruct import Reconstruct
from onnxcomp.passes.smooth import Smooth
from onnxcomp.recipe import builtin_recipes, load_recipe
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.select import Select
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

_ENDS, _BETWEEN = Select(op=("Conv", "Gemm")), Select(op=("MatMul",))  # patches and head; all between


def rungs(weight_bits: int, activation_bits: int) -> dict[str, tuple[Pass, ...]]:
    """Passes by label."""
    repq = Smooth(method="repq", weight_bits=weight_bits, activation_bits=activation_bits)
    nearest, corrected = (
        (
            Quantize(bias_correction=on, where=_ENDS),
            Quantize(weight_bits=weight_bits, activation_bits=activation_bits, bias_correction=on, where=_BETWEEN),
        )
        for on in (False, True)
    )
    noise = NoisyBias(explicit=False)
    return {
        "round to nearest": nearest,
        "RepQ": (repq, *nearest),
        "+ noisy bias": (repq, *nearest, noise),
        "+ bias correction": (repq, *corrected, noise),
        "+ reconstruct": (repq, *corrected, noise, Reconstruct()),
    }


def main() -> None:
    """Prints a table for each number of bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--bits", type=bits, nargs="+", default=[(6, 6), (4, 8)], help="like w6a6 or w4a8")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--calibration", type=int, default=32, help="training pictures of a seed")
    options = parser.parse_args()
    exact, truth = _logits(load(weights()), options.images), labels()[: options.images]
    print(f"fp32: top-1 {_top1(exact, truth):.3f} on {options.images} pictures", flush=True)
    for weight_bits, activation_bits in options.bits:
        found: dict[str, list[tuple[float, float]]] = {}
        for seed in range(options.seeds):
            feeds = list(draw(options.calibration, seed))
            for label, model in _models(weight_bits, activation_bits, feeds, seed):
                logits = _logits(model, options.images)
                found.setdefault(label, []).append((sqnr(exact, logits), _top1(logits, truth)))
                print(f"  seed {seed}, {label}: {found[label][-1][0]:.2f} dB", flush=True)
        _print(f"w{weight_bits}a{activation_bits}", found)


def bits(text: str) -> tuple[int, int]:
    """Bits of weights and of activations out of `w4a8`."""
    match = re.fullmatch(r"w([2-8])a([2-8])", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form w4a8")
    return int(match[1]), int(match[2])


def _models(weight_bits: int, activation_bits: int, feeds: Sequence[Feed], seed: int) -> Iterator[tuple[str, ir.Model]]:
    """The model of each rung; what rungs begin with in common is done once."""
    made: dict[tuple[Pass, ...], ir.Model] = {(): _rewritten(load(weights()), (Cleanup(),), feeds, seed)}
    for label, passes in rungs(weight_bits, activation_bits).items():
        start = next(n for n in range(len(passes), -1, -1) if passes[:n] in made)
        for n in range(start, len(passes)):
            made[passes[: n + 1]] = _rewritten(made[passes[:n]].clone(), passes[n : n + 1], feeds, seed)
        yield label, made[passes]
    made.clear()
    name = f"w{weight_bits}a{activation_bits}"
    if name in builtin_recipes():
        yield f"recipe {name}", _rewritten(load(weights()), load_recipe(name).passes, feeds, seed)


def _rewritten(model: ir.Model, passes: Sequence[Pass], feeds: Sequence[Feed], seed: int) -> ir.Model:
    pipeline = Pipeline(passes=passes, capabilities=OrtCpu().capabilities(), runner=reference_runner, seed=seed)
    pipeline.run(model, feeds)
    return model


def _logits(model: ir.Model, images: int) -> np.ndarray:
    run = reference_runner(model, [model.graph.outputs[0].name or ""])
    return np.concatenate([next(iter(run(feed).values())) for feed in test_pictures(images)])


def _top1(logits: np.ndarray, truth: np.ndarray) -> float:
    return float((logits.argmax(axis=-1) == truth).mean())


def _print(name: str, found: dict[str, list[tuple[float, float]]]) -> None:
    print(f"\n{name}, mean (standard deviation) over seeds\n{'':20} {'SQNR in dB':>16} {'top-1':>16}")
    before = -np.inf
    for label, values in found.items():
        (db, top1), (db_spread, top1_spread) = np.mean(values, axis=0), np.std(values, axis=0)
        note = "  worse than the rung before" if db < before and label.startswith("+") else ""
        print(f"{label:20} {db:8.2f} ({db_spread:5.2f}) {top1:8.3f} ({top1_spread:5.3f}){note}", flush=True)
        before = db


if __name__ == "__main__":
    main()
