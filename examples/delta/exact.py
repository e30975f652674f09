"""Real models as streams with a threshold of 0: how far outputs are from those of the model that computes everything.

    python -m examples.delta.exact [--frames 100]

`portable` is the step model in plain ONNX Runtime, `kernels` the artifact for this CPU. Largest difference of any
output in any step, over the largest value of that output.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import onnx_ir as ir
from PIL import Image

from examples.delta.cells import recurrent, walk
from examples.delta.clips import FIXED, clip, feeds, pictures
from examples.delta.speech import silero, speech
from onnxcomp import api
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.delta import Delta
from onnxcomp.specs import input_specs
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner
from onnxcomp.verbs.resolve import compiled

_ROOT = Path(__file__).resolve().parents[2]


def zoo(name: str) -> Path:
    """A model of the corpus (`$ONNXCOMP_ZOO`, else shared/zoo beside the project)."""
    folder = os.environ.get("ONNXCOMP_ZOO")
    return (Path(folder) if folder else _ROOT.parent / "shared" / "zoo") / name


def video(model: ir.Model, count: int) -> Iterator[Feed]:
    """Frames of a clip in the size and layout of a model's input, values 0 to 1."""
    (spec,) = input_specs(model)
    sizes = [d if isinstance(d, int) else 1 for d in spec.shape or ()]
    last = sizes[3] == 3
    height, width = sizes[1:3] if last else sizes[2:]
    for picture in pictures(clip(FIXED[0]), 0, count):
        frame = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)[None] / 255
        yield {spec.name: frame if last else np.ascontiguousarray(frame.transpose(0, 3, 1, 2))}


def subjects(folder: Path) -> dict[str, Callable[[int], tuple[ir.Model, list[Feed]]]]:
    """Name to a model with its sequence."""

    def efficientnet(count: int) -> tuple[ir.Model, list[Feed]]:
        api.export("examples.efficientnet.model:model", folder / "efficientnet.onnx")
        return ir.load(folder / "efficientnet.onnx"), list(feeds(clip(FIXED[0]), 0, count))

    def from_zoo(name: str) -> Callable[[int], tuple[ir.Model, list[Feed]]]:
        def read(count: int) -> tuple[ir.Model, list[Feed]]:
            model = ir.load(zoo(name))
            return model, list(video(model, count))

        return read

    def cell(op_type: str) -> Callable[[int], tuple[ir.Model, list[Feed]]]:
        return lambda count: (recurrent(op_type), list(walk(512, count)))

    return {
        "EfficientNet-Lite0": efficientnet,
        "ResNet (MLPerf Tiny)": from_zoo("tiny__image_classification__pretrainedResnet.onnx"),
        "FastestDet": from_zoo("onnxruntime-extensions__ppp_vision_FastestDet.onnx"),
        "GRU 512": cell("GRU"),
        "LSTM 512": cell("LSTM"),
        "silero-vad": lambda count: (silero(), list(islice(speech(), count))),
    }


def off(found: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> float:
    """Largest difference over the largest value, worst output."""
    return max(
        max(float(np.abs(f[n] - w[n]).max()) for f, w in zip(found, wanted, strict=True))
        / max(float(np.abs(w[n]).max()) for w in wanted)
        for n in wanted[0]
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.delta.exact", description=__doc__)
    parser.add_argument("--frames", type=int, default=100)
    options = parser.parse_args()
    target = OrtCpu()
    print(f"{options.frames} steps{'':15} {'values held':>11} {'portable':>9} {'kernels':>9}")
    with tempfile.TemporaryDirectory() as name:
        for label, read in subjects(Path(name)).items():
            model, frames = read(options.frames)
            found = api.rewrite(model, None, recipe=[Cleanup(), Delta(threshold=0.0)], data=frames[:4], samples=None)
            states = {s for v in found.model.graph.outputs if (s := v.name or "")}
            names = [n for v in model.graph.outputs if (n := v.name or "") in states]
            held = sum(n.op_type.startswith("Delta") for n in found.model.graph.all_nodes())
            runs = [reference_runner(m, names) for m in (model, found.model)]
            session = target.load(compiled(found.model, target, Path(name, "artifact")))
            wanted, portable, native = [], [], []
            for feed in frames:
                wanted.append({k: v.copy() for k, v in runs[0](feed).items()})
                portable.append({k: v.copy() for k, v in runs[1](feed).items()})
                native.append({k: v.copy() for k, v in session.run(feed).items()})
            kept = [n for n in names if n in native[0]]
            wanted = [{n: w[n] for n in kept} for w in wanted]
            print(f"{label:24} {held:11} {off(portable, wanted):9.1e} {off(native, wanted):9.1e}", flush=True)


if __name__ == "__main__":
    main()
