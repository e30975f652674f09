"""EfficientNet-Lite0 on a video of a fixed camera: what a stream saves against whole frames, and what it costs.

    python -m examples.delta.video [--clip FILE] [--on FILE] [--start 0] [--calibrate 64] [--frames 400]
        [--max-error 0.1] [--search layers] [--plot page.html]

Thresholds are searched on the first frames, everything else is told of later ones. Two dense models stand beside it,
float and static int8, both as ONNX Runtime executes them best; all run frame by frame in turns, one thread. `quarter`
are the frames with the least change from one to the next.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from examples.delta.clips import FIXED, clip, feeds
from onnxcomp import api
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.delta import Delta
from onnxcomp.recipe import load_recipe
from onnxcomp.target import Artifact, Feed
from onnxcomp.targets.ort import OrtCpu
from onnxcomp.verbs.resolve import compiled


def outputs(artifact: Artifact, frames: list[Feed]) -> np.ndarray:
    """Scores of every frame, as one stream."""
    session = OrtCpu().load(artifact)
    name = session.outputs[0].name
    return np.stack([session.run(f)[name][0].copy() for f in frames])


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m examples.delta.video", description=__doc__)
    parser.add_argument("--clip", type=Path, default=clip(FIXED[0]))
    parser.add_argument("--on", type=Path, help="clip to judge and to time, in place of later frames of the first")
    parser.add_argument("--start", type=int, default=0, help="first frame to calibrate with")
    parser.add_argument("--calibrate", type=int, default=64, help="frames to search thresholds on")
    parser.add_argument("--frames", type=int, default=400, help="later frames to judge and to time")
    parser.add_argument("--max-error", type=float, default=0.1)
    parser.add_argument("--search", choices=("global", "layers"), default="global")
    parser.add_argument("--repeat", type=int, default=5, help="passes through the frames")
    parser.add_argument("--plot", type=Path, help="page with density and latency over the frames")
    options = parser.parse_args()
    first = options.start + options.calibrate
    calibration = list(feeds(options.clip, options.start, first))
    judged, begin = (options.on, 0) if options.on else (options.clip, first)
    frames = list(feeds(judged, begin, begin + options.frames))
    target = OrtCpu()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        api.export("examples.efficientnet.model:model", folder / "float.onnx")
        recipes = {
            "fp32": [Cleanup()],
            "int8": list(load_recipe("int8").passes),
            "stream": [Cleanup(), Delta(max_error=options.max_error, search=options.search, frames=options.calibrate)],
        }
        artifacts = {}
        for kind, passes in recipes.items():
            found = api.rewrite(folder / "float.onnx", None, recipe=passes, data=calibration, samples=None)
            artifacts[kind] = compiled(found.model, target, folder / kind)
        dense = outputs(artifacts["fp32"], frames)
        print(f"{judged.name}, {len(frames)} frames; calibrated on {len(calibration)} of {options.clip.name}")
        for kind in ("int8", "stream"):
            scores = outputs(artifacts[kind], frames)
            agree = (scores.argmax(axis=-1) == dense.argmax(axis=-1)).mean()
            error = np.sqrt(np.square(scores - dense).mean() / np.square(dense).mean())
            print(f"{kind:8} same class {agree:.3f}, relative error {error:.3f}")
        session = target.load(artifacts["stream"])
        print(f"state {sum(s.nbytes for s in session.states) / 1e6:.1f} MB in {len(session.states)} tensors")
        for kind in ("fp32", "int8"):
            found = api.profile_stream(
                folder / "stream", folder / kind, data=frames, repeat=options.repeat, seconds=None, threads=1
            )
            assert found.baseline is not None
            assert found.ratio is not None
            print(
                f"against {kind}: {found.baseline.p50:.2f} ms a frame, stream {found.model.p50:.2f} "
                f"(p90 {found.model.p90:.2f}); {1 / found.ratio.median:.2f}x as fast over all frames"
            )
            for part, label in ((found.low, "least changed quarter"), (found.high, "most changed quarter")):
                if part is not None and part.ratio is not None:
                    print(
                        f"    {label}: {part.density:.0%} of values differ; {part.baseline_ms:.2f} and "
                        f"{part.model_ms:.2f} ms, {1 / part.ratio.median:.2f}x"
                    )
            if options.plot and kind == "fp32":
                api.write_stream_page(found, options.plot, model="EfficientNet-Lite0")


if __name__ == "__main__":
    main()
