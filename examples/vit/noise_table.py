"""NoisyQuant on a real vision transformer: no noise, the paper's random noise, and the search by channel.

    python -m examples.vit.noise_table [--images 200] [--seeds 5]
    python -m examples.vit.noise_table --latency

For every linear layer: output error with the noise over that without, on images that the search did not see, mean and
spread over seeds (each seed draws other calibration rows and other noise). End to end: SQNR of the logits and top-1.
With `--latency` instead: what the noise costs in time where it is folded, and where it is an Add of its own.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from examples.vit.data import calibration, evaluation, top1
from examples.vit.model import weights
from onnxcomp import api
from onnxcomp.calibrate import collect
from onnxcomp.compare import compare
from onnxcomp.model import load
from onnxcomp.noise import find_noise, output_error
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.noisy_bias import NoisyBias
from onnxcomp.passes.quantize import Quantize
from onnxcomp.qdq import dequantized_weight, read_activation
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.select import Select
from onnxcomp.stats import RowSample
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

METHODS = ("random", "channel")
_IMAGES = 32  # to calibrate with


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    if options.latency:
        _latency()
        return
    os.environ["ONNXCOMP_LIMIT"] = str(options.images)
    for bits in (6, 8):
        _layers(bits, options.seeds)
    for bits, method in itertools.product((6, 8), (None, *METHODS)):
        _end_to_end(bits, method, options.images)


def _rewritten(*passes: Pass) -> ir.Model:
    model = load(weights())
    data = list(itertools.islice(calibration(), _IMAGES))
    Pipeline(passes=passes, capabilities=OrtCpu().capabilities(), runner=reference_runner).run(model, data)
    return model


def _layers(bits: int, seeds: int) -> None:
    model = _rewritten(Cleanup(), Quantize(activation_bits=bits, weight_bits=bits))
    layers = {
        node.name or "": (tensor, weight)
        for node in model.graph
        if node.op_type == "MatMul"
        and (tensor := read_activation(node.inputs[0])) is not None
        and (weight := dequantized_weight(node.inputs[1])) is not None
    }
    unseen = _rows(model, layers, itertools.islice(evaluation(), _IMAGES), seed=100)
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(seeds):
        seen = _rows(model, layers, itertools.islice(calibration(), _IMAGES), seed=seed)
        for name, (tensor, weight) in layers.items():
            zero = np.zeros(len(weight), np.float32)
            base = output_error(unseen[name], weight, tensor.grid, zero)
            for method in METHODS:
                noise = find_noise(seen[name], weight, tensor.grid, method, seed)  # type: ignore[arg-type]
                ratios[name][method].append(output_error(unseen[name], weight, tensor.grid, noise.vector) / base)
    print(f"\n{bits} bit: output error with noise / without, on unseen images; mean (spread over {seeds} seeds)")
    print(f"{'layer':42} {'random':>16} {'channel':>16}")
    for name, found in ratios.items():
        print(f"{name:42} " + " ".join(f"{np.mean(found[m]):9.3f} ({np.std(found[m]):.3f})" for m in METHODS))
    for kind in ("qkv", "attn/proj", "fc1", "fc2", ""):
        chosen = [found for name, found in ratios.items() if kind in name]
        means = {m: np.mean([f[m] for f in chosen], axis=0) for m in METHODS}
        label = f"mean of {kind or 'all'} ({len(chosen)})"
        print(f"{label:42} " + " ".join(f"{means[m].mean():9.3f} ({means[m].std():.3f})" for m in METHODS), flush=True)


def _rows(model: ir.Model, layers: dict[str, tuple], data: Iterator[Feed], seed: int) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    observers = {tensor.value.name or "": RowSample(1024, seed=seed) for tensor, _ in layers.values()}
    collect(model, observers, data, reference_runner)
    return {name: observers[tensor.value.name or ""].sample for name, (tensor, _) in layers.items()}


def _end_to_end(bits: int, method: str | None, images: int) -> None:
    noisy = [] if method is None else [NoisyBias(method=method)]  # type: ignore[arg-type]
    model = _rewritten(Cleanup(), Quantize(activation_bits=bits, weight_bits=bits), *noisy)
    original = load(weights())
    runs = [reference_runner(m, [m.graph.outputs[0].name or ""]) for m in (original, model)]
    data = itertools.islice(evaluation(), images)
    fidelity = compare(runs[0], runs[1], data, data_name="test images", metric=top1)
    output = fidelity.outputs[0]
    print(
        f"{bits} bit, {method or 'no noise':9}: SQNR {output.sqnr:6.2f} dB, agreement {output.top1:.3f}, "
        f"top-1 {fidelity.metric['top1']:.3f} (fp32 {fidelity.reference_metric['top1']:.3f}), {images} images",
        flush=True,
    )


def _latency() -> None:
    """Times of the int8 model with noise over those of the same without, interleaved; fc2 takes the explicit form."""
    shape = {"image": (1, 3, 224, 224)}
    plain = _rewritten(Cleanup(), Quantize())
    for form, where in (("folded", Select(skip=("*fc2*",))), ("explicit", Select(name=("*fc2*",)))):
        noise = NoisyBias(method="channel", min_gain=0.0, where=where, explicit=form == "explicit")
        noisy = _rewritten(Cleanup(), Quantize(), noise)
        more = len(noisy.graph) - len(plain.graph)
        found = api.profile(noisy, plain, threads=1, repeat=100, shapes=shape).ratio
        assert found is not None
        print(
            f"{form}: {more} more nodes, {found.median:.3f} of the time ({found.low:.3f}-{found.high:.3f})", flush=True
        )


if __name__ == "__main__":
    main()
