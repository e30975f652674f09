"""The models that are compared, dense and compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import onnx_ir as ir

from examples.delta.cells import recurrent, walk
from examples.efficientnet import images
from examples.llm import data as texts
from examples.llm.session import Decoder
from examples.vit import data as cifar
from examples.vit.model import weights as vit_weights
from onnxcomp import api
from onnxcomp.model import fix_shapes, load
from onnxcomp.passes.cleanup import Cleanup
from onnxcomp.passes.delta import Delta
from onnxcomp.passes.dynamic_quantize import DynamicQuantize
from onnxcomp.passes.nm_mask import NmMask
from onnxcomp.passes.nm_pack import NmPack
from onnxcomp.passes.threshold import Threshold
from onnxcomp.recipe import load_recipe
from onnxcomp.rewrite import Pass, Pipeline
from onnxcomp.target import Feed
from onnxcomp.targets.ort import OrtCpu, reference_runner

CALIBRATION, STEPS = 16, 24
PAST = 256  # tokens in the cache of a decode step


@dataclass(frozen=True)
class Subject:
    """A model.

    Attributes:
        read: Reads it, its shapes fixed.
        calibration: Feeds that passes may see.
        evaluation: Feeds for the outputs that are compared, in order where it is a stream.
        forms: Name to passes; the dense form has none but a cleanup.
    """

    read: Callable[[], ir.Model]
    calibration: Callable[[], Iterable[Feed]]
    evaluation: Callable[[], Iterable[Feed]]
    forms: Mapping[str, list[Pass]]

    def form(self, name: str) -> ir.Model:
        """The model in one of its forms."""
        model = self.read()
        pipeline = Pipeline(passes=self.forms[name], capabilities=OrtCpu().capabilities(), runner=reference_runner)
        pipeline.run(model, list(islice(self.calibration(), CALIBRATION)))
        return model


def sparse(values: str) -> list[Pass]:
    """2:4 by magnitude, packed: what is measured here is not accuracy."""
    return [Cleanup(), NmMask(pattern="2:4", method="magnitude"), NmPack(values=values)]


def efficientnet(folder: Path) -> Subject:
    """EfficientNet-Lite0 on pictures; as a stream, on frames of a clip."""
    path = folder / "efficientnet.onnx"
    api.export("examples.efficientnet.model:model", path)
    return Subject(
        read=partial(load, path),
        calibration=images.calibration,
        evaluation=images.evaluation,
        forms={"dense": [Cleanup()], "int8": list(load_recipe("int8").passes)},
    )


def video(folder: Path) -> Subject:
    """EfficientNet-Lite0 as a stream of frames."""
    from examples.delta.clips import FIXED, clip, feeds  # needs a package that reads videos

    still = efficientnet(folder)
    frames = partial(feeds, clip(FIXED[0]))
    return Subject(
        read=still.read,
        calibration=partial(frames, 0, CALIBRATION),
        evaluation=partial(frames, 100, 100 + STEPS),
        forms={"delta": [Cleanup(), Delta(max_error=0.15)]},
    )


def vit(folder: Path) -> Subject:
    """ViT-S/14 on CIFAR-10."""

    def read() -> ir.Model:
        model = load(vit_weights())
        fix_shapes(model, {"image": (1, 3, 224, 224)})
        return model

    forms = {"dense": [Cleanup()], "int8": list(load_recipe("int8_smooth").passes), "2:4 int8": sparse("int8")}
    return Subject(read, cifar.calibration, partial(cifar.test_pictures, STEPS), forms)


def smollm2(path: Path) -> Subject:
    """One step of SmolLM2-135M with a cache of `PAST` tokens."""

    def read() -> ir.Model:
        model = load(path)
        caches = {str(v.name): (1, 3, PAST, 64) for v in model.graph.inputs if str(v.name).startswith("past_")}
        fix_shapes(model, {"input_ids": (1, 1), **caches})
        return model

    def steps(windows: Callable[[], Iterable[Feed]]) -> Iterable[Feed]:
        decoder = Decoder(path)
        for window in windows():
            tokens = window["input_ids"][0]
            for start in range(0, len(tokens) - PAST, 100):
                decoder.reset()
                decoder.run(tokens[start : start + PAST])
                yield {"input_ids": tokens[None, start + PAST : start + PAST + 1], **decoder.cache}

    forms: dict[str, list[Pass]] = {
        "dense": [Cleanup()],
        "int8": [Cleanup(), DynamicQuantize()],
        "threshold 50 %": [Cleanup(), Threshold(method="cats", sparsity=0.5)],
        "2:4 int8": sparse("int8"),
    }
    return Subject(read, partial(steps, texts.calibration), partial(steps, texts.evaluation), forms)


def gru(_: Path) -> Subject:
    """One step of a GRU of 512 units, a tenth of whose inputs changes from step to step."""
    return Subject(
        read=partial(recurrent, "GRU"),
        calibration=partial(walk, 512, CALIBRATION),
        evaluation=partial(walk, 512, STEPS),
        forms={"dense": [Cleanup()], "delta": [Cleanup(), Delta(threshold=0.01)]},
    )
