"""What each pass adds on a real vision transformer: plain static quantization, `smooth` before it, noise behind it.

    python -m examples.vit.ladder [--images 200] [--bits 8 6]

Calibrated on 32 training pictures. SQNR of the logits, agreement with fp32, and top-1 on test pictures.
"""

from __future__ import annotations

import argparse
import itertools
import os

from examples.vit.data import calibration, evaluation, top1
from examples.vit.model import weights
from onnxcomp.compare import compare
from onnxcomp.model import load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.noisy_bias import NoisyBias
from onnxcomp.passes.quantize import Quantize
from onnxcomp.passes.smooth import Smooth
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.targets.ort import OrtCpu, reference_runner

_IMAGES = 32  # to calibrate with


def rungs(bits: int) -> dict[str, tuple[Pass, ...]]:
    """Passes by label."""
    quantize = Quantize(activation_bits=bits, weight_bits=bits)

    def smooth(method: str = "best", *, explicit: bool = False) -> Smooth:
        return Smooth(method=method, activation_bits=bits, weight_bits=bits, explicit=explicit)  # type: ignore[arg-type]

    return {
        "plain": (quantize,),
        "noise": (quantize, NoisyBias(explicit=False)),
        "repq": (smooth("repq"), quantize),
        "smoothquant": (smooth("smoothquant"), quantize),
        "smooth": (smooth(), quantize),
        "smooth, noise": (smooth(), quantize, NoisyBias(explicit=False)),
        "smooth, Mul where it pays": (smooth(explicit=True), quantize),
    }


def main() -> None:
    """Prints a line for each rung."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6])
    options = parser.parse_args()
    os.environ["ONNXCOMP_LIMIT"] = str(options.images)
    for bits in options.bits:
        for label, passes in rungs(bits).items():
            _measure(bits, label, passes, options.images)


def _measure(bits: int, label: str, passes: tuple[Pass, ...], images: int) -> None:
    original, model = load(weights()), load(weights())
    pipeline = Pipeline(passes=(Cleanup(), *passes), capabilities=OrtCpu().capabilities(), runner=reference_runner)
    pipeline.run(model, list(itertools.islice(calibration(), _IMAGES)))
    runs = [reference_runner(m, [m.graph.outputs[0].name or ""]) for m in (original, model)]
    data = itertools.islice(evaluation(), images)
    found = compare(runs[0], runs[1], data, data_name="test images", metric=top1)
    output = found.outputs[0]
    print(
        f"{bits} bit, {label:26}: SQNR {output.sqnr:6.2f} dB, agreement {output.top1:.3f}, "
        f"top-1 {found.metric['top1']:.3f} (fp32 {found.reference_metric['top1']:.3f}), {images} images",
        flush=True,
    )


if __name__ == "__main__":
    main()
